/* Every kernel, once, over the LANES lanes that the including <isa>.c file defines; kernels.h is the
   contract.

   An ISA file defines ISA, the types f32x16, i32x16, i8x64, i8x4, their operations, and how many accumulators
   fit its registers: MATMUL_TILES x MATMUL_TOKENS, ATTEND_QUERIES x ATTEND_VECTORS, PEAK_DOTS (enough to hide
   the latency of a dot product); OPAQUE(x) makes the compiler forget what it knows of activations x. */
#include "vector.h"
#include "rows.h"
#include "rope.h"
#include "codes.h"
#include "product.h"
#include "dequantize.h"
#include "halves.h"
#include "cache.h"
#include "attend_float.h"
#include "attend_int8.h"
#include "attend.h"
#include "sampler.h"
#include "tiles.h"
#include "tiles_fitted.h"
#include "peak.h"

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define JOIN_OF(a, b) a##b
#define JOIN(a, b) JOIN_OF(a, b)

const Kernels JOIN(kernels_, ISA) = {
    .name = TEXT(ISA),
    .rmsnorm = rmsnorm,
    .quantize = quantize,
    .matmul_int8 = {matmul_int8, matmul_int4, matmul_int6},
    .matmul_float32 = {matmul_float32_int8, matmul_float32_int4, matmul_float32_int6},
    .dequantize_row = {dequantize_row_int8, dequantize_row_int4, dequantize_row_int6},
    .rope_angles = rope_angles,
    .rope = rope,
    .store_kv = {store_kv_f32, store_kv_f16, store_kv_i8},
    .attend = {attend_f32, attend_f16, attend_i8},
    .swiglu = swiglu,
    .add = add,
    .add_scaled = add_scaled,
    .matvec = matvec,
    .exponentials = exponentials,
    .top_k = top_k,
    .quantize_tiles = {quantize_tiles_int8, quantize_tiles_int4, quantize_tiles_int6},
    .int8_peak = int8_peak,
};
