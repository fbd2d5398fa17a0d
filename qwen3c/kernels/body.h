/* Every kernel, once, over the 16 lanes that the including <isa>.c file defines (contract: kernels.h).

   An ISA file defines ISA, the types f32x16, i32x16, i8x64, i8x4, their operations, and how many
   accumulators fit its registers: MATMUL_TILES x MATMUL_TOKENS, ATTEND_QUERIES x ATTEND_VECTORS, PEAK_DOTS (enough to
   hide the latency of a dot product); OPAQUE(x) makes the compiler forget what it knows of activations x. */
#include <float.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* ---------------------------------------------------------------------------- */
/* exp */

/* exp x = 2^n exp r, n = round(x / ln 2), |r| <= ln 2 / 2: Taylor to degree 7, error below 1e-8 of the result.
   Below -87.7 the power of 2 has no normal exponent left and the result is exactly 0; a NaN stays one. */
INLINE f32x16 f32_exp(f32x16 x) {
    x = f32_min(f32_set(88.0f), f32_max(f32_set(-88.0f), x));
    f32x16 n = f32_round(f32_mul(x, f32_set(1.44269504f)));
    f32x16 r = f32_fma(n, f32_set(-0.693145752f), x);  /* ln 2 in two parts; n times the first is exact */
    r = f32_fma(n, f32_set(-1.42860677e-6f), r);
    f32x16 y = f32_set(1.0f / 5040);
    y = f32_fma(y, r, f32_set(1.0f / 720));
    y = f32_fma(y, r, f32_set(1.0f / 120));
    y = f32_fma(y, r, f32_set(1.0f / 24));
    y = f32_fma(y, r, f32_set(1.0f / 6));
    y = f32_fma(y, r, f32_set(0.5f));
    y = f32_fma(y, r, f32_set(1.0f));
    y = f32_fma(y, r, f32_set(1.0f));
    return f32_mul(y, f32_power_of_2(n));
}

/* The last vector of a row: n < 16 values, the other lanes `fill`. */
static f32x16 load_part(const float *x, size_t n, float fill) {
    float lane[16];
    for (size_t i = 0; i < 16; i++) lane[i] = i < n ? x[i] : fill;
    return f32_load(lane);
}

static void store_part(float *y, f32x16 a, size_t n) {
    float lane[16];
    f32_store(lane, a);
    memcpy(y, lane, n * sizeof *y);
}

/* ---------------------------------------------------------------------------- */
/* Rows of activations */

static void rmsnorm(float *y, const float *x, const float *weight, size_t n, float eps) {
    f32x16 squares = f32_set(0);
    size_t whole = n / 16 * 16;
    for (size_t i = 0; i < whole; i += 16) {
        f32x16 v = f32_load(x + i);
        squares = f32_fma(v, v, squares);
    }
    if (whole < n) {
        f32x16 v = load_part(x + whole, n - whole, 0);
        squares = f32_fma(v, v, squares);
    }
    float inverse = 1.0f / sqrtf(f32_sum_lanes(squares) / (float)n + eps);
    for (size_t i = 0; i < n; i++) y[i] = x[i] * inverse * weight[i];
}

static void quantize(Int8Rows *row, const float *x, size_t n, size_t group_size) {
    for (size_t g = 0; g < n / group_size; g += 16) {  /* 16 groups at a time: their divisions are done together */
        size_t n_groups = n / group_size - g < 16 ? n / group_size - g : 16;
        float max[16] = {0}, inverse[16];
        for (size_t i = 0; i < n_groups; i++) {
            const float *group = x + (g + i) * group_size;
            f32x16 largest = f32_set(0);
            for (size_t c = 0; c < group_size; c += 16) largest = f32_max_magnitude(largest, f32_abs(f32_load(group + c)));
            max[i] = f32_max_magnitude_lanes(largest);
        }
        for (size_t i = 0; i < 16; i++) inverse[i] = 127.0f / (max[i] < 1e-30f ? INFINITY : max[i]);
        for (size_t i = 0; i < 16; i++) max[i] = (max[i] < 1e-30f ? 0.0f : max[i] < INFINITY ? max[i] : NAN) / 127.0f;
        memcpy(row->scales + g, max, n_groups * sizeof *max);
        for (size_t i = 0; i < n_groups; i++) {
            size_t first = (g + i) * group_size;
            if (max[i] != max[i]) {  /* a value is NaN or infinite: the scale NaN says so, no code could */
                memset(row->codes + first, 0, group_size);
                row->sums[g + i] = 0;
                continue;
            }
            f32x16 sum = f32_set(0);  /* of integers, and so small that it is exact */
            for (size_t c = first; c < first + group_size; c += 16) {
                f32x16 code = f32_round(f32_mul(f32_load(x + c), f32_set(inverse[i])));
                f32_store_i8(row->codes + c, code);
                sum = f32_add(sum, code);
            }
            row->sums[g + i] = 128 * (int32_t)f32_sum_lanes(sum);
        }
    }
}

static void swiglu(float *y, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        size_t left = n - i;
        f32x16 g = left < 16 ? load_part(gate + i, left, 0) : f32_load(gate + i);
        f32x16 u = left < 16 ? load_part(up + i, left, 0) : f32_load(up + i);
        f32x16 e = f32_exp(f32_sub(f32_set(0), g));
        f32x16 h = f32_mul(f32_div(g, f32_add(f32_set(1), e)), u);
        if (left < 16) store_part(y + i, h, left);
        else f32_store(y + i, h);
    }
}

static void add(float *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] += x[i];
}

static void add_scaled(float *y, const float *x, size_t n, float scale) {
    for (size_t i = 0; i < n; i++) y[i] = fmaf(scale, x[i], y[i]);
}

static void matvec(float *y, const float *x, const float *w, size_t rows, size_t columns) {
    for (size_t r = 0; r < rows; r++, w += columns) {
        f32x16 sum = f32_set(0);
        for (size_t c = 0; c < columns; c += 16)
            sum = columns - c < 16 ? f32_fma(load_part(w + c, columns - c, 0), load_part(x + c, columns - c, 0), sum)
                                   : f32_fma(f32_load(w + c), f32_load(x + c), sum);
        y[r] = f32_sum_lanes(sum);
    }
}

