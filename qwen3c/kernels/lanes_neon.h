/* What the NEON files share: 16 lanes in four 128-bit registers. An including file adds dot_quarter. */
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "kernels.h"

typedef float32x4x4_t f32x16;
typedef int32x4x4_t i32x16;
typedef int8x16x4_t i8x64;
typedef int8x16x4_t u6x64;
typedef int8x16_t i8x4;  /* 4 activations, four times */

#define EACH_QUARTER(expression) for (int i = 0; i < 4; i++) r.val[i] = (expression); return r

static inline f32x16 f32_set(float a) { f32x16 r; EACH_QUARTER(vdupq_n_f32(a)); }
static inline f32x16 f32_load(const float *p) { f32x16 r; EACH_QUARTER(vld1q_f32(p + 4 * i)); }
static inline void f32_store(float *p, f32x16 a) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.val[i]);
}
static inline f32x16 f32_add(f32x16 a, f32x16 b) { f32x16 r; EACH_QUARTER(vaddq_f32(a.val[i], b.val[i])); }
static inline f32x16 f32_sub(f32x16 a, f32x16 b) { f32x16 r; EACH_QUARTER(vsubq_f32(a.val[i], b.val[i])); }
static inline f32x16 f32_mul(f32x16 a, f32x16 b) { f32x16 r; EACH_QUARTER(vmulq_f32(a.val[i], b.val[i])); }
static inline f32x16 f32_div(f32x16 a, f32x16 b) { f32x16 r; EACH_QUARTER(vdivq_f32(a.val[i], b.val[i])); }
static inline f32x16 f32_max(f32x16 a, f32x16 b) { f32x16 r; EACH_QUARTER(vmaxq_f32(a.val[i], b.val[i])); }
static inline f32x16 f32_min(f32x16 a, f32x16 b) { f32x16 r; EACH_QUARTER(vminq_f32(a.val[i], b.val[i])); }
static inline f32x16 f32_abs(f32x16 a) { f32x16 r; EACH_QUARTER(vabsq_f32(a.val[i])); }
/* vmaxq_f32 of a NaN and a number is the NaN already. */
static inline f32x16 f32_max_magnitude(f32x16 a, f32x16 b) { return f32_max(a, b); }
static inline f32x16 f32_fma(f32x16 a, f32x16 b, f32x16 c) {
    f32x16 r; EACH_QUARTER(vfmaq_f32(c.val[i], a.val[i], b.val[i]));
}
static inline float f32_sum_lanes(f32x16 a) {
    float32x4_t b = vaddq_f32(vaddq_f32(a.val[0], a.val[2]), vaddq_f32(a.val[1], a.val[3]));
    float32x2_t c = vadd_f32(vget_low_f32(b), vget_high_f32(b));
    return vget_lane_f32(c, 0) + vget_lane_f32(c, 1);
}
static inline float f32_max_lanes(f32x16 a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.val[0], a.val[2]), vmaxq_f32(a.val[1], a.val[3])));
}
static inline float f32_max_magnitude_lanes(f32x16 a) { return f32_max_lanes(a); }
static inline f32x16 f32_round(f32x16 a) { f32x16 r; EACH_QUARTER(vrndnq_f32(a.val[i])); }
static inline f32x16 f32_from_i32(i32x16 a) { f32x16 r; EACH_QUARTER(vcvtq_f32_s32(a.val[i])); }
static inline f32x16 f32_power_of_2(f32x16 n) {
    f32x16 r;
    EACH_QUARTER(
        vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.val[i]), vdupq_n_s32(127)), 23)));
}
static inline f32x16 f32_load_f16(const uint16_t *p) {
    f32x16 r;
    EACH_QUARTER(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
}
static inline void f32_store_f16(uint16_t *p, f32x16 a) {
    for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.val[i])));
}
static inline void f32_store_i8(int8_t *p, f32x16 a) {
    int16x8_t low = vcombine_s16(vqmovn_s32(vcvtq_s32_f32(a.val[0])), vqmovn_s32(vcvtq_s32_f32(a.val[1])));
    int16x8_t high = vcombine_s16(vqmovn_s32(vcvtq_s32_f32(a.val[2])), vqmovn_s32(vcvtq_s32_f32(a.val[3])));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}

static inline i8x64 codes_load(const int8_t *p) { i8x64 r; EACH_QUARTER(vld1q_s8(p + 16 * i)); }
static inline i8x4 activations_load(const int8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(x));
}
#define OPAQUE(x) __asm__("" : "+w"(x))
static inline i32x16 dot_start(int32_t sum) { (void)sum; i32x16 r; EACH_QUARTER(vdupq_n_s32(0)); }
static inline i32x16 dot_add(i32x16 a, i32x16 b) { i32x16 r; EACH_QUARTER(vaddq_s32(a.val[i], b.val[i])); }
static inline f32x16 codes_column(const int8_t *p, int j) {
    f32x16 r;
    EACH_QUARTER(vcvtq_f32_s32(vshrq_n_s32(
        vshlq_s32(vreinterpretq_s32_s8(vld1q_s8(p + 16 * i)), vdupq_n_s32(24 - 8 * j)), 24)));
}

static inline int32x4_t dot_quarter(int32x4_t dot, int8x16_t w, int8x16_t x);
static inline i32x16 dot_4(i32x16 dot, i8x64 w, i8x4 x) {
    i32x16 r; EACH_QUARTER(dot_quarter(dot.val[i], w.val[i], x));
}

static inline i32x16 i32_set(int32_t a) { i32x16 r; EACH_QUARTER(vdupq_n_s32(a)); }
static inline u6x64 u6_load(const uint8_t *p) { return codes_load((const int8_t *)p); }
static inline void u6_store_centred(int8_t *p, u6x64 a) {
    for (int i = 0; i < 4; i++) vst1q_s8(p + 16 * i, vsubq_s8(a.val[i], vdupq_n_s8(32)));
}
static inline u6x64 u6_codebook(const int8_t *codebook) {
    u6x64 r; EACH_QUARTER(vandq_s8(vaddq_s8(vld1q_s8(codebook), vdupq_n_s8(32)), vdupq_n_s8(63)));
}
static inline u6x64 u6_look_up(u6x64 codebook, u6x64 index) {
    u6x64 r; EACH_QUARTER(vqtbl1q_s8(codebook.val[0], vreinterpretq_u8_s8(index.val[i])));
}
static inline u6x64 u6_nibbles(u6x64 a, int high) {
    u6x64 r;
    EACH_QUARTER(high ? vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(a.val[i]), 4))
                      : vandq_s8(a.val[i], vdupq_n_s8(15)));
}
static inline u6x64 u6_join(u6x64 a, u6x64 b, int k) {
    int8x16_t left = vdupq_n_s8((int8_t)(4 - 2 * k));  /* to the right where it is negative */
    u6x64 r;
    EACH_QUARTER(vorrq_s8(a.val[i], vandq_s8(vdupq_n_s8(48), vreinterpretq_s8_u8(
        vshlq_u8(vreinterpretq_u8_s8(b.val[i]), left)))));
}
static inline void dot_8(i32x16 *one, i32x16 *other, const u6x64 *w, i8x4 x, i8x4 y) {
    *one = dot_4(*one, w[0], x);
    *other = dot_4(*other, w[1], y);
}

#define MATMUL_TILES 1
#define MATMUL_TOKENS 4
#define ATTEND_QUERIES 2
#define ATTEND_VECTORS 2
#define PEAK_DOTS 4
