/* Rows of a source as tiles of 4 and 6 bits, each group with the scale that loses least of some that are
   tried. A lane is a row. */
#include <stdlib.h>

/* The codebook of every tile row that is written here: the quantiles of IQ4_NL (ggml) as 6-bit codes, so that
   code + 32 times an activation never saturates vpmaddubsw. */
static const int8_t codebook_6_bits[16] = {
    -31, -25, -20, -16, -12, -9, -5, -2, 0, 3, 6, 9, 13, 17, 22, 28,
};

/* What there is to choose among in one group: codes and scales. */
typedef struct {
    float nearest[128];  /* ENCODING_INT4: at 64 + floor(2 x) the code nearest to x */
    uint8_t index[128];  /* and its place in the codebook */
} Choice;

static void choose_codes(Choice *choice, const int8_t codebook[16]) {
    for (int at = 0; at < 128; at++) {
        int best = 0;
        for (int i = 1; i < 16; i++) {
            int middle = 2 * (at - 64) + 1;  /* in quarters */
            if (abs(4 * codebook[i] - middle) < abs(4 * codebook[best] - middle)) best = i;
        }
        choice->nearest[at] = codebook[best];
        choice->index[at] = (uint8_t)best;
    }
}

/* One group of LANES rows, its columns one after the other. */
typedef struct {
    float w[MAX_GROUP][LANES];
    float importance[MAX_GROUP];
    size_t n;
} Columns;

/* Scales that suit a group, one for each row, and how much they lose. */
typedef struct {
    float scale[LANES], lost[LANES];
} Fit;

/* The place of x in a Choice, as an integer below 64 either way. */
INLINE f32x16 place_of(f32x16 x) {
    f32x16 limit = f32_set(63);  /* floor(2 x), of halves either of two that are as near */
    f32x16 twice = f32_fma(x, f32_set(2), f32_set(-0.5f));
    return f32_round(f32_max(f32_sub(f32_set(0), limit), f32_min(limit, twice)));
}

/* The nearest codes of a whole group for 1 / scale. In three passes: what a vector stores is not loaded as
   single numbers, or the other way round, before it has left the store buffer. */
INLINE void nearest_codes(const Encoding encoding, const Choice *choice, const Columns *group, f32x16 inverse,
                          float (*codes)[LANES]) {
    int8_t places[MAX_GROUP * LANES];
    float *code = codes[0];
    for (size_t c = 0; c < group->n; c++) {
        f32x16 x = f32_mul(f32_load(group->w[c]), inverse);
        if (encoding == ENCODING_INT4) f32_store_i8(places + c * LANES, place_of(x));
        else f32_store(codes[c], f32_round(f32_max(f32_set(-31), f32_min(f32_set(31), x))));
    }
    for (size_t i = 0; encoding == ENCODING_INT4 && i < group->n * LANES; i++)
        code[i] = choice->nearest[64 + places[i]];
}

/* 1 / scale; 0 where that or the scale is not a number to divide by. */
static void invert(float *inverse, const float *scale) {
    for (size_t r = 0; r < LANES; r++)
        inverse[r] = scale[r] != 0 && fabsf(scale[r]) < INFINITY ? 1.0f / scale[r] : 0.0f;
}

/* Round a group with `scale` as fp16: `best` becomes what loses less in each row; returns in `fitted` the
   scales that suit the codes best. */
INLINE void try_scales(const Encoding encoding, const Choice *choice, const Columns *group, Fit *best,
                       float *fitted, const float *wanted) {
    float scale[LANES], inverse[LANES], loss[LANES], product[LANES], square[LANES];
    uint16_t halves[LANES];
    f32_store_f16(halves, f32_load(wanted));
    f32_store(scale, f32_load_f16(halves));
    invert(inverse, scale);
    float codes[MAX_GROUP][LANES];
    nearest_codes(encoding, choice, group, f32_load(inverse), codes);
    f32x16 s = f32_load(scale), lost = f32_set(0), products = lost, squares = lost;
    for (size_t c = 0; c < group->n; c++) {
        f32x16 w = f32_load(group->w[c]), code = f32_load(codes[c]);
        f32x16 importance = f32_set(group->importance[c]), weighted = f32_mul(importance, code);
        f32x16 off = f32_sub(w, f32_mul(s, code));
        lost = f32_fma(f32_mul(importance, off), off, lost);
        products = f32_fma(weighted, w, products);
        squares = f32_fma(weighted, code, squares);
    }
    f32_store(loss, lost);
    f32_store(product, products);
    f32_store(square, squares);
    for (size_t r = 0; r < LANES; r++) {
        fitted[r] = square[r] > 0 ? product[r] / square[r] : 0.0f;
        if (loss[r] < best->lost[r]) best->lost[r] = loss[r], best->scale[r] = scale[r];
    }
}

/* The weight of the largest magnitude in each row, the first of them. */
static void extremes(float *extreme, const Columns *group) {
    memset(extreme, 0, LANES * sizeof *extreme);
    for (size_t c = 0; c < group->n; c++)
        for (size_t r = 0; r < LANES; r++)
            if (fabsf(group->w[c][r]) > fabsf(extreme[r])) extreme[r] = group->w[c][r];
}