/* ---------------------------------------------------------------------------- */
/* Rotary embedding (RoFormer, https://arxiv.org/abs/2104.09864), rotate-half form */

/* angle = k pi/2 + r, |r| <= pi/4; Taylor series of sin r and cos r, below 1e-16 in absolute error */
static void sine_cosine(double angle, double *sine, double *cosine) {
    double k = (angle * 0.63661977236758134308 + 6755399441055744.0) - 6755399441055744.0;
    double r = fma(-k, 6.123233995736766036e-17, fma(-k, 1.57079632679489655800, angle));
    double z = r * r;
    double s = r * (1 + z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800
        + z * (1.0 / 6227020800.0 + z * (-1.0 / 1307674368000.0))))))));
    double c = 1 + z * (-1.0 / 2 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800
        + z * (1.0 / 479001600 + z * (-1.0 / 87178291200.0 + z * (1.0 / 20922789888000.0))))))));
    int quarter = fabs(k) < 0x1p62 ? (int)((long long)k & 3) : 0;  /* no integer beyond, least of all a NaN */
    *sine = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
    *cosine = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
}

static void rope_angles(float *cosine, float *sine, const float *frequency, size_t n, size_t position, float scale) {
    for (size_t i = 0; i < n; i++) {
        double s, c;
        sine_cosine((double)((float)position * frequency[i]), &s, &c);
        cosine[i] = (float)c * scale;
        sine[i] = (float)s * scale;
    }
}

static void rope(float *x, const float *cosine, const float *sine, size_t head_dim, float scale) {
    size_t half = head_dim / 2;
    for (size_t i = 0; i < half; i++) {
        float x0 = x[i], x1 = x[half + i];
        x[i] = fmaf(x0, cosine[i], -(x1 * sine[i])) * scale;
        x[half + i] = fmaf(x1, cosine[i], x0 * sine[i]) * scale;
    }
}

/* ---------------------------------------------------------------------------- */
/* Matrix products */

/* A matrix of codes as tiles of 16 rows and group_size columns, (group_size / 4, 16, 4). If `scaled`, the fp16 scales of
   the rows are behind the codes of each tile; or else they are 1. */
typedef struct {
    const uint8_t *tiles;
    size_t next_rows, next_group;  /* bytes from a tile to that of the next 16 rows, of the next columns */
    size_t n_rows, n_groups, group_size;
    const uint8_t *ahead;  /* what will be read next: ahead_bytes for each tile row, asked for while that row is used */
    size_t ahead_bytes;
} Tiles;

/* So few tokens wait for memory, which is fastest where it is read in order: one tile row at a time. */
#define FEW_TOKENS (2 * MATMUL_TOKENS)
#define ACCUMULATORS (MATMUL_TILES * MATMUL_TOKENS > 4 ? MATMUL_TILES * MATMUL_TOKENS : 4)

/* y = R tile rows of w times T tokens of x, from `row` and `token` on. A dot product is added up in J parts (integer sums
   may be split), so that none waits for the one before. In each group ahead_bytes from `ahead` on are asked for: at its
   start, or with `few` tokens, where they are many and some would be forgotten if all came at once, in step with the codes. */
INLINE void matmul_int8_block(const size_t R, const size_t T, const size_t J, const int few, float *y, size_t stride,
                              const Int8Rows *x, size_t columns, size_t token, const Tiles *w, const int scaled, size_t row,
                              const uint8_t *ahead, size_t ahead_bytes) {
    size_t x_groups = columns / w->group_size, n_rows = w->n_rows - row;
    const uint8_t *tiles = w->tiles + row / 16 * w->next_rows;
    const int8_t *codes = x->codes + token * columns;
    y += token * stride + row;
    f32x16 sum[MATMUL_TILES][MATMUL_TOKENS];
    UNROLL for (size_t r = 0; r < R; r++) UNROLL for (size_t t = 0; t < T; t++) {
        sum[r][t] = f32_set(0);
        __builtin_prefetch(y + t * stride + r * 16, 1);  /* the results go far apart: ask for their lines now */
    }
    for (size_t g = 0; g < w->n_groups; g++, tiles += w->next_group, codes += w->group_size, ahead += ahead_bytes) {
        for (size_t at = 0; !few && at < ahead_bytes; at += 64) __builtin_prefetch(ahead + at);
        const float *scales = x->scales + token * x_groups + g;
        i32x16 dot[4][MATMUL_TILES][MATMUL_TOKENS];
        UNROLL for (size_t t = 0; t < T; t++)
            UNROLL for (size_t r = 0; r < R; r++)
                UNROLL for (size_t j = 0; j < J; j++) dot[j][r][t] = dot_start(j ? 0 : x->sums[(token + t) * x_groups + g]);
        for (size_t c = 0; c < w->group_size; c += 4 * J)
            UNROLL for (size_t j = 0; j < J; j++) {
                size_t at = (c + 4 * j) * 16;
                if (few && at < ahead_bytes) __builtin_prefetch(ahead + at);
                i8x64 part[MATMUL_TILES];
                UNROLL for (size_t r = 0; r < R; r++) part[r] = codes_load((const int8_t *)tiles + r * w->next_rows + at);
                UNROLL for (size_t t = 0; t < T; t++) {
                    i8x4 a = activations_load(codes + t * columns + c + 4 * j);
                    UNROLL for (size_t r = 0; r < R; r++) dot[j][r][t] = dot_4(dot[j][r][t], part[r], a);
                }
            }
        UNROLL for (size_t r = 0; r < R; r++) {
            f32x16 scale = f32_set(1);
            if (scaled) scale = f32_load_f16((const uint16_t *)(tiles + r * w->next_rows + 16 * w->group_size));
            UNROLL for (size_t t = 0; t < T; t++) {
                UNROLL for (size_t j = 1; j < J; j++) dot[0][r][t] = dot_add(dot[0][r][t], dot[j][r][t]);
                f32x16 factor = f32_set(scales[t * x_groups]);
                sum[r][t] = f32_fma(f32_from_i32(dot[0][r][t]), scaled ? f32_mul(scale, factor) : factor, sum[r][t]);
            }
        }
    }
    UNROLL for (size_t r = 0; r < R; r++) UNROLL for (size_t t = 0; t < T; t++) {
        float *out = y + t * stride + r * 16;
        if (n_rows >= r * 16 + 16) f32_store(out, sum[r][t]);
        else store_part(out, sum[r][t], n_rows - r * 16);
    }
}

