/* int8 matrices as float32: products with float activations, and rows of the embedding. */

/* T tokens of float activations times one tile row. */
INLINE void matmul_float32_block(const size_t T, float *y, size_t stride, const float *x,
                                 const uint8_t *tiles, size_t n_rows, size_t columns, size_t group_size) {
    f32x16 sum[4];
    UNROLL for (size_t t = 0; t < T; t++) sum[t] = f32_set(0);
    for (size_t g = 0; g < columns / group_size; g++, tiles += TILE_BYTES(group_size)) {
        f32x16 part[4];
        UNROLL for (size_t t = 0; t < T; t++) part[t] = f32_set(0);
        for (size_t c = 0; c < group_size; c++) {
            f32x16 code = codes_column((const int8_t *)tiles + c / 4 * (LANES * 4), (int)(c % 4));
            UNROLL for (size_t t = 0; t < T; t++)
                part[t] = f32_fma(code, f32_set(x[t * columns + g * group_size + c]), part[t]);
        }
        f32x16 scale = f32_load_f16((const uint16_t *)(tiles + LANES * group_size));
        UNROLL for (size_t t = 0; t < T; t++) sum[t] = f32_fma(scale, part[t], sum[t]);
    }
    UNROLL for (size_t t = 0; t < T; t++) store_left(y + t * stride, sum[t], n_rows);
}

static void matmul_float32(float *y, size_t stride, const float *x, size_t n_tokens, const uint8_t *tiles,
                           size_t n_rows, size_t columns, size_t group_size) {
    size_t tile_row = columns / group_size * TILE_BYTES(group_size);
    for (size_t row = 0; row < n_rows; row += LANES, tiles += tile_row) {
        size_t t = 0, rows = n_rows - row;
        for (; t + 4 <= n_tokens; t += 4)
            matmul_float32_block(4, y + t * stride + row, stride, x + t * columns,
                                 tiles, rows, columns, group_size);
        for (; t < n_tokens; t++)
            matmul_float32_block(1, y + t * stride + row, stride, x + t * columns,
                                 tiles, rows, columns, group_size);
    }
}

static void dequantize_row(float *y, const uint8_t *matrix, size_t row, size_t columns, size_t group_size) {
    size_t n_groups = columns / group_size;
    const uint8_t *tile = matrix + row / LANES * n_groups * TILE_BYTES(group_size);
    for (size_t g = 0; g < n_groups; g++, tile += TILE_BYTES(group_size)) {
        float scales[LANES];
        f32_store(scales, f32_load_f16((const uint16_t *)(tile + LANES * group_size)));
        const int8_t *codes = (const int8_t *)tile + row % LANES * 4;
        for (size_t c = 0; c < group_size; c++)
            *y++ = scales[row % LANES] * (float)codes[c / 4 * (LANES * 4) + c % 4];
    }
}
