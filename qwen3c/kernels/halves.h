/* int8 codes whose scale is stored in fp16: those of weights, keys and values. */

/* halves = the scales of LANES rows as fp16; back = halves as float32. A scale so small that the row's max
   would lie more than half a step beyond code 127 becomes the next fp16 up. */
static void round_scales(uint16_t *halves, float *back, const float *scales, const float *max) {
    f32_store_f16(halves, f32_load(scales));
    f32_store(back, f32_load_f16(halves));
    for (size_t r = 0; r < LANES; r++)
        if (max[r] > 127.5f * back[r]) halves[r]++;
    f32_store(back, f32_load_f16(halves));
}

/* The codes of a vector of values for their scale. */
INLINE f32x16 codes_of(f32x16 x, float scale) {
    if (!(scale > 0)) return f32_set(0);
    return f32_max(f32_set(-127), f32_min(f32_set(127), f32_round(f32_div(x, f32_set(scale)))));
}

/* codes (PADDED(n)) of a key or value; returns its scale */
static uint16_t quantize_head(int8_t *codes, const float *x, size_t n) {
    float max[LANES] = {largest_magnitude(x, n)}, scales[LANES] = {max[0] / 127.0f}, back[LANES];
    uint16_t halves[LANES];
    if (!(max[0] < INFINITY)) max[0] = 0, scales[0] = NAN;
    round_scales(halves, back, scales, max);
    for (size_t i = 0; i < n; i += LANES)
        f32_store_i8(codes + i, codes_of(load_left(x + i, n - i, 0), back[0]));
    return halves[0];
}
