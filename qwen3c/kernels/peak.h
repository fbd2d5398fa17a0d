/* What the benchmark asks for: how fast the instruction set multiplies at most. */

#if TILE_MULTIPLIER
static size_t int8_peak(size_t rounds) {
    _Alignas(64) uint8_t ones[64 * LANES];
    _Alignas(64) int32_t dots[LANES * LANES];
    memset(ones, 1, sizeof ones);
    configure_tiles(LANES, 64);
    _tile_zero(0);
    _tile_loadd(ACTIVATIONS, ones, 64);
    _tile_loadd(WEIGHTS, ones, 64);
    for (size_t round = 0; round < rounds; round++) _tile_dpbssd(0, ACTIVATIONS, WEIGHTS);
    _tile_stored(0, dots, 4 * LANES);
    _tile_release();
    size_t count = 0;
    for (size_t i = 0; i < LANES * LANES; i++) count += (size_t)dots[i];
    return count;
}
#else
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
#endif
