/* What the benchmark asks for: how fast the instruction set multiplies at most. */

static size_t int8_peak(size_t rounds) {
    int8_t ones[4 * LANES];
    memset(ones, 1, sizeof ones);
    __asm__("" : "+m"(ones));  /* hides the values from the compiler */
    i8x64 w = codes_load(ones);
    i8x4 x = activations_load(ones);
    i32x16 dot[PEAK_DOTS];
    UNROLL for (size_t i = 0; i < PEAK_DOTS; i++) dot[i] = dot_start(128 * 4 * (int32_t)rounds);
    for (size_t round = 0; round < rounds; round++)
        UNROLL for (size_t i = 0; i < PEAK_DOTS; i++) {
            OPAQUE(x);  /* or the compiler would compute the equal products only once */
            dot[i] = dot_4(dot[i], w, x);
        }
    size_t count = 0;
    for (size_t i = 0; i < PEAK_DOTS; i++) count += (size_t)f32_sum_lanes(f32_from_i32(dot[i]));
    return count;
}
