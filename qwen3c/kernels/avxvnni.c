/* AVX-VNNI (Alder Lake, N100, Zen 5 and later): vpdpbusd on 256-bit registers; the sign is handled as in
   avx512vnni.c. Built with QWEN3C_EMULATE_AVXVNNI the same code uses the AVX-512VL encoding of the
   instruction, which lets a machine with AVX-512 test everything here but the encoding. */
#if defined(__x86_64__)
#if defined(QWEN3C_EMULATE_AVXVNNI)
#define TARGET "avx2,fma,f16c,avx512f,avx512vl,avx512vnni"
#define DPBUSD "vpdpbusd"
#else
#define TARGET "avx2,fma,f16c,avxvnni"
#define DPBUSD "%{vex%} vpdpbusd"
#endif
#define PRAGMA(text) _Pragma(#text)
#define PUSH_TARGET(target_string) \
    PRAGMA(clang attribute push(__attribute__((target(target_string))), apply_to = function))
#define GCC_TARGET(target_string) PRAGMA(GCC target(target_string))
#if defined(__clang__)
PUSH_TARGET(TARGET)
#else
GCC_TARGET(TARGET)
#endif
#define ISA avxvnni
#include "lanes_avx2.h"

typedef u6x64 i8x64;

static inline i8x64 codes_load(const int8_t *p) {
    __m256i flip = _mm256_set1_epi8(-128);
    return (i8x64){_mm256_xor_si256(_mm256_loadu_si256((const __m256i *)p), flip),
                   _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(p + 32)), flip)};
}
static inline i32x16 dot_start(int32_t sum) {
    return BOTH(i32x16, _mm256_set1_epi32(-sum), _mm256_set1_epi32(-sum));
}
/* As text: gcc copies the accumulator before and after each of its own _mm256_dpbusd_epi32. */
static inline i32x16 dot_4(i32x16 dot, i8x64 w, i8x4 x) {
    __asm__(DPBUSD " %2, %1, %0" : "+x"(dot.low) : "x"(w.low), "x"(x));
    __asm__(DPBUSD " %2, %1, %0" : "+x"(dot.high) : "x"(w.high), "x"(x));
    return dot;
}

static inline void dot_8(i32x16 *one, i32x16 *other, const u6x64 *w, i8x4 x, i8x4 y) {
    *one = dot_4(*one, w[0], x);
    *other = dot_4(*other, w[1], y);
}

#define MATMUL_TILES 1
#define MATMUL_TOKENS 3
#define ATTEND_QUERIES 2
#define ATTEND_VECTORS 2
#define PEAK_DOTS 6
#include "body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
