/* NEON of every 64-bit ARM (Raspberry Pi 4): a vector is four 128-bit registers; int8 products are widened to
   16 bits (2 * 128 * 127 fits) and added in pairs. */
#if defined(__aarch64__)
#define ISA neon
#include "lanes_neon.h"

static inline int32x4_t dot_quarter(int32x4_t dot, int8x16_t w, int8x16_t x) {
    int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
    return vaddq_s32(dot, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}

#include "body.h"
#endif
