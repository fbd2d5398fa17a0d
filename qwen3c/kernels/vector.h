/* What the kernels make of an instruction set's vectors: a load and a store for the end of a row, and exp. */
#include <float.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

static f32x16 load_part(const float *x, size_t n, float fill) {
    float lane[LANES];
    for (size_t i = 0; i < LANES; i++) lane[i] = i < n ? x[i] : fill;
    return f32_load(lane);
}

static void store_part(float *y, f32x16 a, size_t n) {
    float lane[LANES];
    f32_store(lane, a);
    memcpy(y, lane, n * sizeof *y);
}

/* Load the next vector of a row that has `left` values left. Lanes past the end are `fill`; memory past
   the end is not read. */
INLINE f32x16 load_left(const float *x, size_t left, float fill) {
    return left < LANES ? load_part(x, left, fill) : f32_load(x);
}

/* Store the next vector of a row that has `left` values left; nothing is written past the end. */
INLINE void store_left(float *y, f32x16 a, size_t left) {
    if (left >= LANES) f32_store(y, a);
    else store_part(y, a, left);
}

/* exp x = 2^n exp r, n = round(x / ln 2), |r| <= ln 2 / 2: Taylor to degree 7, relative error below 1e-8.
   Below -87.7 the power of 2 has no normal exponent left and the result is exactly 0; a NaN stays one. */
INLINE f32x16 f32_exp(f32x16 x) {
    x = f32_min(f32_set(88.0f), f32_max(f32_set(-88.0f), x));  /* in this order a NaN passes */
    f32x16 n = f32_round(f32_mul(x, f32_set(1.44269504f)));
    f32x16 r = f32_fma(n, f32_set(-0.693145752f), x);  /* ln 2 in two parts; n times the first is exact */
    r = f32_fma(n, f32_set(-1.42860677e-6f), r);
    f32x16 y = f32_set(1.0f / 5040);
    y = f32_fma(y, r, f32_set(1.0f / 720));
    y = f32_fma(y, r, f32_set(1.0f / 120));
    y = f32_fma(y, r, f32_set(1.0f / 24));
    y = f32_fma(y, r, f32_set(1.0f / 6));
    y = f32_fma(y, r, f32_set(0.5f));
    y = f32_fma(y, r, f32_set(1.0f));
    y = f32_fma(y, r, f32_set(1.0f));
    return f32_mul(y, f32_power_of_2(n));
}
