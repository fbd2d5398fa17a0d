/* Products of int8 activations with matrices of codes: weights, and keys and values in an int8 cache. */

/* A matrix of codes in tiles of LANES rows x group_size columns. */
typedef struct {
    const uint8_t *tiles;
    size_t next_rows, next_group;  /* bytes from a tile to the tile below it, and to the tile on its right */
    size_t n_rows, n_groups, group_size;
    const uint8_t *ahead;  /* memory that is read after this matrix, to be prefetched */
    size_t ahead_bytes;    /* bytes of `ahead` to prefetch for each tile row of this matrix */
} Tiles;

/* y (n_tokens, w.n_rows) = x w^T */
typedef struct {
    float *y;
    size_t stride;  /* floats from a row of y to the next */
    const Int8Rows *x;
    size_t columns, n_tokens;  /* x is (n_tokens, columns); w may have fewer columns */
    Tiles w;
} Product;

typedef struct {
    const uint8_t *at;
    size_t bytes;  /* for each group */
} Ahead;

/* Where in y a block begins. */
typedef struct { size_t row, token; } Place;

/* With at most FEW_TOKENS tokens a product is bound by memory, which is fastest read in order: it then takes
   one tile row at a time. */
#define FEW_TOKENS (2 * MATMUL_TOKENS)

/* Each dot product of a block of R x T runs in PARTS accumulators, to hide the latency of the dot
   instruction. */
#define ACCUMULATORS (MATMUL_TILES * MATMUL_TOKENS > 4 ? MATMUL_TILES * MATMUL_TOKENS : 4)
#define PARTS(R, T) (4 * (R) * (T) <= ACCUMULATORS ? 4 : 2 * (R) * (T) <= ACCUMULATORS ? 2 : 1)

/* R tile rows times T tokens, from `place` on. scaled: fp16 scales of the rows lie behind the
   codes of each tile; otherwise all are 1. few: there are few tokens, so the loop waits for memory. Each
   group prefetches ahead.bytes: all at its start; when few, one line for each line of codes it reads, because
   a CPU drops prefetches that pile up. */
INLINE void matmul_int8_block(const Encoding encoding, const size_t R, const size_t T, const int few,
                              const int scaled, const Product *p, Place place, Ahead ahead) {
    const size_t J = PARTS(R, T);  /* integer sums may be split */
    const Tiles *w = &p->w;
    size_t columns = p->columns, x_groups = columns / w->group_size;
    size_t row = place.row, token = place.token, stride = p->stride, n_rows = w->n_rows - row;
    const uint8_t *tiles = w->tiles + row / LANES * w->next_rows;
    const int8_t *codes = p->x->codes + token * columns;
    float *y = p->y + token * stride + row;
    f32x16 sum[MATMUL_TILES][MATMUL_TOKENS];
    u6x64 codebooks[MATMUL_TILES];
    UNROLL for (size_t r = 0; r < R; r++) {
        if (encoding == ENCODING_INT4) codebooks[r] = u6_codebook_of(tiles + r * w->next_rows);
        UNROLL for (size_t t = 0; t < T; t++) {
            sum[r][t] = f32_set(0);
            /* rows of y are far apart, none is in cache */
            __builtin_prefetch(y + t * stride + r * LANES, 1);
        }
    }
    for (size_t g = 0; g < w->n_groups;
         g++, tiles += w->next_group, codes += w->group_size, ahead.at += ahead.bytes) {
        for (size_t at = 0; !few && at < ahead.bytes; at += 64) __builtin_prefetch(ahead.at + at);
        const float *scales = p->x->scales + token * x_groups + g;
        i32x16 dot[4][MATMUL_TILES][MATMUL_TOKENS];
        UNROLL for (size_t t = 0; t < T; t++) {
            int32_t sums = p->x->sums[(token + t) * x_groups + g];
            UNROLL for (size_t r = 0; r < R; r++)
                UNROLL for (size_t j = 0; j < J; j++)
                    dot[j][r][t] = encoding == ENCODING_INT8 ? dot_start(j ? 0 : sums)
                                                             : i32_set(j ? 0 : -sums / 4);
        }
        for (size_t c = 0; c < w->group_size; c += 16) {
            u6x64 crumbs[MATMUL_TILES];
            if (encoding == ENCODING_INT6)
                UNROLL for (size_t r = 0; r < R; r++)
                    crumbs[r] = u6_crumbs(tiles + r * w->next_rows, c / 16, w->group_size);
            UNROLL for (size_t odd = 0; odd < 2; odd++) {
                size_t at = c + 8 * odd, begin = code_bytes(encoding, at), end = code_bytes(encoding, at + 8);
                for (; few && begin < end && begin < ahead.bytes; begin += 64)
                    __builtin_prefetch(ahead.at + begin);
                if (encoding == ENCODING_INT8)
                    UNROLL for (size_t i = 0; i < 2; i++) {
                        i8x64 part[MATMUL_TILES];
                        UNROLL for (size_t r = 0; r < R; r++)
                            part[r] = codes_load((const int8_t *)tiles + r * w->next_rows +
                                                 (at + 4 * i) * LANES);
                        UNROLL for (size_t t = 0; t < T; t++) {
                            i8x4 a = activations_load(codes + t * columns + at + 4 * i);
                            UNROLL for (size_t r = 0; r < R; r++) {
                                i32x16 *d = &dot[(2 * odd + i) % J][r][t];
                                *d = dot_4(*d, part[r], a);
                            }
                        }
                    }
                else {
                    u6x64 part[MATMUL_TILES][2];
                    UNROLL for (size_t r = 0; r < R; r++)
                        u6_columns(encoding, part[r], tiles + r * w->next_rows + at * (LANES / 2),
                                   codebooks[r], crumbs[r], (int)odd);
                    UNROLL for (size_t t = 0; t < T; t++) {
                        const int8_t *x = codes + t * columns + at;
                        i8x4 a = activations_load(x), b = activations_load(x + 4);
                        UNROLL for (size_t r = 0; r < R; r++)
                            dot_8(&dot[2 * odd % J][r][t], &dot[(2 * odd + 1) % J][r][t], part[r], a, b);
                    }
                }
            }
        }
        UNROLL for (size_t r = 0; r < R; r++) {
            const uint8_t *scales_of_rows = tiles + r * w->next_rows + code_bytes(encoding, w->group_size);
            f32x16 scale = scaled ? f32_load_f16((const uint16_t *)scales_of_rows) : f32_set(1);
            UNROLL for (size_t t = 0; t < T; t++) {
                UNROLL for (size_t j = 1; j < J; j++) dot[0][r][t] = dot_add(dot[0][r][t], dot[j][r][t]);
                f32x16 factor = f32_set(scales[t * x_groups]);
                if (scaled) factor = f32_mul(scale, factor);
                sum[r][t] = f32_fma(f32_from_i32(dot[0][r][t]), factor, sum[r][t]);
            }
        }
    }
    UNROLL for (size_t r = 0; r < R; r++) UNROLL for (size_t t = 0; t < T; t++)
        store_left(y + t * stride + r * LANES, sum[r][t], n_rows - r * LANES);
}

