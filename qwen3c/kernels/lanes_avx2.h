/* What AVX2 and AVX-VNNI share: a vector is two 256-bit registers. Included by avx2.c and avxvnni.c. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "lanes_x86.h"

typedef struct { __m256 low, high; } f32x16;
typedef struct { __m256i low, high; } i32x16;
typedef struct { __m256i low, high; } u6x64;
typedef __m256i i8x4;  /* 4 activations, eight times */

#define BOTH(type, low, high) ((type){(low), (high)})

static inline f32x16 f32_set(float a) { return BOTH(f32x16, _mm256_set1_ps(a), _mm256_set1_ps(a)); }
static inline f32x16 f32_load(const float *p) {
    return BOTH(f32x16, _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
}
static inline void f32_store(float *p, f32x16 a) {
    _mm256_storeu_ps(p, a.low); _mm256_storeu_ps(p + 8, a.high);
}
static inline f32x16 f32_add(f32x16 a, f32x16 b) {
    return BOTH(f32x16, _mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high));
}
static inline f32x16 f32_sub(f32x16 a, f32x16 b) {
    return BOTH(f32x16, _mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high));
}
static inline f32x16 f32_mul(f32x16 a, f32x16 b) {
    return BOTH(f32x16, _mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high));
}
static inline f32x16 f32_div(f32x16 a, f32x16 b) {
    return BOTH(f32x16, _mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high));
}
static inline f32x16 f32_max(f32x16 a, f32x16 b) {
    return BOTH(f32x16, _mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high));
}
static inline f32x16 f32_min(f32x16 a, f32x16 b) {
    return BOTH(f32x16, _mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high));
}
static inline f32x16 f32_abs(f32x16 a) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return BOTH(f32x16, _mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high));
}
/* As integers: the bits of magnitudes are in the order of their values, those of a NaN above all. */
static inline f32x16 f32_max_magnitude(f32x16 a, f32x16 b) {
    __m256i low = _mm256_max_epi32(_mm256_castps_si256(a.low), _mm256_castps_si256(b.low));
    __m256i high = _mm256_max_epi32(_mm256_castps_si256(a.high), _mm256_castps_si256(b.high));
    return BOTH(f32x16, _mm256_castsi256_ps(low), _mm256_castsi256_ps(high));
}
static inline f32x16 f32_fma(f32x16 a, f32x16 b, f32x16 c) {
    return BOTH(f32x16, _mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high));
}
static inline float f32_sum_lanes(f32x16 a) { return sum_of_8(_mm256_add_ps(a.low, a.high)); }
static inline float f32_max_lanes(f32x16 a) { return max_of_8(_mm256_max_ps(a.low, a.high)); }
static inline float f32_max_magnitude_lanes(f32x16 a) {
    return max_magnitude_of_8(_mm256_max_epi32(_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)));
}
static inline f32x16 f32_round(f32x16 a) {
    return BOTH(f32x16, _mm256_round_ps(a.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                _mm256_round_ps(a.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline f32x16 f32_from_i32(i32x16 a) {
    return BOTH(f32x16, _mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high));
}
static inline __m256 power_of_2(__m256 n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
static inline f32x16 f32_power_of_2(f32x16 n) { return BOTH(f32x16, power_of_2(n.low), power_of_2(n.high)); }
static inline f32x16 f32_load_f16(const uint16_t *p) {
    return BOTH(f32x16, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8))));
}
static inline void f32_store_f16(uint16_t *p, f32x16 a) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.high, _MM_FROUND_TO_NEAREST_INT));
}
static inline void f32_store_i8(int8_t *p, f32x16 a) {
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high));
    words = _mm256_permute4x64_epi64(words, 0xd8);  /* packs works within 128-bit halves: 0 2 1 3 */
    _mm_storeu_si128(
        (__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

static inline i8x4 activations_load(const int8_t *p) {
    int32_t x; memcpy(&x, p, 4); return _mm256_set1_epi32(x);
}
#define OPAQUE(x) __asm__("" : "+x"(x))
static inline i32x16 dot_add(i32x16 a, i32x16 b) {
    return BOTH(i32x16, _mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high));
}
static inline __m256 column(__m256i codes, __m128i shift) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sll_epi32(codes, shift), 24));
}
static inline f32x16 codes_column(const int8_t *p, int j) {
    __m128i shift = _mm_cvtsi32_si128(24 - 8 * j);
    return BOTH(f32x16, column(_mm256_loadu_si256((const __m256i *)p), shift),
                column(_mm256_loadu_si256((const __m256i *)(p + 32)), shift));
}

static inline i32x16 i32_set(int32_t a) { return BOTH(i32x16, _mm256_set1_epi32(a), _mm256_set1_epi32(a)); }
static inline u6x64 u6_load(const uint8_t *p) {
    return BOTH(u6x64, _mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32)));
}
static inline void u6_store_centred(int8_t *p, u6x64 a) {
    __m256i centre = _mm256_set1_epi8(32);
    _mm256_storeu_si256((__m256i *)p, _mm256_sub_epi8(a.low, centre));
    _mm256_storeu_si256((__m256i *)(p + 32), _mm256_sub_epi8(a.high, centre));
}
static inline u6x64 u6_codebook(const int8_t *codebook) {
    __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)codebook));
    entries = _mm256_and_si256(_mm256_add_epi8(entries, _mm256_set1_epi8(32)), _mm256_set1_epi8(63));
    return BOTH(u6x64, entries, entries);
}
static inline u6x64 u6_look_up(u6x64 codebook, u6x64 index) {
    return BOTH(u6x64, _mm256_shuffle_epi8(codebook.low, index.low),
                _mm256_shuffle_epi8(codebook.low, index.high));
}
static inline u6x64 u6_nibbles(u6x64 a, int high) {
    __m256i mask = _mm256_set1_epi8(15);
    return BOTH(u6x64, _mm256_and_si256(high ? _mm256_srli_epi16(a.low, 4) : a.low, mask),
                _mm256_and_si256(high ? _mm256_srli_epi16(a.high, 4) : a.high, mask));
}
static inline __m256i u6_join_half(__m256i a, __m256i b, int k) {
    __m256i at = k < 2 ? _mm256_slli_epi16(b, 4 - 2 * k) : _mm256_srli_epi16(b, 2 * k - 4);
    return _mm256_or_si256(a, _mm256_and_si256(at, _mm256_set1_epi8(48)));
}
static inline u6x64 u6_join(u6x64 a, u6x64 b, int k) {
    return BOTH(u6x64, u6_join_half(a.low, b.low, k), u6_join_half(a.high, b.high, k));
}