/* R tile rows times all tokens, in blocks of at most MATMUL_TOKENS, all about as large. */
INLINE void matmul_int8_rows(const size_t R, const int few, float *y, size_t stride, const Int8Rows *x, size_t columns,
                             size_t n_tokens, const Tiles *w, const int scaled, size_t row) {
    size_t blocks = (n_tokens + MATMUL_TOKENS - 1) / MATMUL_TOKENS, parts = blocks * w->n_groups;
    size_t ahead_bytes = (R * w->ahead_bytes + parts - 1) / parts;
    const uint8_t *ahead = w->ahead + row / 16 * w->ahead_bytes;
    for (size_t token = 0, n; token < n_tokens; token += n, ahead += w->n_groups * ahead_bytes) {
        n = (n_tokens - token) / blocks--;
#define BLOCK(T) \
    matmul_int8_block(R, T, 4 * R * T <= ACCUMULATORS ? 4 : 2 * R * T <= ACCUMULATORS ? 2 : 1, few, \
                      y, stride, x, columns, token, w, scaled, row, ahead, ahead_bytes)
        switch (n) {
#if MATMUL_TOKENS > 4
            case 6: BLOCK(6); break;
            case 5: BLOCK(5); break;
#endif
#if MATMUL_TOKENS > 3
            case 4: BLOCK(4); break;
#endif
#if MATMUL_TOKENS > 1
            case 3: BLOCK(3); break;
            case 2: BLOCK(2); break;
#endif
            case 1: BLOCK(1); break;
        }
#undef BLOCK
    }
}

/* y (n_tokens, w->n_rows) = x w^T; rows of x are `columns` long, of y `stride`. */
INLINE void matmul_int8_tiles(float *y, size_t stride, const Int8Rows *x, size_t columns, size_t n_tokens,
                              const Tiles *w, const int scaled) {
    size_t row = 0;
    if (n_tokens > FEW_TOKENS)
        for (; row + 16 * (MATMUL_TILES - 1) < w->n_rows; row += 16 * MATMUL_TILES)
            matmul_int8_rows(MATMUL_TILES, 0, y, stride, x, columns, n_tokens, w, scaled, row);
    for (; row < w->n_rows; row += 16) matmul_int8_rows(1, 1, y, stride, x, columns, n_tokens, w, scaled, row);
}

static void matmul_int8(float *y, size_t stride, const Int8Rows *x, size_t n_tokens, const uint8_t *tiles,
                        size_t n_rows, size_t columns, size_t group_size) {
    size_t n_groups = columns / group_size, next_rows = n_groups * TILE_BYTES(group_size);
    Tiles w = {.tiles = tiles, .next_rows = next_rows, .next_group = TILE_BYTES(group_size),
               .n_rows = n_rows, .n_groups = n_groups, .group_size = group_size,
               .ahead = tiles + (n_tokens > FEW_TOKENS ? MATMUL_TILES : 1) * next_rows, .ahead_bytes = next_rows};
    matmul_int8_tiles(y, stride, x, columns, n_tokens, &w, 1);
}

/* T tokens of float activations times one tile row. */
INLINE void matmul_float32_block(const size_t T, float *y, size_t stride, const float *x, const uint8_t *tiles,
                                 size_t n_rows, size_t columns, size_t group_size) {
    f32x16 sum[4];
    UNROLL for (size_t t = 0; t < T; t++) sum[t] = f32_set(0);
    for (size_t g = 0; g < columns / group_size; g++, tiles += TILE_BYTES(group_size)) {
        f32x16 part[4];
        UNROLL for (size_t t = 0; t < T; t++) part[t] = f32_set(0);
        for (size_t c = 0; c < group_size; c++) {
            f32x16 code = codes_column((const int8_t *)tiles + c / 4 * 64, (int)(c % 4));
            UNROLL for (size_t t = 0; t < T; t++)
                part[t] = f32_fma(code, f32_set(x[t * columns + g * group_size + c]), part[t]);
        }
        f32x16 scale = f32_load_f16((const uint16_t *)(tiles + 16 * group_size));
        UNROLL for (size_t t = 0; t < T; t++) sum[t] = f32_fma(scale, part[t], sum[t]);
    }
    UNROLL for (size_t t = 0; t < T; t++) {
        if (n_rows >= 16) f32_store(y + t * stride, sum[t]);
        else store_part(y + t * stride, sum[t], n_rows);
    }
}

static void matmul_float32(float *y, size_t stride, const float *x, size_t n_tokens, const uint8_t *tiles,
                           size_t n_rows, size_t columns, size_t group_size) {
    size_t tile_row = columns / group_size * TILE_BYTES(group_size);
    for (size_t row = 0; row < n_rows; row += 16, tiles += tile_row) {
        size_t t = 0, rows = n_rows - row;
        for (; t + 4 <= n_tokens; t += 4)
            matmul_float32_block(4, y + t * stride + row, stride, x + t * columns, tiles, rows, columns, group_size);
        for (; t < n_tokens; t++)
            matmul_float32_block(1, y + t * stride + row, stride, x + t * columns, tiles, rows, columns, group_size);
    }
}

static void dequantize_row(float *y, const uint8_t *matrix, size_t row, size_t columns, size_t group_size) {
    size_t n_groups = columns / group_size;
    const uint8_t *tile = matrix + row / 16 * n_groups * TILE_BYTES(group_size);
    for (size_t g = 0; g < n_groups; g++, tile += TILE_BYTES(group_size)) {
        float scales[16];
        f32_store(scales, f32_load_f16((const uint16_t *)(tile + 16 * group_size)));
        const int8_t *codes = (const int8_t *)tile + row % 16 * 4;
        for (size_t c = 0; c < group_size; c++) *y++ = scales[row % 16] * (float)codes[c / 4 * 64 + c % 4];
    }
}

