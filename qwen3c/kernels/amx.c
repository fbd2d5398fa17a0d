/* AMX (Sapphire Rapids and later): the lanes of AVX-512, and products of many rows by the tile multiplier. */
#include "kernels.h"
#if HAVE_AMX
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8")
#endif
#define ISA amx
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "lanes_avx512.h"
#define TILE_MULTIPLIER 1
#include "body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
