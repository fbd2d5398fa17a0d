/* Matrices as float32: products with float activations, and rows of the embedding. */

/* y (n_tokens, n_rows) = x w^T, x (n_tokens, columns) */
typedef struct {
    float *y;
    size_t stride;  /* floats from a row of y to the next */
    const float *x;
    size_t n_tokens;
    const uint8_t *matrix;
    size_t n_rows, columns, group_size;
} FloatProduct;

/* T tokens from `token` on times the tile row of rows `row` and after. */
INLINE void matmul_float32_block(const Encoding encoding, const size_t T, const FloatProduct *p, size_t row,
                                 size_t token) {
    size_t columns = p->columns, group_size = p->group_size, stride = p->stride;
    const uint8_t *tiles = p->matrix + row / LANES * tile_row_bytes(encoding, columns, group_size);
    const int8_t *codebook = (const int8_t *)tiles;
    const float *x = p->x + token * columns;
    float *y = p->y + token * stride + row;
    int8_t room[MAX_GROUP * LANES];
    f32x16 sum[4];
    UNROLL for (size_t t = 0; t < T; t++) sum[t] = f32_set(0);
    tiles += codebook_bytes(encoding);
    for (size_t g = 0; g < columns / group_size; g++, tiles += tile_bytes(encoding, group_size)) {
        const int8_t *codes = tile_codes(encoding, room, tiles, codebook, group_size);
        f32x16 part[4];
        UNROLL for (size_t t = 0; t < T; t++) part[t] = f32_set(0);
        for (size_t c = 0; c < group_size; c++) {
            f32x16 code = codes_column(codes + c / 4 * (LANES * 4), (int)(c % 4));
            UNROLL for (size_t t = 0; t < T; t++)
                part[t] = f32_fma(code, f32_set(x[t * columns + g * group_size + c]), part[t]);
        }
        f32x16 scale = f32_load_f16((const uint16_t *)(tiles + code_bytes(encoding, group_size)));
        UNROLL for (size_t t = 0; t < T; t++) sum[t] = f32_fma(scale, part[t], sum[t]);
    }
    UNROLL for (size_t t = 0; t < T; t++) store_left(y + t * stride, sum[t], p->n_rows - row);
}

INLINE void matmul_float32_of(const Encoding encoding, const FloatProduct *p) {
    for (size_t row = 0; row < p->n_rows; row += LANES) {
        size_t t = 0;
        for (; t + 4 <= p->n_tokens; t += 4) matmul_float32_block(encoding, 4, p, row, t);
        for (; t < p->n_tokens; t++) matmul_float32_block(encoding, 1, p, row, t);
    }
}

INLINE void dequantize_row_of(const Encoding encoding, float *y, const uint8_t *matrix, size_t row,
                              size_t columns, size_t group_size) {
    const uint8_t *tile = matrix + row / LANES * tile_row_bytes(encoding, columns, group_size);
    const int8_t *codebook = (const int8_t *)tile;
    tile += codebook_bytes(encoding);
    for (size_t g = 0; g < columns / group_size; g++, tile += tile_bytes(encoding, group_size)) {
        float scales[LANES];
        f32_store(scales, f32_load_f16((const uint16_t *)(tile + code_bytes(encoding, group_size))));
        for (size_t c = 0; c < group_size; c++)
            *y++ = scales[row % LANES] *
                   (float)code_at(encoding, tile, codebook, group_size, row % LANES, c);
    }
}

#define MATMUL_FLOAT32(name, encoding) \
    static void name(float *y, size_t stride, const float *x, size_t n_tokens, const uint8_t *tiles, \
                     size_t n_rows, size_t columns, size_t group_size) { \
        FloatProduct p = {y, stride, x, n_tokens, tiles, n_rows, columns, group_size}; \
        matmul_float32_of(encoding, &p); \
    }
MATMUL_FLOAT32(matmul_float32_int8, ENCODING_INT8)
MATMUL_FLOAT32(matmul_float32_int4, ENCODING_INT4)
MATMUL_FLOAT32(matmul_float32_int6, ENCODING_INT6)

#define DEQUANTIZE_ROW(name, encoding) \
    static void name(float *y, const uint8_t *matrix, size_t row, size_t columns, size_t group_size) { \
        dequantize_row_of(encoding, y, matrix, row, columns, group_size); \
    }
DEQUANTIZE_ROW(dequantize_row_int8, ENCODING_INT8)
DEQUANTIZE_ROW(dequantize_row_int4, ENCODING_INT4)
DEQUANTIZE_ROW(dequantize_row_int6, ENCODING_INT6)