/* ---------------------------------------------------------------------------- */
/* Codes with a scale in fp16: of weights, keys and values */

/* fp16 scales of 16 rows, and back; none so small that max would lie more than half a step beyond 127 */
static void round_scales(uint16_t *halves, float *back, const float *scales, const float *max) {
    f32_store_f16(halves, f32_load(scales));
    f32_store(back, f32_load_f16(halves));
    for (size_t r = 0; r < 16; r++)
        if (max[r] > 127.5f * back[r]) halves[r]++;
    f32_store(back, f32_load_f16(halves));
}

/* the codes of 16 values for a scale */
INLINE f32x16 codes_of(f32x16 x, float scale) {
    if (!(scale > 0)) return f32_set(0);
    return f32_max(f32_set(-127), f32_min(f32_set(127), f32_round(f32_div(x, f32_set(scale)))));
}

/* codes (PADDED(n)) of a row; returns its scale */
static uint16_t quantize_head(int8_t *codes, const float *x, size_t n) {
    f32x16 largest = f32_set(0);
    for (size_t i = 0; i < n; i += 16)
        largest = f32_max_magnitude(largest, f32_abs(n - i < 16 ? load_part(x + i, n - i, 0) : f32_load(x + i)));
    float max[16] = {f32_max_magnitude_lanes(largest)}, scales[16] = {max[0] / 127.0f}, back[16];
    uint16_t halves[16];
    if (!(max[0] < INFINITY)) max[0] = 0, scales[0] = NAN;
    round_scales(halves, back, scales, max);
    for (size_t i = 0; i < n; i += 16)
        f32_store_i8(codes + i, codes_of(n - i < 16 ? load_part(x + i, n - i, 0) : f32_load(x + i), back[0]));
    return halves[0];
}

/* ---------------------------------------------------------------------------- */
/* Attention: blocks at absolute positions, merged in order (FlashAttention, https://arxiv.org/abs/2205.14135) */

INLINE f32x16 load_kv(const char *p, size_t index, KVType type) {
    return type == KV_F16 ? f32_load_f16((const uint16_t *)p + index) : f32_load((const float *)p + index);
}

/* So few rows wait for memory, which is fastest where it is read in order: keys in two streams, values by whole rows. */
#define FEW_ROWS(Q) (2 * (Q) <= ATTEND_QUERIES)

/* Ask for n values from `index` on of what lies next_block bytes behind p, the next block or, if 0, nothing new: a cache is
   read once a token, in streams too short for the hardware to foresee. */
INLINE void ask_ahead(const char *p, ptrdiff_t next_block, size_t index, size_t n, KVType type) {
    size_t size = type == KV_F16 ? 2 : 4;
    for (size_t byte = 0; byte < n * size; byte += 64) __builtin_prefetch(p + next_block + index * size + byte);
}

/* score[r][16 s + lane] for Q query rows and V vectors of 16 positions, from the first position of `keys` */
INLINE void scores_block(const size_t Q, const size_t V, float *scores, const float *const *q, const char *keys,
                         size_t vector, size_t head_dim, ptrdiff_t next_block, KVType type) {
    f32x16 sum[ATTEND_QUERIES][ATTEND_VECTORS];
    UNROLL for (size_t r = 0; r < Q; r++) UNROLL for (size_t v = 0; v < V; v++) sum[r][v] = f32_set(0);
    for (size_t d = 0; d < head_dim; d++) {
        ask_ahead(keys, next_block, (vector * head_dim + d * V) * 16, V * 16, type);
        f32x16 k[ATTEND_VECTORS];
        UNROLL for (size_t v = 0; v < V; v++) k[v] = load_kv(keys, ((vector + v) * head_dim + d) * 16, type);
        UNROLL for (size_t r = 0; r < Q; r++) {
            f32x16 a = f32_set(q[r][d]);
            UNROLL for (size_t v = 0; v < V; v++) sum[r][v] = f32_fma(a, k[v], sum[r][v]);
        }
    }
    UNROLL for (size_t r = 0; r < Q; r++)
        UNROLL for (size_t v = 0; v < V; v++) f32_store(scores + r * KV_BLOCK + (vector + v) * 16, sum[r][v]);
}

INLINE void scores_rows(const size_t Q, float *scores, const float *const *q, const char *keys, size_t n_vectors,
                        size_t head_dim, ptrdiff_t next_block, KVType type) {
    const size_t V = FEW_ROWS(Q) && ATTEND_VECTORS > 2 ? 2 : ATTEND_VECTORS;
    size_t v = 0;
    for (; v + V <= n_vectors; v += V) scores_block(Q, V, scores, q, keys, v, head_dim, next_block, type);
    for (; v < n_vectors; v++) scores_block(Q, 1, scores, q, keys, v, head_dim, next_block, type);
}

/* p (rows, KV_BLOCK) = q . k over the first n_vectors * 16 positions of a block */
INLINE void scores_float(float *p, const float *const *q, size_t rows, const char *keys, size_t n_vectors,
                         size_t head_dim, ptrdiff_t next_block, KVType type) {
    size_t r = 0;
    for (; r + ATTEND_QUERIES <= rows; r += ATTEND_QUERIES)
        scores_rows(ATTEND_QUERIES, p + r * KV_BLOCK, q + r, keys, n_vectors, head_dim, next_block, type);
    for (; ATTEND_QUERIES > 2 && r + 2 <= rows; r += 2)
        scores_rows(2, p + r * KV_BLOCK, q + r, keys, n_vectors, head_dim, next_block, type);
    for (; r < rows; r++) scores_rows(1, p + r * KV_BLOCK, q + r, keys, n_vectors, head_dim, next_block, type);
}

