/* The KV cache: a key and a value take their places in a block (the layouts are in kernels.h). */

static void store_kv_f32(char *keys, char *values, size_t index, const float *k, const float *v,
                         size_t head_dim) {
    float *key = (float *)keys + index / LANES * LANES * head_dim + index % LANES;
    for (size_t d = 0; d < head_dim; d++) key[d * LANES] = k[d];
    memcpy((float *)values + index * PADDED(head_dim), v, head_dim * sizeof *v);
}

static void store_kv_f16(char *keys, char *values, size_t index, const float *k, const float *v,
                         size_t head_dim) {
    uint16_t *key = (uint16_t *)keys + index / LANES * LANES * head_dim + index % LANES;
    uint16_t *value = (uint16_t *)values + index * PADDED(head_dim);
    for (size_t d = 0; d < head_dim; d += LANES) {
        uint16_t half[LANES];
        size_t left = head_dim - d;
        f32_store_f16(half, load_left(k + d, left, 0));
        for (size_t i = 0; i < LANES && i < left; i++) key[(d + i) * LANES] = half[i];
        f32_store_f16(value + d, load_left(v + d, left, 0));
    }
}

static void store_kv_i8(char *keys, char *values, size_t index, const float *k, const float *v,
                         size_t head_dim) {
    int8_t codes[MAX_HEAD_DIM];
    size_t width = PADDED(head_dim);
    char *tile = keys + index / LANES * TILE_BYTES(width);
    char *column = values + index / 4 * (LANES * 4) + index % 4;
    uint16_t scale = quantize_head(codes, k, head_dim);
    for (size_t d = 0; d < width; d += 4) memcpy(tile + d * LANES + index % LANES * 4, codes + d, 4);
    memcpy(tile + width * LANES + index % LANES * 2, &scale, 2);
    scale = quantize_head(codes, v, head_dim);
    for (size_t d = 0; d < width; d++) column[d / LANES * LANES * KV_BLOCK + d % LANES * 4] = codes[d];
    memcpy(values + KV_BLOCK * width + index * 2, &scale, 2);
}
