/* The spec: 16 lanes as 16 numbers, one IEEE operation at a time, no intrinsics. */
#define ISA scalar
#include <math.h>
#include <string.h>

#include "kernels.h"

typedef struct { float lane[LANES]; } f32x16;
typedef struct { int32_t lane[LANES]; } i32x16;
typedef struct { int8_t code[4 * LANES]; } i8x64;  /* (16 rows, 4 columns) */
typedef i8x64 u6x64;                       /* the same of codes 0..63 */
typedef struct { int8_t code[4]; } i8x4;    /* 4 activations, for every row */

#define EACH_LANE(expression) for (int i = 0; i < LANES; i++) r.lane[i] = (expression); return r

static inline f32x16 f32_set(float a) { f32x16 r; EACH_LANE(a); }
static inline f32x16 f32_load(const float *p) { f32x16 r; EACH_LANE(p[i]); }
static inline void f32_store(float *p, f32x16 a) { memcpy(p, a.lane, sizeof a.lane); }
static inline f32x16 f32_add(f32x16 a, f32x16 b) { f32x16 r; EACH_LANE(a.lane[i] + b.lane[i]); }
static inline f32x16 f32_sub(f32x16 a, f32x16 b) { f32x16 r; EACH_LANE(a.lane[i] - b.lane[i]); }
static inline f32x16 f32_mul(f32x16 a, f32x16 b) { f32x16 r; EACH_LANE(a.lane[i] * b.lane[i]); }
static inline f32x16 f32_div(f32x16 a, f32x16 b) { f32x16 r; EACH_LANE(a.lane[i] / b.lane[i]); }
static inline f32x16 f32_max(f32x16 a, f32x16 b) {
    f32x16 r; EACH_LANE(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]);
}
static inline f32x16 f32_min(f32x16 a, f32x16 b) {
    f32x16 r; EACH_LANE(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]);
}
static inline f32x16 f32_abs(f32x16 a) { f32x16 r; EACH_LANE(fabsf(a.lane[i])); }
/* The larger of two magnitudes (sign bits clear); a NaN counts as the largest. (f32_max drops a NaN.) */
static inline float larger_magnitude(float a, float b) { return a > b || a != a ? a : b; }
static inline f32x16 f32_max_magnitude(f32x16 a, f32x16 b) {
    f32x16 r; EACH_LANE(larger_magnitude(a.lane[i], b.lane[i]));
}
static inline f32x16 f32_fma(f32x16 a, f32x16 b, f32x16 c) {
    f32x16 r; EACH_LANE(fmaf(a.lane[i], b.lane[i], c.lane[i]));
}

/* The one tree: lane i and lane i + 8, then + 4, + 2, + 1. */
static inline float f32_sum_lanes(f32x16 a) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) a.lane[i] += a.lane[i + width];
    return a.lane[0];
}
static inline float f32_max_lanes(f32x16 a) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++)
            a.lane[i] = a.lane[i] > a.lane[i + width] ? a.lane[i] : a.lane[i + width];
    return a.lane[0];
}
static inline float f32_max_magnitude_lanes(f32x16 a) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) a.lane[i] = larger_magnitude(a.lane[i], a.lane[i + width]);
    return a.lane[0];
}

/* adding and taking away 1.5 * 2^23 rounds |x| < 2^22 to an integer, ties to even */
static inline f32x16 f32_round(f32x16 a) { f32x16 r; EACH_LANE((a.lane[i] + 12582912.0f) - 12582912.0f); }
static inline f32x16 f32_from_i32(i32x16 a) { f32x16 r; EACH_LANE((float)a.lane[i]); }

static inline f32x16 f32_power_of_2(f32x16 n) {  /* n integer, -126..127; a NaN gives any number */
    f32x16 r;
    for (int i = 0; i < LANES; i++) {
        uint32_t bits = n.lane[i] == n.lane[i] ? (uint32_t)((int32_t)n.lane[i] + 127) << 23 : 0;
        memcpy(&r.lane[i], &bits, 4);
    }
    return r;
}

