/* Products of product.h by AMX: one instruction multiplies T rows of activations (T, K) with a tile of
   weights, K <= 64, as (K / 4, LANES, 4), which is how a matrix is stored. Dot products of a group are exact
   in int32 whoever adds them up, so the bits are those of every other instruction set. */

/* With fewer rows the dot instructions of AVX-512 are as fast; the tile registers load codes from memory, so
   packed ones are unpacked into it first. */
#define TILE_MULTIPLIER_TOKENS(encoding) ((encoding) == ENCODING_INT8 ? 3 : 8)

/* Tile registers, by number: it is put into the text of instructions. */
#define DOTS 0
#define ACTIVATIONS 1
#define WEIGHTS 2

/* Bytes of codes that are unpacked at a time; with the activations they fit in the L1 cache. */
#define ALIGNED_BYTES 32768

/* Consecutive groups of a tile row, ready to be multiplied. */
typedef struct {
    const uint8_t *codes, *scales;  /* of the first group */
    size_t next_codes, next_scales;  /* bytes from a group to the next */
    size_t first, n;  /* the groups' number in the row, and how many */
    size_t depth;     /* columns that are multiplied at a time */
} Strip;

/* Set the tile registers up for T rows of activations and `depth` columns at a time. */
static void configure_tiles(size_t T, size_t depth) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1,
                .row_bytes = {4 * LANES, (uint16_t)depth, 4 * LANES},
                .rows = {(uint8_t)T, (uint8_t)T, (uint8_t)(depth / 4)}};
    __asm__ volatile("" : : "r"(&config) : "memory");  /* gcc's own says that it reads 8 bytes of the 64 */
    _tile_loadconfig(&config);
}

/* dots (T, LANES) of one group: T rows of codes, `columns` bytes apart, with a tile of weights. */
INLINE void tile_dots(int32_t *dots, const int8_t *x, size_t columns, const uint8_t *codes, size_t group_size,
                      size_t depth) {
    _tile_zero(DOTS);
    for (size_t c = 0; c < group_size; c += depth) {
        _tile_loadd(ACTIVATIONS, x + c, columns);
        _tile_loadd(WEIGHTS, codes + c * LANES, 4 * LANES);
        _tile_dpbssd(DOTS, ACTIVATIONS, WEIGHTS);
    }
    _tile_stored(DOTS, dots, 4 * LANES);
}

/* sum[t] += the dot products of one group, scaled; the activations' scales are x_groups floats apart. */
INLINE void add_dots(const size_t T, f32x16 *sum, const int32_t *dots, const uint8_t *scales,
                     const float *x_scales, size_t x_groups) {
    f32x16 scale = f32_load_f16((const uint16_t *)scales);
    const float *four = x_scales;  /* scales of four tokens by one address: T addresses would not fit */
    UNROLL for (size_t t = 0; t < T; t++) {
        if (t && t % 4 == 0) {
            four += 4 * x_groups;
            __asm__("" : "+r"(four));
        }
        f32x16 factor = f32_mul(scale, f32_set(four[t % 4 * x_groups]));
        sum[t] = f32_fma(f32_from_i32(_mm512_load_si512(dots + t * LANES)), factor, sum[t]);
    }
}

/* The rows of y from `row` on (+)= a strip times T tokens from `token` on. While the tile multiplier works on
   a group, the lanes add up the one before. */
INLINE void multiply_strip(const size_t T, const Product *p, const Strip *strip, size_t row, size_t token,
                           Ahead ahead) {
    size_t group_size = p->w.group_size, columns = p->columns, x_groups = columns / group_size;
    size_t left = p->w.n_rows - row;
    const uint8_t *codes = strip->codes, *scales = strip->scales;
    const int8_t *x = p->x->codes + token * columns + strip->first * group_size;
    const float *x_scales = p->x->scales + token * x_groups + strip->first;
    float *y = p->y + token * p->stride + row;
    _Alignas(64) int32_t dots[2][LANES * LANES];
    f32x16 sum[LANES];
    UNROLL for (size_t t = 0; t < T; t++) {
        sum[t] = strip->first ? load_left(y + t * p->stride, left, 0) : f32_set(0);
        __builtin_prefetch(y + t * p->stride, 1);  /* rows of y are far apart, none is in cache */
    }
    tile_dots(dots[0], x, columns, codes, group_size, strip->depth);
    for (size_t g = 1; g < strip->n; g++, scales += strip->next_scales, x_scales++, ahead.at += ahead.bytes) {
        x += group_size;
        codes += strip->next_codes;
        tile_dots(dots[g % 2], x, columns, codes, group_size, strip->depth);
        for (size_t at = 0; at < ahead.bytes; at += 64) __builtin_prefetch(ahead.at + at);
        add_dots(T, sum, dots[(g + 1) % 2], scales, x_scales, x_groups);
    }
    add_dots(T, sum, dots[(strip->n + 1) % 2], scales, x_scales, x_groups);
    UNROLL for (size_t t = 0; t < T; t++) store_left(y + t * p->stride, sum[t], left);
}