INLINE void fit_scales(const Encoding encoding, const Choice *choice, const Columns *group, Fit *best) {
    /* the code that the largest weight may come to, and how far past it */
    static const float ends_int4[] = {28, -31}, factors_int4[] = {0.9f, 1.0f, 1.1f};
    static const float ends_int6[] = {31}, factors_int6[] = {0.95f, 1.0f, 1.05f};
    const float *ends = encoding == ENCODING_INT4 ? ends_int4 : ends_int6;
    const float *factors = encoding == ENCODING_INT4 ? factors_int4 : factors_int6;
    float extreme[LANES], wanted[LANES], fitted[LANES], again[LANES];
    extremes(extreme, group);
    for (size_t r = 0; r < LANES; r++) {
        best->scale[r] = 0;
        best->lost[r] = INFINITY;
        if (encoding == ENCODING_INT6) extreme[r] = fabsf(extreme[r]);
    }
    for (size_t e = 0; e < (encoding == ENCODING_INT4 ? 2 : 1); e++)
        for (size_t f = 0; f < 3; f++) {
            for (size_t r = 0; r < LANES; r++) wanted[r] = extreme[r] / ends[e] * factors[f];
            try_scales(encoding, choice, group, best, fitted, wanted);
            try_scales(encoding, choice, group, best, again, fitted);
        }
}

/* Codes for their scales, each as it is stored but in a byte of its own: an index, or code + 32. */
INLINE void round_columns(const Encoding encoding, const Choice *choice, const Columns *group,
                          const float *scale, uint8_t (*stored)[LANES], QuantizationError *error) {
    float inverse[LANES], codes[MAX_GROUP][LANES], off[LANES], square[LANES];
    invert(inverse, scale);
    nearest_codes(encoding, choice, group, f32_load(inverse), codes);
    f32x16 largest = f32_set(0), lost = largest, squares = largest;
    for (size_t c = 0; c < group->n; c++) {
        f32x16 w = f32_load(group->w[c]), d = f32_sub(w, f32_mul(f32_load(scale), f32_load(codes[c])));
        largest = f32_max(largest, f32_abs(d));
        lost = f32_fma(d, d, lost);
        squares = f32_fma(w, w, squares);
        for (size_t r = 0; r < LANES; r++) {
            int code = (int)codes[c][r];
            stored[c][r] = encoding == ENCODING_INT4 ? choice->index[64 + 2 * code] : (uint8_t)(code + 32);
        }
    }
    f32_store(off, lost);
    f32_store(square, squares);
    for (size_t r = 0; r < LANES; r++) error->error_square += off[r], error->square += square[r];
    float worst = f32_max_lanes(largest);
    if (worst > error->largest) error->largest = worst;
}

INLINE void pack_tile(const Encoding encoding, uint8_t *tile, uint8_t (*stored)[LANES], size_t group_size) {
    enum { BLOCK = 4 * LANES };
    memset(tile, 0, code_bytes(encoding, group_size));
    uint8_t *high = tile + LANES * group_size / 2;
    for (size_t c = 0; c < group_size; c++)
        for (size_t r = 0; r < LANES; r++) {
            size_t lane = r * 4 + c % 4;
            tile[c / 8 * BLOCK + lane] |= (uint8_t)((stored[c][r] & 15) << c / 4 % 2 * 4);
            if (encoding == ENCODING_INT6)
                high[c / 16 * BLOCK + lane] |= (uint8_t)(stored[c][r] >> 4 << c / 4 % 4 * 2);
        }
}

/* The columns of a group from the rows of a source; a row with a weight that cannot be stored becomes
   zeros. */
static void load_columns(Columns *group, const void *const rows[LANES], SourceType type, size_t columns,
                         size_t first, float limit, QuantizationError *error) {
    float w[MAX_GROUP];
    for (size_t r = 0; r < LANES; r++) {
        load_source(w, rows[r], type, first, group->n);
        if (!(largest_magnitude(w, group->n) <= limit)) {
            if (error->bad < 0) error->bad = (int64_t)(r * columns + first) + first_bad(w, group->n, limit);
            memset(w, 0, sizeof w);
        }
        for (size_t c = 0; c < group->n; c++) group->w[c][r] = w[c];
    }
}

INLINE void quantize_tiles_fitted(const Encoding encoding, uint8_t *tiles, const void *const rows[LANES],
                                  SourceType type, const float *importance, size_t columns,
                                  size_t group_size, QuantizationError *error) {
    Choice choice;
    Columns group = {.n = group_size};
    Fit best;
    uint8_t stored[MAX_GROUP][LANES];
    if (encoding == ENCODING_INT4) {
        choose_codes(&choice, codebook_6_bits);
        memset(tiles, 0, CODEBOOK_BYTES);
        memcpy(tiles, codebook_6_bits, sizeof codebook_6_bits);
        tiles += CODEBOOK_BYTES;
    }
    for (size_t first = 0; first < columns; first += group_size, tiles += tile_bytes(encoding, group_size)) {
        load_columns(&group, rows, type, columns, first, MAX_WEIGHT(31.0f), error);
        for (size_t c = 0; c < group_size; c++) group.importance[c] = importance ? importance[first + c] : 1;
        fit_scales(encoding, &choice, &group, &best);
        round_columns(encoding, &choice, &group, best.scale, stored, error);
        pack_tile(encoding, tiles, stored, group_size);
        f32_store_f16((uint16_t *)(tiles + code_bytes(encoding, group_size)), f32_load(best.scale));
    }
}

static void quantize_tiles_int4(uint8_t *tiles, const void *const rows[LANES], SourceType type,
                                const float *importance, size_t columns, size_t group_size,
                                QuantizationError *error) {
    quantize_tiles_fitted(ENCODING_INT4, tiles, rows, type, importance, columns, group_size, error);
}

static void quantize_tiles_int6(uint8_t *tiles, const void *const rows[LANES], SourceType type,
                                const float *importance, size_t columns, size_t group_size,
                                QuantizationError *error) {
    quantize_tiles_fitted(ENCODING_INT6, tiles, rows, type, importance, columns, group_size, error);
}