static inline float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff, bits;
    if (magnitude >= 0x7c00) bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    else if (magnitude >= 0x400) bits = sign | (magnitude + (112 << 10)) << 13;
    else {  /* subnormal: exact in float */
        float value = (float)magnitude * 0x1p-24f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t float_to_half(float value) {  /* round to nearest even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    float magnitude = fabsf(value);
    if (magnitude != magnitude) return sign | 0x7e00;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    if (magnitude < 0x1p-14f) {  /* subnormal: adding 0.5 rounds to units of 2^-24 */
        float rounded = magnitude + 0.5f;
        memcpy(&bits, &rounded, 4);
        return sign | (uint16_t)(bits - 0x3f000000);
    }
    bits &= 0x7fffffff;
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t)((bits >> 13) - (112 << 10));
}

static inline f32x16 f32_load_f16(const uint16_t *p) { f32x16 r; EACH_LANE(half_to_float(p[i])); }
static inline void f32_store_f16(uint16_t *p, f32x16 a) {
    for (int i = 0; i < LANES; i++) p[i] = float_to_half(a.lane[i]);
}
static inline void f32_store_i8(int8_t *p, f32x16 a) {
    for (int i = 0; i < LANES; i++) p[i] = (int8_t)a.lane[i];
}

static inline i8x64 codes_load(const int8_t *p) { i8x64 r; memcpy(r.code, p, sizeof r.code); return r; }
static inline i8x4 activations_load(const int8_t *p) { i8x4 r; memcpy(r.code, p, 4); return r; }
#define OPAQUE(x) __asm__("" : "+m"(x))
static inline i32x16 dot_start(int32_t sum) { (void)sum; i32x16 r; EACH_LANE(0); }
static inline i32x16 dot_add(i32x16 a, i32x16 b) { i32x16 r; EACH_LANE(a.lane[i] + b.lane[i]); }

/* dot[r] += sum over 4 columns of w[r][j] * x[j] */
static inline i32x16 dot_4(i32x16 dot, i8x64 w, i8x4 x) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) dot.lane[i] += w.code[4 * i + j] * x.code[j];
    return dot;
}

#define EACH_CODE(expression) for (int i = 0; i < 4 * LANES; i++) r.code[i] = (int8_t)(expression); return r
static inline i32x16 i32_set(int32_t a) { i32x16 r; EACH_LANE(a); }
static inline u6x64 u6_load(const uint8_t *p) { u6x64 r; memcpy(r.code, p, sizeof r.code); return r; }
static inline void u6_store_centred(int8_t *p, u6x64 a) {  /* as codes -32..31 */
    for (int i = 0; i < 4 * LANES; i++) p[i] = (int8_t)(a.code[i] - 32);
}
static inline u6x64 u6_codebook(const int8_t *codebook) { u6x64 r; EACH_CODE((codebook[i % 16] + 32) & 63); }
static inline u6x64 u6_look_up(u6x64 codebook, u6x64 index) {
    u6x64 r; EACH_CODE(codebook.code[index.code[i]]);
}
/* the low or the high 4 bits of every byte */
static inline u6x64 u6_nibbles(u6x64 a, int high) { u6x64 r; EACH_CODE((uint8_t)a.code[i] >> 4 * high & 15); }
/* bits 2 k and 2 k + 1 of b above the 4 bits of a */
static inline u6x64 u6_join(u6x64 a, u6x64 b, int k) {
    u6x64 r; EACH_CODE(a.code[i] | ((uint8_t)b.code[i] >> 2 * k & 3) << 4);
}
/* 8 columns of codes 0..63: 4 are added to one dot product, 4 to another, or all 8 to the first */
static inline void dot_8(i32x16 *one, i32x16 *other, const u6x64 *w, i8x4 x, i8x4 y) {
    *one = dot_4(*one, w[0], x);
    *other = dot_4(*other, w[1], y);
}

/* column j of a (16 rows, 4 columns) block of codes */
static inline f32x16 codes_column(const int8_t *p, int j) { f32x16 r; EACH_LANE((float)p[4 * i + j]); }

#define MATMUL_TILES 1
#define MATMUL_TOKENS 1
#define ATTEND_QUERIES 1
#define ATTEND_VECTORS 1
#define PEAK_DOTS 1
#include "body.h"