/* R tile rows from `row` on times all tokens, in blocks of at most MATMUL_TOKENS of about equal size. */
INLINE void matmul_int8_rows(const Encoding encoding, const size_t R, const int few, const int scaled,
                             const Product *p, size_t row) {
    size_t blocks = (p->n_tokens + MATMUL_TOKENS - 1) / MATMUL_TOKENS, parts = blocks * p->w.n_groups;
    Ahead ahead = {p->w.ahead + row / LANES * p->w.ahead_bytes, (R * p->w.ahead_bytes + parts - 1) / parts};
    for (size_t token = 0, n; token < p->n_tokens; token += n, ahead.at += p->w.n_groups * ahead.bytes) {
        n = (p->n_tokens - token) / blocks--;
        switch (n) {
#if MATMUL_TOKENS > 4
            case 6: matmul_int8_block(encoding, R, 6, few, scaled, p, (Place){row, token}, ahead); break;
            case 5: matmul_int8_block(encoding, R, 5, few, scaled, p, (Place){row, token}, ahead); break;
#endif
#if MATMUL_TOKENS > 3
            case 4: matmul_int8_block(encoding, R, 4, few, scaled, p, (Place){row, token}, ahead); break;
#endif
#if MATMUL_TOKENS > 1
            case 3: matmul_int8_block(encoding, R, 3, few, scaled, p, (Place){row, token}, ahead); break;
            case 2: matmul_int8_block(encoding, R, 2, few, scaled, p, (Place){row, token}, ahead); break;
#endif
            case 1: matmul_int8_block(encoding, R, 1, few, scaled, p, (Place){row, token}, ahead); break;
        }
    }
}

#if TILE_MULTIPLIER
#include "product_amx.h"
#endif

INLINE void matmul_int8_tiles(const Encoding encoding, const Product *p, const int scaled) {
    size_t row = 0;
#if TILE_MULTIPLIER
    if (p->n_tokens >= TILE_MULTIPLIER_TOKENS(encoding)) { tile_multiply(encoding, p, scaled); return; }
#endif
    if (p->n_tokens > FEW_TOKENS)
        for (; row + LANES * (MATMUL_TILES - 1) < p->w.n_rows; row += LANES * MATMUL_TILES)
            matmul_int8_rows(encoding, MATMUL_TILES, 0, scaled, p, row);
    for (; row < p->w.n_rows; row += LANES) matmul_int8_rows(encoding, 1, 1, scaled, p, row);
}

/* All of a product with a matrix of weights; p.w says where it is, its rows and its groups. */
INLINE void matmul_int8_of(const Encoding encoding, Product *p) {
    Tiles *w = &p->w;
    w->n_groups = p->columns / w->group_size;
    w->next_rows = w->ahead_bytes = tile_row_bytes(encoding, p->columns, w->group_size);
    w->next_group = tile_bytes(encoding, w->group_size);
    w->tiles += codebook_bytes(encoding);
    w->ahead = w->tiles + (p->n_tokens > FEW_TOKENS ? MATMUL_TILES : 1) * w->next_rows;
    matmul_int8_tiles(encoding, p, 1);
}

#define MATMUL_INT8(name, encoding) \
    static void name(float *y, size_t stride, const Int8Rows *x, size_t n_tokens, const uint8_t *tiles, \
                     size_t n_rows, size_t columns, size_t group_size) { \
        Product p = {.y = y, .stride = stride, .x = x, .columns = columns, .n_tokens = n_tokens, \
                     .w = {.tiles = tiles, .n_rows = n_rows, .group_size = group_size}}; \
        matmul_int8_of(encoding, &p); \
    }
MATMUL_INT8(matmul_int8, ENCODING_INT8)
MATMUL_INT8(matmul_int4, ENCODING_INT4)
MATMUL_INT8(matmul_int6, ENCODING_INT6)
