/* Rows of activations: normalised, quantised, gated, added. */

static void rmsnorm(float *y, const float *x, const float *weight, size_t n, float eps) {
    f32x16 squares = f32_set(0);
    size_t whole = n / LANES * LANES;  /* whole vectors in a loop without the test of load_left */
    for (size_t i = 0; i < whole; i += LANES) {
        f32x16 v = f32_load(x + i);
        squares = f32_fma(v, v, squares);
    }
    if (whole < n) {
        f32x16 v = load_left(x + whole, n - whole, 0);
        squares = f32_fma(v, v, squares);
    }
    float inverse = 1.0f / sqrtf(f32_sum_lanes(squares) / (float)n + eps);
    for (size_t i = 0; i < n; i++) y[i] = x[i] * inverse * weight[i];
}

/* The largest |x| of a group; NaN or infinite if one of its values is. */
INLINE float largest_magnitude(const float *x, size_t n) {
    f32x16 largest = f32_set(0);
    size_t whole = n / LANES * LANES;
    for (size_t i = 0; i < whole; i += LANES) largest = f32_max_magnitude(largest, f32_abs(f32_load(x + i)));
    if (whole < n) largest = f32_max_magnitude(largest, f32_abs(load_left(x + whole, n - whole, 0)));
    return f32_max_magnitude_lanes(largest);
}

static void quantize(Int8Rows *row, const float *x, size_t n, size_t group_size) {
    for (size_t g = 0; g < n / group_size; g += LANES) {  /* LANES groups at a time: one division for all */
        size_t n_groups = n / group_size - g < LANES ? n / group_size - g : LANES;
        float max[LANES] = {0}, inverse[LANES];
        for (size_t i = 0; i < n_groups; i++)
            max[i] = largest_magnitude(x + (g + i) * group_size, group_size);
        for (size_t i = 0; i < LANES; i++) inverse[i] = 127.0f / (max[i] < 1e-30f ? INFINITY : max[i]);
        for (size_t i = 0; i < LANES; i++)
            max[i] = (max[i] < 1e-30f ? 0.0f : max[i] < INFINITY ? max[i] : NAN) / 127.0f;
        memcpy(row->scales + g, max, n_groups * sizeof *max);
        for (size_t i = 0; i < n_groups; i++) {
            size_t first = (g + i) * group_size;
            if (max[i] != max[i]) {  /* a value is NaN or infinite: the scale NaN says so, no code could */
                memset(row->codes + first, 0, group_size);
                row->sums[g + i] = 0;
                continue;
            }
            f32x16 sum = f32_set(0);  /* of integers below 2^24: exact */
            for (size_t c = first; c < first + group_size; c += LANES) {
                f32x16 code = f32_round(f32_mul(f32_load(x + c), f32_set(inverse[i])));
                f32_store_i8(row->codes + c, code);
                sum = f32_add(sum, code);
            }
            row->sums[g + i] = 128 * (int32_t)f32_sum_lanes(sum);
        }
    }
}

static void swiglu(float *y, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i += LANES) {
        f32x16 g = load_left(gate + i, n - i, 0), u = load_left(up + i, n - i, 0);
        f32x16 e = f32_exp(f32_sub(f32_set(0), g));
        store_left(y + i, f32_mul(f32_div(g, f32_add(f32_set(1), e)), u), n - i);
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
        for (size_t c = 0; c < columns; c += LANES)
            sum = f32_fma(load_left(w + c, columns - c, 0), load_left(x + c, columns - c, 0), sum);
        y[r] = f32_sum_lanes(sum);
    }
}
