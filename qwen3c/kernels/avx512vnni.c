/* AVX-512 with VNNI (Ice Lake, Sapphire Rapids, Zen 4 and later). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
#define ISA avx512vnni
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "lanes_avx512.h"
#include "body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