/* o[r] += sum over positions [from, to) of p[r][j] v[j], for Q rows and V vectors of dimensions from `d` */
INLINE void values_block(const size_t Q, const size_t V, float *o, const float *p, const char *values, size_t d,
                         size_t from, size_t to, size_t width, ptrdiff_t next_block, KVType type) {
    f32x16 sum[ATTEND_QUERIES][2 * ATTEND_VECTORS];
    UNROLL for (size_t r = 0; r < Q; r++) UNROLL for (size_t v = 0; v < V; v++) sum[r][v] = f32_load(o + r * width + d + v * 16);
    for (size_t j = from; j < to; j++) {
        ask_ahead(values, next_block, j * width + d, V * 16, type);
        f32x16 x[2 * ATTEND_VECTORS];
        UNROLL for (size_t v = 0; v < V; v++) x[v] = load_kv(values, j * width + d + v * 16, type);
        UNROLL for (size_t r = 0; r < Q; r++) {
            f32x16 a = f32_set(p[r * KV_BLOCK + j]);
            UNROLL for (size_t v = 0; v < V; v++) sum[r][v] = f32_fma(a, x[v], sum[r][v]);
        }
    }
    UNROLL for (size_t r = 0; r < Q; r++) UNROLL for (size_t v = 0; v < V; v++) f32_store(o + r * width + d + v * 16, sum[r][v]);
}

INLINE void add_values(const size_t Q, float *o, const float *p, const char *values, size_t from, size_t to,
                       size_t width, ptrdiff_t next_block, KVType type) {
    size_t d = 0;
    if (FEW_ROWS(Q))
        for (; d + 32 * ATTEND_VECTORS <= width; d += 32 * ATTEND_VECTORS)
            values_block(Q, 2 * ATTEND_VECTORS, o, p, values, d, from, to, width, next_block, type);
    for (; d + 16 * ATTEND_VECTORS <= width; d += 16 * ATTEND_VECTORS)
        values_block(Q, ATTEND_VECTORS, o, p, values, d, from, to, width, next_block, type);
    for (; d < width; d += 16) values_block(Q, 1, o, p, values, d, from, to, width, next_block, type);
}

/* Q rows together over what all of them see, then each over the rest; rows come in order of position. */
INLINE void values_rows(const size_t Q, float *o, const float *p, const char *values, const size_t *seen,
                        size_t width, ptrdiff_t next_block, KVType type) {
    add_values(Q, o, p, values, 0, seen[0], width, next_block, type);
    for (size_t r = 1; r < Q; r++)
        if (seen[r] > seen[0]) add_values(1, o + r * width, p + r * KV_BLOCK, values, seen[0], seen[r], width, next_block, type);
}

/* o (rows, width) = p v, each row over the positions it has seen */
INLINE void values_float(float *o, const float *p, size_t rows, const char *values, const size_t *seen,
                         size_t width, ptrdiff_t next_block, KVType type) {
    size_t r = 0;
    memset(o, 0, rows * width * sizeof *o);
    for (; r + ATTEND_QUERIES <= rows; r += ATTEND_QUERIES)
        values_rows(ATTEND_QUERIES, o + r * width, p + r * KV_BLOCK, values, seen + r, width, next_block, type);
    for (; ATTEND_QUERIES > 2 && r + 2 <= rows; r += 2)
        values_rows(2, o + r * width, p + r * KV_BLOCK, values, seen + r, width, next_block, type);
    for (; r < rows; r++) values_rows(1, o + r * width, p + r * KV_BLOCK, values, seen + r, width, next_block, type);
}

/* ---- the same with an int8 cache: the products of attention are those of matmul_int8 */

/* Rows of int8 in scratch, INT8_FLOATS for each of ATTENTION_ROWS. */
static Int8Rows scratch_rows(float *scratch, size_t columns, size_t group_size) {
    size_t n_scales = ATTENTION_ROWS * (columns / group_size);
    return (Int8Rows){.scales = scratch, .sums = (int32_t *)(scratch + n_scales), .codes = (int8_t *)(scratch + 2 * n_scales)};
}

/* The first n columns of row r. */
static void quantize_into(const Int8Rows *rows, size_t r, const float *x, size_t n, size_t columns, size_t group_size) {
    size_t n_groups = columns / group_size;
    Int8Rows row = {rows->codes + r * columns, rows->scales + r * n_groups, rows->sums + r * n_groups};
    quantize(&row, x, n, group_size);
}

/* q as int8, a head a group, by way of `padded` (width), zeros behind head_dim */
static void quantize_queries(const Int8Rows *q8, const float *const *q, size_t rows, float *padded, size_t head_dim, size_t width) {
    memset(padded, 0, width * sizeof *padded);
    for (size_t r = 0; r < rows; r++) {
        memcpy(padded, q[r], head_dim * sizeof *padded);
        quantize_into(q8, r, padded, width, width, width);
    }
}

/* p (rows, KV_BLOCK) = q . k over the first `filled` positions of a block; next_block bytes behind it is the next, or 0 */
static void scores_int8(float *p, const Int8Rows *q8, size_t rows, const char *keys, size_t filled, size_t width,
                        ptrdiff_t next_block) {
    size_t tile = TILE_BYTES(width);
    Tiles w = {.tiles = (const uint8_t *)keys, .next_rows = tile, .next_group = tile,
               .n_rows = filled, .n_groups = 1, .group_size = width,
               .ahead = (const uint8_t *)keys + next_block, .ahead_bytes = next_block ? tile : 0};
    matmul_int8_tiles(p, KV_BLOCK, q8, width, rows, &w, 1);
}

/* p[j] *= scales[j], those of the values, for the first `seen` positions of a block, 0 from there to `end` */
static void scale_weights(float *p, const uint16_t *scales, size_t seen, size_t end) {
    for (size_t j = 0; j < seen; j += 16) f32_store(p + j, f32_mul(f32_load(p + j), f32_load_f16(scales + j)));
    for (size_t j = seen; j < end; j++) p[j] = 0;
}

