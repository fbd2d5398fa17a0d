/* NEON with the dot product extension of ARMv8.2 (Raspberry Pi 5, Apple M1, Graviton 2 and later): sdot
   multiplies 4 x 4 signed bytes and adds. */
#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define ISA neon_dotprod
#include "lanes_neon.h"

static inline int32x4_t dot_quarter(int32x4_t dot, int8x16_t w, int8x16_t x) { return vdotq_s32(dot, w, x); }

#include "body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
