/* Codes of fewer than 8 bits, and products with them: a tile's codes become int8 in the order of ENCODING_INT8,
   the rest is the arithmetic of int8. */

/* Codes of a tile as int8 (group_size / 4, LANES, 4). */
INLINE void unpack_tile(const Encoding encoding, int8_t *codes, const uint8_t *tile, const int8_t *codebook,
                        size_t group_size) {
    enum { BLOCK = 4 * LANES };  /* 4 columns */
    const uint8_t *high = tile + LANES * group_size / 2;
    for (size_t c = 0; c < group_size / 8; c++)
        for (size_t i = 0; i < BLOCK; i++) {
            int byte = tile[c * BLOCK + i], low = byte & 15, upper = byte >> 4;
            if (encoding == ENCODING_INT4) {
                low = codebook[low];
                upper = codebook[upper];
            } else {
                int crumbs = high[c / 2 * BLOCK + i] >> c % 2 * 4;
                low += (crumbs & 3) * 16 - 32;
                upper += (crumbs >> 2 & 3) * 16 - 32;
            }
            codes[2 * c * BLOCK + i] = (int8_t)low;
            codes[(2 * c + 1) * BLOCK + i] = (int8_t)upper;
        }
}

/* Where a tile's codes are as int8: in place, or in `room` (MAX_GROUP * LANES) after they were unpacked. */
#define MAX_GROUP 256
INLINE const int8_t *tile_codes(const Encoding encoding, int8_t *room, const uint8_t *tile,
                                const int8_t *codebook, size_t group_size) {
    if (encoding == ENCODING_INT8) return (const int8_t *)tile;
    unpack_tile(encoding, room, tile, codebook, group_size);
    return room;
}

/* The code at a row and column of a tile. */
INLINE int code_at(const Encoding encoding, const uint8_t *tile, const int8_t *codebook, size_t group_size,
                   size_t row, size_t column) {
    size_t lane = row * 4 + column % 4;
    if (encoding == ENCODING_INT8) return ((const int8_t *)tile)[column / 4 * (LANES * 4) + lane];
    int nibble = tile[column / 8 * (LANES * 4) + lane] >> column / 4 % 2 * 4 & 15;
    if (encoding == ENCODING_INT4) return codebook[nibble];
    int crumb = tile[LANES * group_size / 2 + column / 16 * (LANES * 4) + lane] >> column / 4 % 4 * 2 & 3;
    return nibble + crumb * 16 - 32;
}

/* T tokens from `token` on times one tile row. */
INLINE void matmul_codes_block(const Encoding encoding, const size_t T, float *y, size_t stride,
                               const Int8Rows *x, const uint8_t *tiles, size_t n_rows, size_t columns,
                               size_t group_size, size_t token) {
    const int8_t *codebook = (const int8_t *)tiles;
    int8_t room[MAX_GROUP * LANES];
    size_t n_groups = columns / group_size;
    f32x16 sum[4];
    UNROLL for (size_t t = 0; t < T; t++) sum[t] = f32_set(0);
    tiles += codebook_bytes(encoding);
    for (size_t g = 0; g < n_groups; g++, tiles += tile_bytes(encoding, group_size)) {
        const int8_t *codes = tile_codes(encoding, room, tiles, codebook, group_size);
        f32x16 scale = f32_load_f16((const uint16_t *)(tiles + code_bytes(encoding, group_size)));
        UNROLL for (size_t t = 0; t < T; t++) {
            const int8_t *a = x->codes + (token + t) * columns + g * group_size;
            size_t group = (token + t) * n_groups + g;
            i32x16 dot = dot_start(x->sums[group]);
            for (size_t c = 0; c < group_size; c += 4)
                dot = dot_4(dot, codes_load(codes + c * LANES), activations_load(a + c));
            sum[t] = f32_fma(f32_from_i32(dot), f32_mul(scale, f32_set(x->scales[group])), sum[t]);
        }
    }
    UNROLL for (size_t t = 0; t < T; t++) store_left(y + t * stride, sum[t], n_rows);
}

INLINE void matmul_codes(const Encoding encoding, float *y, size_t stride, const Int8Rows *x, size_t n_tokens,
                         const uint8_t *tiles, size_t n_rows, size_t columns, size_t group_size) {
    for (size_t row = 0; row < n_rows; row += LANES, tiles += tile_row_bytes(encoding, columns, group_size)) {
        size_t t = 0, left = n_rows - row;
        for (; t + 4 <= n_tokens; t += 4)
            matmul_codes_block(encoding, 4, y + t * stride + row, stride, x, tiles, left, columns,
                               group_size, t);
        for (; t < n_tokens; t++)
            matmul_codes_block(encoding, 1, y + t * stride + row, stride, x, tiles, left, columns,
                               group_size, t);
    }
}

static void matmul_int4(float *y, size_t stride, const Int8Rows *x, size_t n_tokens, const uint8_t *tiles,
                        size_t n_rows, size_t columns, size_t group_size) {
    matmul_codes(ENCODING_INT4, y, stride, x, n_tokens, tiles, n_rows, columns, group_size);
}

static void matmul_int6(float *y, size_t stride, const Int8Rows *x, size_t n_tokens, const uint8_t *tiles,
                        size_t n_rows, size_t columns, size_t group_size) {
    matmul_codes(ENCODING_INT6, y, stride, x, n_tokens, tiles, n_rows, columns, group_size);
}
