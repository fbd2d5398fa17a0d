/* Attention with an int8 cache: its two products are those of product.h. */

/* Int8Rows laid out in scratch memory, which has INT8_FLOATS floats for each of ATTENTION_ROWS rows. */
static Int8Rows scratch_rows(float *scratch, size_t columns, size_t group_size) {
    size_t n_scales = ATTENTION_ROWS * (columns / group_size);
    return (Int8Rows){.scales = scratch, .sums = (int32_t *)(scratch + n_scales),
                      .codes = (int8_t *)(scratch + 2 * n_scales)};
}

/* Quantise x (n) into the first n columns of row r of `rows`. */
static void quantize_into(const Int8Rows *rows, size_t r, const float *x, size_t n, size_t columns,
                          size_t group_size) {
    size_t n_groups = columns / group_size;
    Int8Rows row = {rows->codes + r * columns, rows->scales + r * n_groups, rows->sums + r * n_groups};
    quantize(&row, x, n, group_size);
}

/* q as int8, one group a head, by way of `padded` (width), which has zeros behind head_dim */
static void quantize_queries(const Int8Rows *q8, const float *const *q, size_t rows, float *padded,
                             const Block *b) {
    memset(padded, 0, b->width * sizeof *padded);
    for (size_t r = 0; r < rows; r++) {
        memcpy(padded, q[r], b->head_dim * sizeof *padded);
        quantize_into(q8, r, padded, b->width, b->width, b->width);
    }
}

/* p (rows, KV_BLOCK) = q . k over the first `filled` positions of a block: rows of a matrix of one group. */
static void scores_int8(float *p, const Int8Rows *q8, size_t rows, const Block *b, size_t filled) {
    size_t tile = TILE_BYTES(b->width);
    Product product = {.y = p, .stride = KV_BLOCK, .x = q8, .columns = b->width, .n_tokens = rows,
                       .w = {.tiles = (const uint8_t *)b->keys, .next_rows = tile, .next_group = tile,
                             .n_rows = filled, .n_groups = 1, .group_size = b->width,
                             .ahead = (const uint8_t *)b->keys + b->next, .ahead_bytes = b->next ? tile : 0}};
    matmul_int8_tiles(ENCODING_INT8, &product, 1);
}

/* p[j] *= scales[j], the scales of the values, for the first `seen` positions of a block; then 0 to `end`. */
static void scale_weights(float *p, const uint16_t *scales, size_t seen, size_t end) {
    for (size_t j = 0; j < seen; j += LANES)
        f32_store(p + j, f32_mul(f32_load(p + j), f32_load_f16(scales + j)));
    for (size_t j = seen; j < end; j++) p[j] = 0;
}

/* o (rows, width) = p v over the first `filled` positions of a block: dimensions are rows of the matrix,
   positions its columns. A position that a row does not see has the weight 0. */
static void values_int8(float *o, const Int8Rows *p8, float *p, size_t rows, const Block *b,
                        const size_t *seen, size_t filled) {
    size_t n_groups = (filled + VALUE_GROUP - 1) / VALUE_GROUP, next_rows = LANES * KV_BLOCK;
    const uint16_t *scales = (const uint16_t *)(b->values + KV_BLOCK * b->width);
    for (size_t r = 0; r < rows; r++) {
        scale_weights(p + r * KV_BLOCK, scales, seen[r], n_groups * VALUE_GROUP);
        quantize_into(p8, r, p + r * KV_BLOCK, n_groups * VALUE_GROUP, KV_BLOCK, VALUE_GROUP);
    }
    Product product = {.y = o, .stride = b->width, .x = p8, .columns = KV_BLOCK, .n_tokens = rows,
                       .w = {.tiles = (const uint8_t *)b->values,
                             .next_rows = next_rows, .next_group = LANES * VALUE_GROUP,
                             .n_rows = b->width, .n_groups = n_groups, .group_size = VALUE_GROUP,
                             .ahead = (const uint8_t *)b->values + b->next,
                             .ahead_bytes = b->next ? next_rows : 0}};
    matmul_int8_tiles(ENCODING_INT8, &product, 0);
}
