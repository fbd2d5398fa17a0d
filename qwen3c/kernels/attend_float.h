/* Attention with a float cache, fp16 or float32: products of queries with keys, of weights with values. */

/* The keys and values of one KV head in one block. */
typedef struct {
    const char *keys, *values;
    size_t head_dim, width;  /* width: PADDED(head_dim) */
    ptrdiff_t next;          /* bytes to this place in the next block, to prefetch it; 0: do not */
} Block;

typedef struct { size_t from, to; } Range;  /* positions of a block */

INLINE f32x16 load_kv(const char *p, size_t index, KVType type) {
    return type == KV_F16 ? f32_load_f16((const uint16_t *)p + index) : f32_load((const float *)p + index);
}

/* Whether Q rows are so few that they wait for memory, which is fastest read in order: keys in two streams,
   values by whole rows. */
#define FEW_ROWS(Q) (2 * (Q) <= ATTEND_QUERIES)

/* Prefetch n values from `index` on of the next block, which lies `next` bytes behind p. The cache is read in
   streams too short for the hardware prefetcher. */
INLINE void prefetch_next(const char *p, ptrdiff_t next, size_t index, size_t n, KVType type) {
    size_t size = type == KV_F16 ? 2 : 4;
    for (size_t byte = 0; byte < n * size; byte += 64) __builtin_prefetch(p + next + index * size + byte);
}

/* The scores of Q query rows at V vectors of positions of a block, from vector number `vector` on. */
INLINE void scores_block(const size_t Q, const size_t V, float *scores, const float *const *q, const Block *b,
                         size_t vector, KVType type) {
    f32x16 sum[ATTEND_QUERIES][ATTEND_VECTORS];
    UNROLL for (size_t r = 0; r < Q; r++) UNROLL for (size_t v = 0; v < V; v++) sum[r][v] = f32_set(0);
    for (size_t d = 0; d < b->head_dim; d++) {
        prefetch_next(b->keys, b->next, (vector * b->head_dim + d * V) * LANES, V * LANES, type);
        f32x16 k[ATTEND_VECTORS];
        UNROLL for (size_t v = 0; v < V; v++)
            k[v] = load_kv(b->keys, ((vector + v) * b->head_dim + d) * LANES, type);
        UNROLL for (size_t r = 0; r < Q; r++) {
            f32x16 a = f32_set(q[r][d]);
            UNROLL for (size_t v = 0; v < V; v++) sum[r][v] = f32_fma(a, k[v], sum[r][v]);
        }
    }
    UNROLL for (size_t r = 0; r < Q; r++) UNROLL for (size_t v = 0; v < V; v++)
        f32_store(scores + r * KV_BLOCK + (vector + v) * LANES, sum[r][v]);
}

INLINE void scores_rows(const size_t Q, float *scores, const float *const *q, const Block *b,
                        size_t n_vectors, KVType type) {
    const size_t V = FEW_ROWS(Q) && ATTEND_VECTORS > 2 ? 2 : ATTEND_VECTORS;
    size_t v = 0;
    for (; v + V <= n_vectors; v += V) scores_block(Q, V, scores, q, b, v, type);
    for (; v < n_vectors; v++) scores_block(Q, 1, scores, q, b, v, type);
}

/* p (rows, KV_BLOCK) = q . k over the first n_vectors * LANES positions of a block */
INLINE void scores_float(float *p, const float *const *q, size_t rows, const Block *b, size_t n_vectors,
                         KVType type) {
    size_t r = 0;
    for (; r + ATTEND_QUERIES <= rows; r += ATTEND_QUERIES)
        scores_rows(ATTEND_QUERIES, p + r * KV_BLOCK, q + r, b, n_vectors, type);
    for (; ATTEND_QUERIES > 2 && r + 2 <= rows; r += 2)
        scores_rows(2, p + r * KV_BLOCK, q + r, b, n_vectors, type);
    for (; r < rows; r++) scores_rows(1, p + r * KV_BLOCK, q + r, b, n_vectors, type);
}

/* o[r] += sum over positions of p[r][j] v[j], for Q rows and V vectors of dimensions from `d` on */
INLINE void values_block(const size_t Q, const size_t V, float *o, const float *p, const Block *b, size_t d,
                         Range positions, KVType type) {
    f32x16 sum[ATTEND_QUERIES][2 * ATTEND_VECTORS];
    size_t width = b->width;
    UNROLL for (size_t r = 0; r < Q; r++)
        UNROLL for (size_t v = 0; v < V; v++) sum[r][v] = f32_load(o + r * width + d + v * LANES);
    for (size_t j = positions.from; j < positions.to; j++) {
        prefetch_next(b->values, b->next, j * width + d, V * LANES, type);
        f32x16 x[2 * ATTEND_VECTORS];
        UNROLL for (size_t v = 0; v < V; v++) x[v] = load_kv(b->values, j * width + d + v * LANES, type);
        UNROLL for (size_t r = 0; r < Q; r++) {
            f32x16 a = f32_set(p[r * KV_BLOCK + j]);
            UNROLL for (size_t v = 0; v < V; v++) sum[r][v] = f32_fma(a, x[v], sum[r][v]);
        }
    }
    UNROLL for (size_t r = 0; r < Q; r++)
        UNROLL for (size_t v = 0; v < V; v++) f32_store(o + r * width + d + v * LANES, sum[r][v]);
}

/* o[r] += sum over the given positions of p[r][j] v[j], for Q rows and all dimensions. */
INLINE void add_values(const size_t Q, float *o, const float *p, const Block *b, Range positions,
                       KVType type) {
    size_t d = 0;
    if (FEW_ROWS(Q))
        for (; d + 2 * LANES * ATTEND_VECTORS <= b->width; d += 2 * LANES * ATTEND_VECTORS)
            values_block(Q, 2 * ATTEND_VECTORS, o, p, b, d, positions, type);
    for (; d + LANES * ATTEND_VECTORS <= b->width; d += LANES * ATTEND_VECTORS)
        values_block(Q, ATTEND_VECTORS, o, p, b, d, positions, type);
    for (; d < b->width; d += LANES) values_block(Q, 1, o, p, b, d, positions, type);
}

/* o (Q rows) += p v. The rows go together over the positions that all of them see, then each alone over the
   rest of its own; rows come in order of position. */
INLINE void values_rows(const size_t Q, float *o, const float *p, const Block *b, const size_t *seen,
                        KVType type) {
    add_values(Q, o, p, b, (Range){0, seen[0]}, type);
    for (size_t r = 1; r < Q; r++)
        if (seen[r] > seen[0])
            add_values(1, o + r * b->width, p + r * KV_BLOCK, b, (Range){seen[0], seen[r]}, type);
}

/* o (rows, width) = p v, each row over the positions it has seen */
INLINE void values_float(float *o, const float *p, size_t rows, const Block *b, const size_t *seen,
                         KVType type) {
    size_t r = 0;
    memset(o, 0, rows * b->width * sizeof *o);
    for (; r + ATTEND_QUERIES <= rows; r += ATTEND_QUERIES)
        values_rows(ATTEND_QUERIES, o + r * b->width, p + r * KV_BLOCK, b, seen + r, type);
    for (; ATTEND_QUERIES > 2 && r + 2 <= rows; r += 2)
        values_rows(2, o + r * b->width, p + r * KV_BLOCK, b, seen + r, type);
    for (; r < rows; r++) values_rows(1, o + r * b->width, p + r * KV_BLOCK, b, seen + r, type);
}
