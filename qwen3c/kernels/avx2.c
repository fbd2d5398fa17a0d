/* AVX2 with FMA and F16C (Haswell, Zen and later). vpmaddubsw takes one operand unsigned and saturates at 16
   bits: |w| * (x with w's sign) is the same product; 2 * 128 * 127 = 32,512 fits, so nothing is ever cut. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define ISA avx2
#include "lanes_avx2.h"

typedef struct { __m256i low, high, low_abs, high_abs; } i8x64;

static inline i8x64 codes_load(const int8_t *p) {
    __m256i low = _mm256_loadu_si256((const __m256i *)p);
    __m256i high = _mm256_loadu_si256((const __m256i *)(p + 32));
    return (i8x64){low, high, _mm256_abs_epi8(low), _mm256_abs_epi8(high)};
}
static inline i32x16 dot_start(int32_t sum) {
    (void)sum;
    return BOTH(i32x16, _mm256_setzero_si256(), _mm256_setzero_si256());
}
static inline __m256i dot_half(__m256i dot, __m256i w, __m256i w_abs, __m256i x) {
    __m256i pairs = _mm256_maddubs_epi16(w_abs, _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(dot, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline i32x16 dot_4(i32x16 dot, i8x64 w, i8x4 x) {
    return BOTH(i32x16, dot_half(dot.low, w.low, w.low_abs, x), dot_half(dot.high, w.high, w.high_abs, x));
}

/* A code 0..63 is unsigned as it is: 4 * 63 * 127 = 32,004 fits in 16 bits, so two products of pairs are
   added before they are widened. */
static inline __m256i dot_8_half(__m256i dot, __m256i v, __m256i w, __m256i x, __m256i y) {
    __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(v, x), _mm256_maddubs_epi16(w, y));
    return _mm256_add_epi32(dot, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline void dot_8(i32x16 *one, i32x16 *other, const u6x64 *w, i8x4 x, i8x4 y) {
    (void)other;
    *one = BOTH(i32x16, dot_8_half(one->low, w[0].low, w[1].low, x, y),
                dot_8_half(one->high, w[0].high, w[1].high, x, y));
}

#define MATMUL_TILES 1
#define MATMUL_TOKENS 3
#define ATTEND_QUERIES 2
#define ATTEND_VECTORS 2
#define PEAK_DOTS 4
#include "body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
