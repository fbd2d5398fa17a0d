/* Attention: softmax(q . k) v over the blocks of the cache, at absolute positions, merged in order
   (FlashAttention, https://arxiv.org/abs/2205.14135). */

/* p = exp(score - max) in place for the first `seen` positions of a block, 0 beyond them up to a whole
   vector. Returns the sum of p; NaN if a score is NaN or infinite. (A score of -infinity comes from a damaged
   key, and must not pass for a weight of 0.) */
static float exponentiate(float *p, size_t seen, float *max) {
    size_t end = PADDED(seen);
    for (size_t j = seen; j < end; j++) p[j] = -FLT_MAX;
    f32x16 m = f32_load(p), sum = f32_mul(m, f32_set(0));  /* 0, and NaN if a score is not finite */
    for (size_t j = LANES; j < end; j += LANES) {
        f32x16 score = f32_load(p + j);
        m = f32_max(m, score);
        sum = f32_fma(score, f32_set(0), sum);
    }
    *max = f32_max_lanes(m);
    for (size_t j = 0; j < end; j += LANES) {
        f32x16 e = f32_exp(f32_sub(f32_load(p + j), f32_set(*max)));
        f32_store(p + j, e);
        sum = f32_add(sum, e);
    }
    return f32_sum_lanes(sum);
}

/* weights[j] = exp(score - max) * inverse in place of the scores of n positions */
static void normalize_weights(float *weights, size_t n, float max, float inverse) {
    for (size_t j = 0; j < n; j += LANES) {
        f32x16 score = load_left(weights + j, n - j, 0);
        f32x16 weight = f32_mul(f32_exp(f32_sub(score, f32_set(max))), f32_set(inverse));
        store_left(weights + j, weight, n - j);
    }
}

/* Merge a block's (max, sum, o) into the running ones of a row. */
static void merge(float *max, float *sum, float *out, float block_max, float block_sum, const float *o,
                  size_t n) {
    float larger = block_max > *max ? block_max : *max;
    float exponent[LANES] = {*max - larger, block_max - larger}, factor[LANES];
    f32_store(factor, f32_exp(f32_load(exponent)));
    *max = larger;
    *sum = fmaf(*sum, factor[0], block_sum * factor[1]);
    for (size_t d = 0; d < n; d++) out[d] = fmaf(out[d], factor[0], o[d] * factor[1]);
}

/* How many positions of the block that begins at `start` a token at `position` sees: all up to its own. */
INLINE size_t seen_in_block(size_t position, size_t start) {
    return position < start ? 0 : position + 1 - start < KV_BLOCK ? position + 1 - start : KV_BLOCK;
}

/* Block `index` of the task's keys and values. The next block is prefetched meanwhile, unless so many rows
   use this one that memory has time enough. */
INLINE Block block_at(const Attention *a, size_t index, int last, KVType type) {
    int ahead = !last && (type == KV_I8 || a->n_tokens * a->group <= 2 * ATTEND_QUERIES);
    return (Block){.keys = a->blocks[index] + a->k_offset, .values = a->blocks[index] + a->v_offset,
                   .head_dim = a->head_dim, .width = PADDED(a->head_dim),
                   .next = ahead ? a->blocks[index + 1] - a->blocks[index] : 0};
}

INLINE void attend(const Attention *a, KVType type) {
    size_t rows = a->n_tokens * a->group, width = PADDED(a->head_dim), last = a->position + a->n_tokens - 1;
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
    for (size_t index = 0; index <= last / KV_BLOCK; index++) {
        size_t start = index * KV_BLOCK, filled = seen_in_block(last, start), seen[ATTENTION_ROWS];
        float block_max[ATTENTION_ROWS], block_sum[ATTENTION_ROWS];
        Block block = block_at(a, index, index == last / KV_BLOCK, type);
        if (type == KV_I8 && index == 0) quantize_queries(&q8, q, rows, o, &block);
        if (type == KV_I8) scores_int8(p, &q8, rows, &block, filled);
        else scores_float(p, q, rows, &block, PADDED(filled) / LANES, type);

        for (size_t r = 0; r < rows; r++) {  /* an earlier token of the task may end before this block */
            seen[r] = seen_in_block(a->position + r / a->group, start);
            if (a->weights) memcpy(weights[r] + start, p + r * KV_BLOCK, seen[r] * sizeof *p);
            if (seen[r]) block_sum[r] = exponentiate(p + r * KV_BLOCK, seen[r], &block_max[r]);
        }

        if (type == KV_I8) values_int8(o, &p8, p, rows, &block, seen, filled);
        else values_float(o, p, rows, &block, seen, type);

        for (size_t r = 0; r < rows; r++) {
            if (index == 0) {
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