/* o (rows, width) = p v over the first `filled` positions of a block */
static void values_int8(float *o, const Int8Rows *p8, float *p, size_t rows, const char *values, const size_t *seen,
                        size_t filled, size_t width, ptrdiff_t next_block) {
    size_t n_groups = (filled + VALUE_GROUP - 1) / VALUE_GROUP;
    for (size_t r = 0; r < rows; r++) {
        scale_weights(p + r * KV_BLOCK, (const uint16_t *)(values + KV_BLOCK * width), seen[r], n_groups * VALUE_GROUP);
        quantize_into(p8, r, p + r * KV_BLOCK, n_groups * VALUE_GROUP, KV_BLOCK, VALUE_GROUP);
    }
    /* dimensions are rows, positions columns; those beyond `filled` have weight 0 */
    Tiles w = {.tiles = (const uint8_t *)values, .next_rows = 16 * KV_BLOCK, .next_group = 16 * VALUE_GROUP,
               .n_rows = width, .n_groups = n_groups, .group_size = VALUE_GROUP,
               .ahead = (const uint8_t *)values + next_block, .ahead_bytes = next_block ? 16 * KV_BLOCK : 0};
    matmul_int8_tiles(o, width, p8, KV_BLOCK, rows, &w, 0);
}

/* ---- softmax and both products over all blocks */

/* p = exp(score - max) in place for the first `seen` of a block's positions, 0 beyond them; returns the sum of p, NaN if
   a score is NaN or infinite: one of -infinity is a damaged key and must not pass for a position of no weight */
static float exponentiate(float *p, size_t seen, float *max) {
    size_t end = (seen + 15) / 16 * 16;
    for (size_t j = seen; j < end; j++) p[j] = -FLT_MAX;
    f32x16 m = f32_load(p), sum = f32_mul(m, f32_set(0));  /* 0, and NaN if a score is not finite */
    for (size_t j = 16; j < end; j += 16) {
        f32x16 score = f32_load(p + j);
        m = f32_max(m, score);
        sum = f32_fma(score, f32_set(0), sum);
    }
    *max = f32_max_lanes(m);
    for (size_t j = 0; j < end; j += 16) {
        f32x16 e = f32_exp(f32_sub(f32_load(p + j), f32_set(*max)));
        f32_store(p + j, e);
        sum = f32_add(sum, e);
    }
    return f32_sum_lanes(sum);
}

/* weights[j] = exp(score - max) * inverse in place of the scores of n positions */
static void normalize_weights(float *weights, size_t n, float max, float inverse) {
    for (size_t j = 0; j < n; j += 16) {
        size_t part = n - j < 16 ? n - j : 16;
        f32x16 score = part < 16 ? load_part(weights + j, part, 0) : f32_load(weights + j);
        f32x16 weight = f32_mul(f32_exp(f32_sub(score, f32_set(max))), f32_set(inverse));
        if (part < 16) store_part(weights + j, weight, part);
        else f32_store(weights + j, weight);
    }
}

/* merge a block's (max, sum, o) into the running ones of a row */
static void merge(float *max, float *sum, float *out, float block_max, float block_sum, const float *o, size_t n) {
    float larger = block_max > *max ? block_max : *max;
    float exponent[16] = {*max - larger, block_max - larger}, factor[16];
    f32_store(factor, f32_exp(f32_load(exponent)));
    *max = larger;
    *sum = fmaf(*sum, factor[0], block_sum * factor[1]);
    for (size_t d = 0; d < n; d++) out[d] = fmaf(out[d], factor[0], o[d] * factor[1]);
}

INLINE void attend(const Attention *a, KVType type) {
    size_t rows = a->n_tokens * a->group, width = PADDED(a->head_dim);
    size_t last = a->position + a->n_tokens - 1;
    float *p = a->scratch, *o = p + ATTENTION_ROWS * KV_BLOCK;
    float *max = o + ATTENTION_ROWS * width, *sum = max + ATTENTION_ROWS, *rest = sum + ATTENTION_ROWS;
    Int8Rows p8 = scratch_rows(rest, KV_BLOCK, VALUE_GROUP);
    Int8Rows q8 = scratch_rows(rest + ATTENTION_ROWS * INT8_FLOATS(KV_BLOCK, VALUE_GROUP), width, width);
    const float *q[ATTENTION_ROWS];
    float *out[ATTENTION_ROWS], *weights[ATTENTION_ROWS];
    for (size_t r = 0; r < rows; r++) {
        size_t token = r / a->group, head = r % a->group * a->head_dim;
        q[r] = a->q + token * a->q_stride + head;
        out[r] = a->out + token * a->out_stride + head;
        if (a->weights) weights[r] = a->weights + token * a->weights_token + r % a->group * a->weights_head;
    }
    if (type == KV_I8) quantize_queries(&q8, q, rows, o, a->head_dim, width);
    for (size_t block = 0; block <= last / KV_BLOCK; block++) {
        const char *keys = a->blocks[block] + a->k_offset, *values = a->blocks[block] + a->v_offset;
        size_t start = block * KV_BLOCK, filled = last + 1 - start < KV_BLOCK ? last + 1 - start : KV_BLOCK;
        /* the next block is asked for while this one is used, unless so many rows use it that memory has time enough */
        int asks = block < last / KV_BLOCK && (type == KV_I8 || rows <= 2 * ATTEND_QUERIES);
        ptrdiff_t next_block = asks ? a->blocks[block + 1] - a->blocks[block] : 0;
        if (type == KV_I8) scores_int8(p, &q8, rows, keys, filled, width, next_block);
        else scores_float(p, q, rows, keys, (filled + 15) / 16, a->head_dim, next_block, type);

        size_t seen[ATTENTION_ROWS];
        float block_max[ATTENTION_ROWS], block_sum[ATTENTION_ROWS];
        for (size_t r = 0; r < rows; r++) {
            size_t position = a->position + r / a->group;  /* an earlier token of the task may end before this block */
            seen[r] = position < start ? 0 : position + 1 - start < KV_BLOCK ? position + 1 - start : KV_BLOCK;
            if (a->weights) memcpy(weights[r] + start, p + r * KV_BLOCK, seen[r] * sizeof *p);
            if (seen[r]) block_sum[r] = exponentiate(p + r * KV_BLOCK, seen[r], &block_max[r]);
        }

        if (type == KV_I8) values_int8(o, &p8, p, rows, values, seen, filled, width, next_block);
        else values_float(o, p, rows, values, seen, width, next_block, type);

        for (size_t r = 0; r < rows; r++) {
            if (block == 0) {
                max[r] = block_max[r];
                sum[r] = block_sum[r];
                memcpy(out[r], o + r * width, a->head_dim * sizeof *o);
            } else if (seen[r]) {
                merge(&max[r], &sum[r], out[r], block_max[r], block_sum[r], o + r * width, a->head_dim);
            }
        }
    }
    for (size_t r = 0; r < rows; r++) {
        float inverse = 1.0f / sum[r];
        for (size_t d = 0; d < a->head_dim; d++) out[r][d] *= inverse;
        if (a->weights) normalize_weights(weights[r], a->position + r / a->group + 1, max[r], inverse);
    }
}

