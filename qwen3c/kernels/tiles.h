/* What the exporter asks for: rows of a source as tiles of int8. */

static void load_source(float *w, const void *row, SourceType type, size_t offset, size_t n) {
    if (row == NULL) memset(w, 0, n * sizeof *w);
    else if (type == SOURCE_F32) memcpy(w, (const float *)row + offset, n * sizeof *w);
    else if (type == SOURCE_F16)
        for (size_t i = 0; i < n; i += LANES)
            f32_store(w + i, f32_load_f16((const uint16_t *)row + offset + i));
    else
        for (size_t i = 0; i < n; i++) {
            uint16_t half;
            memcpy(&half, (const uint16_t *)row + offset + i, 2);
            uint32_t bits = (uint32_t)half << 16;
            memcpy(w + i, &bits, 4);
        }
}

/* The largest weight whose scale fits in fp16, for codes up to `largest`. */
#define MAX_WEIGHT(largest) ((largest) * 65504.0f)

static float sum_of_squares(const float *w, size_t n) {
    f32x16 squares = f32_set(0);
    for (size_t i = 0; i < n; i += LANES) {
        f32x16 v = f32_load(w + i);
        squares = f32_fma(v, v, squares);
    }
    return f32_sum_lanes(squares);
}

/* The index of the first value that cannot be stored: a NaN, infinite or too large. */
static int64_t first_bad(const float *w, size_t n, float limit) {
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(w[i]) <= limit)) return (int64_t)i;
    return 0;
}

/* What comes of rounding one row of one group with a given scale, beside the codes. */
typedef struct {
    float largest;  /* max |w - scale code| */
    float lost;     /* sum (w - scale code)^2 */
    float fitted;   /* sum w code / sum code^2, the scale that loses least for these codes; 0 if they are 0 */
} Rounded;

static Rounded round_group(int8_t *codes, const float *w, float scale, size_t n) {
    f32x16 largest = f32_set(0), lost = f32_set(0), products = f32_set(0), squares = f32_set(0);
    for (size_t i = 0; i < n; i += LANES) {
        f32x16 v = f32_load(w + i), code = codes_of(v, scale);
        f32_store_i8(codes + i, code);
        f32x16 off = f32_sub(v, f32_mul(code, f32_set(scale)));
        largest = f32_max(largest, f32_abs(off));
        lost = f32_add(f32_mul(off, off), lost);
        products = f32_add(f32_mul(v, code), products);
        squares = f32_add(f32_mul(code, code), squares);  /* exact: at most 16 * 127^2 a lane */
    }
    float square = f32_sum_lanes(squares);
    float fitted = square > 0 ? f32_sum_lanes(products) / square : 0.0f;
    return (Rounded){f32_max_lanes(largest), f32_sum_lanes(lost), fitted};
}

/* ENCODING_INT8; its steps are too fine for an importance to matter. */
static void quantize_tiles_int8(uint8_t *tiles, const void *const rows[LANES], SourceType type,
                                const float *importance, size_t columns, size_t group_size,
                                QuantizationError *error) {
    (void)importance;
    float w[LANES][256], max[LANES], scales[LANES], first[LANES], second[LANES];
    int8_t codes[LANES][256], refitted[256];
    uint16_t halves[LANES], refitted_halves[LANES];
    for (size_t g = 0; g < columns / group_size; g++, tiles += TILE_BYTES(group_size)) {
        Rounded rounded[LANES];
        float square[LANES];
        for (size_t r = 0; r < LANES; r++) {
            load_source(w[r], rows[r], type, g * group_size, group_size);
            max[r] = largest_magnitude(w[r], group_size);
            square[r] = sum_of_squares(w[r], group_size);
            if (!(max[r] <= MAX_WEIGHT(127.0f))) {
                int64_t at = (int64_t)(r * columns + g * group_size);
                if (error->bad < 0) error->bad = at + first_bad(w[r], group_size, MAX_WEIGHT(127.0f));
                max[r] = square[r] = 0;
            }
            scales[r] = max[r] / 127.0f;
        }
        round_scales(halves, first, scales, max);
        for (size_t r = 0; r < LANES; r++) {
            rounded[r] = round_group(codes[r], w[r], first[r], group_size);
            scales[r] = rounded[r].fitted;
        }
        round_scales(refitted_halves, second, scales, max);
        for (size_t r = 0; r < LANES; r++) {
            Rounded again = rounded[r];
            if (second[r] != first[r]) again = round_group(refitted, w[r], second[r], group_size);
            if (again.lost < rounded[r].lost) {
                rounded[r] = again;
                halves[r] = refitted_halves[r];
                memcpy(codes[r], refitted, group_size);
            }
            for (size_t c = 0; c < group_size; c += 4) memcpy(tiles + c * LANES + r * 4, &codes[r][c], 4);
            if (rounded[r].largest > error->largest) error->largest = rounded[r].largest;
            error->error_square += rounded[r].lost;
            error->square += square[r];
        }
        memcpy(tiles + LANES * group_size, halves, sizeof halves);
    }
}