#define STRIP_OF(T) case T: multiply_strip(T, p, strip, row, token, ahead); break;

/* A strip times all tokens, in blocks of at most LANES of about equal size. Compiled once for all encodings:
   a strip's codes are int8. */
static __attribute__((noinline)) void multiply_tokens(const Product *p, const Strip *strip, size_t row) {
    size_t blocks = (p->n_tokens + LANES - 1) / LANES, configured = 0;
    size_t bytes = p->w.ahead_bytes * strip->n / p->w.n_groups, parts = blocks * strip->n;
    const uint8_t *ahead_of_row = p->w.ahead + row / LANES * p->w.ahead_bytes;
    Ahead ahead = {ahead_of_row + p->w.ahead_bytes * strip->first / p->w.n_groups,
                   (bytes + parts - 1) / parts};
    for (size_t token = 0, n; token < p->n_tokens; token += n, ahead.at += strip->n * ahead.bytes) {
        n = (p->n_tokens - token) / blocks--;
        if (n != configured) configure_tiles(configured = n, strip->depth);
        switch (n) {
            STRIP_OF(1) STRIP_OF(2) STRIP_OF(3) STRIP_OF(4) STRIP_OF(5) STRIP_OF(6) STRIP_OF(7) STRIP_OF(8)
            STRIP_OF(9) STRIP_OF(10) STRIP_OF(11) STRIP_OF(12) STRIP_OF(13) STRIP_OF(14) STRIP_OF(15)
            STRIP_OF(16)
        }
    }
}

/* A strip's codes as int8 at the beginning of cache lines. Half of the tiles of a matrix begin in the middle
   of one, which costs the tile registers a second read of each. */
INLINE void unpack_strip(const Encoding encoding, int8_t *aligned, Strip *strip, size_t group_size,
                         u6x64 codebook) {
    size_t group_bytes = LANES * group_size;
    for (size_t g = 0; g < strip->n; g++) {
        const uint8_t *tile = strip->codes + g * strip->next_codes;
        if (encoding == ENCODING_INT8) memcpy(aligned + g * group_bytes, tile, group_bytes);
        else unpack_tile(encoding, aligned + g * group_bytes, tile, codebook, group_size);
    }
    strip->codes = (const uint8_t *)aligned;
    strip->next_codes = group_bytes;
}

/* fp16 1.0: the scales of a matrix without scales */
static const uint16_t ones[LANES] = {
    0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00,
    0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00,
};

/* All of a product. */
INLINE void tile_multiply(const Encoding encoding, const Product *p, const int scaled) {
    _Alignas(64) int8_t aligned[ALIGNED_BYTES];
    const Tiles *w = &p->w;
    size_t group_bytes = LANES * w->group_size, steps = (w->group_size + 63) / 64;
    while (w->group_size % (4 * steps)) steps++;  /* groups are multiples of 16 columns */
    int unpacked = encoding != ENCODING_INT8 || p->n_tokens > LANES;
    size_t most = unpacked ? ALIGNED_BYTES / group_bytes : w->n_groups;
    for (size_t row = 0; row < w->n_rows; row += LANES) {
        const uint8_t *tiles = w->tiles + row / LANES * w->next_rows;
        u6x64 codebook = encoding == ENCODING_INT4 ? u6_codebook_of(tiles) : _mm512_setzero_si512();
        for (size_t g = 0; g < w->n_groups; g += most) {
            const uint8_t *codes = tiles + g * w->next_group;
            const uint8_t *behind = codes + code_bytes(encoding, w->group_size);
            Strip strip = {.codes = codes, .scales = scaled ? behind : (const uint8_t *)ones,
                           .next_codes = w->next_group, .next_scales = scaled ? w->next_group : 0, .first = g,
                           .n = w->n_groups - g < most ? w->n_groups - g : most,
                           .depth = w->group_size / steps};
            if (unpacked) unpack_strip(encoding, aligned, &strip, w->group_size, codebook);
            __asm__ volatile("" ::: "memory");  /* the codes are where the tile registers look for them */
            multiply_tokens(p, &strip, row);
        }
    }
    _tile_release();
}