static void attend_f32(const Attention *task) { attend(task, KV_F32); }
static void attend_f16(const Attention *task) { attend(task, KV_F16); }
static void attend_i8(const Attention *task) { attend(task, KV_I8); }

static void store_kv_f32(char *keys, char *values, size_t index, const float *k, const float *v, size_t head_dim) {
    float *key = (float *)keys + index / 16 * 16 * head_dim + index % 16;
    for (size_t d = 0; d < head_dim; d++) key[d * 16] = k[d];
    memcpy((float *)values + index * PADDED(head_dim), v, head_dim * sizeof *v);
}

static void store_kv_f16(char *keys, char *values, size_t index, const float *k, const float *v, size_t head_dim) {
    uint16_t *key = (uint16_t *)keys + index / 16 * 16 * head_dim + index % 16;
    uint16_t *value = (uint16_t *)values + index * PADDED(head_dim);
    for (size_t d = 0; d < head_dim; d += 16) {
        uint16_t half[16];
        size_t n = head_dim - d < 16 ? head_dim - d : 16;
        f32_store_f16(half, n < 16 ? load_part(k + d, n, 0) : f32_load(k + d));
        for (size_t i = 0; i < n; i++) key[(d + i) * 16] = half[i];
        f32_store_f16(value + d, n < 16 ? load_part(v + d, n, 0) : f32_load(v + d));
    }
}

static void store_kv_i8(char *keys, char *values, size_t index, const float *k, const float *v, size_t head_dim) {
    int8_t codes[MAX_HEAD_DIM];
    size_t width = PADDED(head_dim);
    char *tile = keys + index / 16 * TILE_BYTES(width), *column = values + index / 4 * 64 + index % 4;
    uint16_t scale = quantize_head(codes, k, head_dim);
    for (size_t d = 0; d < width; d += 4) memcpy(tile + d * 16 + index % 16 * 4, codes + d, 4);
    memcpy(tile + width * 16 + index % 16 * 2, &scale, 2);
    scale = quantize_head(codes, v, head_dim);
    for (size_t d = 0; d < width; d++) column[d / 16 * 16 * KV_BLOCK + d % 16 * 4] = codes[d];
    memcpy(values + KV_BLOCK * width + index * 2, &scale, 2);
}

/* ---------------------------------------------------------------------------- */
/* For the sampler */

static float exponentials(float *y, const float *x, size_t n, float inverse_temperature) {
    f32x16 largest = f32_set(-INFINITY), sum = f32_set(0);
    for (size_t i = 0; i < n; i += 16)
        largest = f32_max(largest, n - i < 16 ? load_part(x + i, n - i, -INFINITY) : f32_load(x + i));
    f32x16 max = f32_set(f32_max_lanes(largest)), factor = f32_set(inverse_temperature);
    for (size_t i = 0; i < n; i += 16) {
        f32x16 v = n - i < 16 ? load_part(x + i, n - i, -INFINITY) : f32_load(x + i);
        f32x16 e = f32_exp(f32_mul(f32_sub(v, max), factor));
        if (n - i < 16) store_part(y + i, e, n - i);
        else f32_store(y + i, e);
        sum = f32_add(sum, e);
    }
    return f32_sum_lanes(sum);
}

INLINE int ranks_before(const float *x, int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); }

/* heap[0] is the worst of the best; restore that below `parent` */
static void sift_down(int32_t *heap, size_t n, size_t parent, const float *x) {
    for (size_t child; (child = 2 * parent + 1) < n; parent = child) {
        if (child + 1 < n && ranks_before(x, heap[child], heap[child + 1])) child++;
        if (!ranks_before(x, heap[parent], heap[child])) return;
        int32_t swap = heap[parent];
        heap[parent] = heap[child];
        heap[child] = swap;
    }
}

static int top_k(int32_t *ids, const float *x, size_t n, size_t k) {
    int nan = 0;
    for (size_t i = 0; i < n; i++) nan |= x[i] != x[i];
    if (nan) return 1;
    for (size_t i = 0; i < k; i++) ids[i] = (int32_t)i;
    for (size_t parent = k / 2; parent-- > 0;) sift_down(ids, k, parent, x);
    for (size_t i = k; i < n;) {
        if (n - i >= 64) {  /* most blocks of 64 hold nothing large enough */
            f32x16 m = f32_max(f32_max(f32_load(x + i), f32_load(x + i + 16)), f32_max(f32_load(x + i + 32), f32_load(x + i + 48)));
            if (f32_max_lanes(m) <= x[ids[0]]) {
                i += 64;
                continue;
            }
        }
        for (size_t end = n - i < 64 ? n : i + 64; i < end; i++) {
            if (x[i] <= x[ids[0]]) continue;
            ids[0] = (int32_t)i;
            sift_down(ids, k, 0, x);
        }
    }
    for (size_t left = k; left > 1; left--) {  /* heap sort: the worst goes last */
        int32_t worst = ids[0];
        ids[0] = ids[left - 1];
        ids[left - 1] = worst;
        sift_down(ids, left - 1, 0, x);
    }
    return 0;
}

/* ---------------------------------------------------------------------------- */
/* For the exporter */

