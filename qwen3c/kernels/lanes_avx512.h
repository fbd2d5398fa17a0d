/* The lanes of AVX-512 with VNNI: a vector is one register, and vpdpbusd multiplies 16 x 4 bytes and adds. It
   takes one operand unsigned: w + 128 = w xor 0x80, and sum (w + 128) x = sum w x + 128 sum x, so the
   accumulator starts at -128 sum x. */
#include "lanes_x86.h"

typedef __m512 f32x16;
typedef __m512i i32x16, i8x64, u6x64, i8x4;

static inline f32x16 f32_set(float a) { return _mm512_set1_ps(a); }
static inline f32x16 f32_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void f32_store(float *p, f32x16 a) { _mm512_storeu_ps(p, a); }
static inline f32x16 f32_add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
static inline f32x16 f32_sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
static inline f32x16 f32_mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
static inline f32x16 f32_div(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
static inline f32x16 f32_max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
static inline f32x16 f32_min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
static inline f32x16 f32_abs(f32x16 a) { return _mm512_abs_ps(a); }
/* As integers: the bits of magnitudes are in the order of their values, those of a NaN above all. */
static inline f32x16 f32_max_magnitude(f32x16 a, f32x16 b) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
static inline f32x16 f32_fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
static inline float f32_sum_lanes(f32x16 a) {
    return sum_of_8(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
}
static inline float f32_max_lanes(f32x16 a) {
    return max_of_8(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
}
static inline float f32_max_magnitude_lanes(f32x16 a) {
    __m512i bits = _mm512_castps_si512(a);
    return max_magnitude_of_8(
        _mm256_max_epi32(_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64(bits, 1)));
}
static inline f32x16 f32_round(f32x16 a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline f32x16 f32_from_i32(i32x16 a) { return _mm512_cvtepi32_ps(a); }
static inline f32x16 f32_power_of_2(f32x16 n) {
    __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}
static inline f32x16 f32_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline void f32_store_f16(uint16_t *p, f32x16 a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void f32_store_i8(int8_t *p, f32x16 a) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}

static inline i8x64 codes_load(const int8_t *p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
}
static inline i8x4 activations_load(const int8_t *p) {
    int32_t x; memcpy(&x, p, 4); return _mm512_set1_epi32(x);
}
#define OPAQUE(x) __asm__("" : "+v"(x))
static inline i32x16 dot_start(int32_t sum) { return _mm512_set1_epi32(-sum); }
static inline i32x16 dot_add(i32x16 a, i32x16 b) { return _mm512_add_epi32(a, b); }
/* As text: gcc (up to 14 at least) copies the accumulator before and after each of its own
   _mm512_dpbusd_epi32. */
static inline i32x16 dot_4(i32x16 dot, i8x64 w, i8x4 x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(dot) : "v"(w), "v"(x));
    return dot;
}
static inline f32x16 codes_column(const int8_t *p, int j) {
    __m512i up = _mm512_sll_epi32(_mm512_loadu_si512(p), _mm_cvtsi32_si128(24 - 8 * j));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(up, 24));
}

static inline i32x16 i32_set(int32_t a) { return _mm512_set1_epi32(a); }
static inline u6x64 u6_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
static inline void u6_store_centred(int8_t *p, u6x64 a) {
    _mm512_storeu_si512(p, _mm512_sub_epi8(a, _mm512_set1_epi8(32)));
}
static inline u6x64 u6_codebook(const int8_t *codebook) {
    __m512i entries = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)codebook));
    return _mm512_and_si512(_mm512_add_epi8(entries, _mm512_set1_epi8(32)), _mm512_set1_epi8(63));
}
static inline u6x64 u6_look_up(u6x64 codebook, u6x64 index) { return _mm512_shuffle_epi8(codebook, index); }
static inline u6x64 u6_nibbles(u6x64 a, int high) {
    return _mm512_and_si512(high ? _mm512_srli_epi16(a, 4) : a, _mm512_set1_epi8(15));
}
static inline u6x64 u6_join(u6x64 a, u6x64 b, int k) {
    __m512i at = k < 2 ? _mm512_slli_epi16(b, (unsigned)(4 - 2 * k) & 15)
                       : _mm512_srli_epi16(b, (unsigned)(2 * k - 4) & 15);
    return _mm512_or_si512(a, _mm512_and_si512(at, _mm512_set1_epi8(48)));
}
static inline void dot_8(i32x16 *one, i32x16 *other, const u6x64 *w, i8x4 x, i8x4 y) {
    *one = dot_4(*one, w[0], x);
    *other = dot_4(*other, w[1], y);
}

#define MATMUL_TILES 2
#define MATMUL_TOKENS 6
#define ATTEND_QUERIES 4
#define ATTEND_VECTORS 4
#define PEAK_DOTS 12
