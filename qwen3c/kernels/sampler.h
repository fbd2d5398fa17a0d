/* What the sampler and the router ask for: softmax, and the largest of many. */

static float exponentials(float *y, const float *x, size_t n, float inverse_temperature) {
    f32x16 largest = f32_set(-INFINITY), sum = f32_set(0);
    for (size_t i = 0; i < n; i += LANES)
        largest = f32_max(largest, load_left(x + i, n - i, -INFINITY));
    f32x16 max = f32_set(f32_max_lanes(largest)), factor = f32_set(inverse_temperature);
    for (size_t i = 0; i < n; i += LANES) {
        f32x16 v = load_left(x + i, n - i, -INFINITY);
        f32x16 e = f32_exp(f32_mul(f32_sub(v, max), factor));
        store_left(y + i, e, n - i);
        sum = f32_add(sum, e);
    }
    return f32_sum_lanes(sum);
}

INLINE int ranks_before(const float *x, int32_t a, int32_t b) {
    return x[a] > x[b] || (x[a] == x[b] && a < b);
}

/* The heap holds the best ids so far, the worst of them at the top. Restore that order below `parent`. */
static void sift_down(int32_t *heap, size_t n, size_t parent, const float *x) {
    for (size_t child; (child = 2 * parent + 1) < n; parent = child) {
        if (child + 1 < n && ranks_before(x, heap[child], heap[child + 1])) child++;
        if (!ranks_before(x, heap[parent], heap[child])) return;
        int32_t swap = heap[parent];
        heap[parent] = heap[child];
        heap[child] = swap;
    }
}

#define NAN_BLOCK 1024  /* values that are looked at once more while they are near */

INLINE int any_nan(const float *x, size_t n) {
    int nan = 0;
    for (size_t i = 0; i < n; i++) nan |= x[i] != x[i];
    return nan;
}

static int top_k(int32_t *ids, const float *x, size_t n, size_t k) {
    size_t known = k;  /* how many of x are known to be numbers */
    if (any_nan(x, k)) return 1;
    for (size_t i = 0; i < k; i++) ids[i] = (int32_t)i;
    for (size_t parent = k / 2; parent-- > 0;) sift_down(ids, k, parent, x);
    for (size_t i = k; i < n;) {
        size_t end = n - i < 4 * LANES ? n : i + 4 * LANES;
        while (known < end) {
            size_t more = n - known < NAN_BLOCK ? n - known : NAN_BLOCK;
            if (any_nan(x + known, more)) return 1;
            known += more;
        }
        if (i + 4 * LANES <= n) {  /* skip four vectors at once: most hold nothing large enough */
            f32x16 a = f32_max(f32_load(x + i), f32_load(x + i + LANES));
            f32x16 b = f32_max(f32_load(x + i + 2 * LANES), f32_load(x + i + 3 * LANES));
            if (f32_max_lanes(f32_max(a, b)) <= x[ids[0]]) {
                i = end;
                continue;
            }
        }
        for (; i < end; i++) {
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