static void load_source(float *w, const void *row, SourceType type, size_t offset, size_t n) {
    if (row == NULL) memset(w, 0, n * sizeof *w);
    else if (type == SOURCE_F32) memcpy(w, (const float *)row + offset, n * sizeof *w);
    else if (type == SOURCE_F16)
        for (size_t i = 0; i < n; i += 16) f32_store(w + i, f32_load_f16((const uint16_t *)row + offset + i));
    else
        for (size_t i = 0; i < n; i++) {
            uint16_t half;
            memcpy(&half, (const uint16_t *)row + offset + i, 2);
            uint32_t bits = (uint32_t)half << 16;
            memcpy(w + i, &bits, 4);
        }
}

/* largest |w| of a group, or a negative number if a value is NaN, infinite or too large for an fp16 scale; sum w^2 */
static float largest_magnitude(const float *w, size_t n, float *square) {
    f32x16 largest = f32_set(0), squares = f32_set(0);
    for (size_t i = 0; i < n; i += 16) {
        f32x16 v = f32_load(w + i);
        largest = f32_max_magnitude(largest, f32_abs(v));
        squares = f32_fma(v, v, squares);
    }
    *square = f32_sum_lanes(squares);
    float max = f32_max_magnitude_lanes(largest);
    return max <= 127.0f * 65504.0f ? max : -1.0f;  /* no NaN is */
}

static int64_t first_bad(const float *w, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(w[i]) <= 127.0f * 65504.0f)) return (int64_t)i;
    return 0;
}

/* What rounding one row of one group with a scale gives, beside its codes. */
typedef struct {
    float largest;  /* max |w - scale code| */
    float lost;     /* sum (w - scale code)^2 */
    float fitted;   /* sum w code / sum code^2, the scale that loses least for these codes; 0 if they are 0 */
} Rounded;

static Rounded round_group(int8_t *codes, const float *w, float scale, size_t n) {
    f32x16 largest = f32_set(0), lost = f32_set(0), products = f32_set(0), squares = f32_set(0);
    for (size_t i = 0; i < n; i += 16) {
        f32x16 v = f32_load(w + i), code = codes_of(v, scale);
        f32_store_i8(codes + i, code);
        f32x16 off = f32_sub(v, f32_mul(code, f32_set(scale)));
        largest = f32_max(largest, f32_abs(off));
        lost = f32_add(f32_mul(off, off), lost);
        products = f32_add(f32_mul(v, code), products);
        squares = f32_add(f32_mul(code, code), squares);  /* exact: at most 16 * 127^2 a lane */
    }
    float square = f32_sum_lanes(squares);
    return (Rounded){f32_max_lanes(largest), f32_sum_lanes(lost), square > 0 ? f32_sum_lanes(products) / square : 0.0f};
}

static void quantize_tiles(uint8_t *tiles, const void *const rows[TILE_ROWS], SourceType type, size_t columns,
                           size_t group_size, QuantizationError *error) {
    float w[16][256], max[16], scales[16], first[16], second[16];
    int8_t codes[16][256], refitted[256];
    uint16_t halves[16], refitted_halves[16];
    for (size_t g = 0; g < columns / group_size; g++, tiles += TILE_BYTES(group_size)) {
        Rounded rounded[16];
        float square[16];
        for (size_t r = 0; r < 16; r++) {
            load_source(w[r], rows[r], type, g * group_size, group_size);
            max[r] = largest_magnitude(w[r], group_size, &square[r]);
            if (max[r] < 0) {
                if (error->bad < 0) error->bad = (int64_t)(r * columns + g * group_size) + first_bad(w[r], group_size);
                max[r] = square[r] = 0;
            }
            scales[r] = max[r] / 127.0f;
        }
        round_scales(halves, first, scales, max);
        for (size_t r = 0; r < 16; r++) {
            rounded[r] = round_group(codes[r], w[r], first[r], group_size);
            scales[r] = rounded[r].fitted;
        }
        round_scales(refitted_halves, second, scales, max);
        for (size_t r = 0; r < 16; r++) {
            Rounded again = second[r] == first[r] ? rounded[r] : round_group(refitted, w[r], second[r], group_size);
            if (again.lost < rounded[r].lost) {
                rounded[r] = again;
                halves[r] = refitted_halves[r];
                memcpy(codes[r], refitted, group_size);
            }
            for (size_t c = 0; c < group_size; c += 4) memcpy(tiles + c * 16 + r * 4, &codes[r][c], 4);
            if (rounded[r].largest > error->largest) error->largest = rounded[r].largest;
            error->error_square += rounded[r].lost;
            error->square += square[r];
        }
        memcpy(tiles + 16 * group_size, halves, sizeof halves);
    }
}

/* ---------------------------------------------------------------------------- */
/* For the benchmark */

static size_t int8_peak(size_t rounds) {
    int8_t ones[64];
    memset(ones, 1, sizeof ones);
    __asm__("" : "+m"(ones));  /* for the compiler they could be anything */
    i8x64 w = codes_load(ones);
    i8x4 x = activations_load(ones);
    i32x16 dot[PEAK_DOTS];
    UNROLL for (size_t i = 0; i < PEAK_DOTS; i++) dot[i] = dot_start(128 * 4 * (int32_t)rounds);
    for (size_t round = 0; round < rounds; round++)
        UNROLL for (size_t i = 0; i < PEAK_DOTS; i++) {
            OPAQUE(x);  /* a product known to be the same would be taken only once */
            dot[i] = dot_4(dot[i], w, x);
        }
    size_t count = 0;
    for (size_t i = 0; i < PEAK_DOTS; i++) count += (size_t)f32_sum_lanes(f32_from_i32(dot[i]));
    return count;
}

/* ---------------------------------------------------------------------------- */

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define JOIN_OF(a, b) a##b
#define JOIN(a, b) JOIN_OF(a, b)

const Kernels JOIN(kernels_, ISA) = {
    .name = TEXT(ISA),
    .rmsnorm = rmsnorm,
    .quantize = quantize,
    .matmul_int8 = matmul_int8,
    .matmul_float32 = matmul_float32,
    .dequantize_row = dequantize_row,
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
    .quantize_tiles = quantize_tiles,
    .int8_peak = int8_peak,
};
