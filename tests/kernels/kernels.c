/* Runs every kernel of every table this CPU runs and prints one digest per kernel and table.

   The digests must be equal between tables, and between machines: `make test-arm` compares ARM under
   emulation with this machine. Inputs end at a page that must not be touched, so reading past them is a
   crash. Before that the scalar table, the spec, is held to plain loops in int64 and double. Exit status 1 if
   anything is off. */
#define _GNU_SOURCE
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels.h"

static int failures = 0;

#define CHECK(condition, ...) \
    do { \
        if (!(condition)) { \
            failures++; printf("FAILED %s: ", #condition); printf(__VA_ARGS__); printf("\n"); \
        } \
    } while (0)

/* ---- memory that ends at a forbidden page, random contents, digests */

static void *guarded(size_t size) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (size + page - 1) / page * page;
    char *p = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p + whole, page, PROT_NONE)) { perror("mmap"); exit(2); }
    return p + whole - size;
}

static void release(void *p, size_t size) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (size + page - 1) / page * page;
    munmap((char *)p + size - whole, whole + page);
}

static uint64_t state;
static uint32_t next(void) {  /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 2685821657736338717ull) >> 32);
}
static float uniform(float scale) { return ((float)(next() >> 8) / 8388608.0f - 1.0f) * scale; }

static float *floats(size_t n, float scale) {
    float *p = guarded(n * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = uniform(scale);
    return p;
}

static uint64_t digest;
static void add_digest(const void *data, size_t size) {  /* FNV-1a */
    for (size_t i = 0; i < size; i++) digest = (digest ^ ((const uint8_t *)data)[i]) * 1099511628211ull;
}
static void begin(uint64_t seed) {
    state = seed * 0x9e3779b97f4a7c15ull + 1;
    digest = 14695981039346656037ull;
}
static void end(const Kernels *k, const char *kernel) {
    printf("%s %s %016llx\n", kernel, k->name, (unsigned long long)digest);
}

/* ---- inputs with structure */

static size_t matrix_bytes(Encoding encoding, size_t rows, size_t columns, size_t group_size) {
    return (rows + 15) / 16 * tile_row_bytes(encoding, columns, group_size);
}
static uint8_t *random_matrix(Encoding encoding, size_t rows, size_t columns, size_t group_size) {
    size_t size = matrix_bytes(encoding, rows, columns, group_size), tile_size = tile_bytes(encoding, group_size);
    uint8_t *matrix = guarded(size), *tile = matrix;
    /* -128 too: a damaged file may hold it, as a code or in a codebook */
    for (size_t i = 0; i < size; i++) matrix[i] = (uint8_t)next();
    for (size_t row = 0; row < rows; row += 16) {
        tile += codebook_bytes(encoding);
        for (size_t t = 0; t < columns / group_size; t++, tile += tile_size)
            for (size_t r = 0; r < 16; r++) {
                uint16_t half = (uint16_t)(0x2000 + next() % 0x0c00);  /* 2^-7 .. 2^-4 */
                memcpy(tile + tile_size - 32 + 2 * r, &half, 2);
            }
    }
    return matrix;
}
static const uint8_t *tile_at(Encoding encoding, const uint8_t *matrix, size_t r, size_t g, size_t columns,
                              size_t group_size) {
    return matrix + r / 16 * tile_row_bytes(encoding, columns, group_size) + (encoding == ENCODING_INT4) * 32 +
           g * tile_bytes(encoding, group_size);
}
static int code_at(Encoding encoding, const uint8_t *matrix, size_t r, size_t column, size_t columns,
                   size_t group_size) {
    const uint8_t *tile = tile_at(encoding, matrix, r, column / group_size, columns, group_size);
    size_t c = column % group_size, lane = r % 16 * 4 + c % 4;
    if (encoding == ENCODING_INT8) return (int8_t)tile[c / 4 * 64 + lane];
    int nibble = tile[c / 8 * 64 + lane];
    nibble = c % 8 < 4 ? nibble % 16 : nibble / 16;
    if (encoding == ENCODING_INT4)
        return (matrix[r / 16 * tile_row_bytes(encoding, columns, group_size) + (size_t)nibble] + 32) % 64 - 32;
    int crumbs = tile[group_size * 8 + c / 16 * 64 + lane];
    for (size_t k = c % 16 / 4; k; k--) crumbs /= 4;
    return crumbs % 4 * 16 + nibble - 32;
}
static float scale_at(Encoding encoding, const uint8_t *matrix, size_t r, size_t g, size_t columns,
                      size_t group_size) {
    uint16_t half;
    const uint8_t *tile = tile_at(encoding, matrix, r, g, columns, group_size);
    memcpy(&half, tile + tile_bytes(encoding, group_size) - 32 + r % 16 * 2, 2);
    /* normal and positive: random_matrix makes no other */
    return ldexpf((float)(1024 + (half & 1023)), (half >> 10) - 25);
}
static Int8Rows int8_rows(size_t n, size_t columns, size_t group_size) {
    size_t groups = columns / group_size;
    return (Int8Rows){guarded(n * columns), guarded(n * groups * 4), guarded(n * groups * 4)};
}
static void quantize_all(const Kernels *k, Int8Rows *to, const float *x, size_t n, size_t columns,
                         size_t group_size) {
    for (size_t t = 0; t < n; t++) {
        size_t group = t * (columns / group_size);
        Int8Rows row = {to->codes + t * columns, to->scales + group, to->sums + group};
        k->quantize(&row, x + t * columns, columns, group_size);
    }
}
static void release_rows(Int8Rows rows, size_t n, size_t columns, size_t group_size) {
    release(rows.codes, n * columns);
    release(rows.scales, n * (columns / group_size) * 4);
    release(rows.sums, n * (columns / group_size) * 4);
}

/* ---- matrix products */

static const size_t group_sizes[] = {32, 64, 128, 256};

static void matmuls_of(const Kernels *k, int spec, Encoding e) {
    for (size_t gi = 0; gi < 4; gi++)
        for (size_t n = 1; n <= 18; n++) {
            size_t group_size = group_sizes[gi], columns = (n % 12 == 5 ? 19 : 3) * group_size,
                rows = 16 * (n % 4 + 1) - (n % 3 ? 0 : 5);
            uint8_t *w = random_matrix(e, rows, columns, group_size);
            float *x = floats(n * columns, 3), *y = guarded(n * rows * 4), *z = guarded(n * rows * 4);
            for (size_t c = 0; c < group_size; c++) x[c] = 0;  /* a group of zeros */
            /* codes of +-127 only */
            for (size_t c = group_size; c < 2 * group_size; c++) x[c] = c % 2 ? 3 : -3;
            Int8Rows xq = int8_rows(n, columns, group_size);
            quantize_all(k, &xq, x, n, columns, group_size);
            k->matmul_int8[e](y, rows, &xq, n, w, rows, columns, group_size);
            k->matmul_float32[e](z, rows, x, n, w, rows, columns, group_size);
            for (size_t i = 0; spec && i < n * rows; i++) {
                size_t t = i / rows, r = i % rows;
                float sum = 0, sum32 = 0;
                for (size_t g = 0; g < columns / group_size; g++) {
                    int64_t dot = 0;
                    float part = 0, scale = scale_at(e, w, r, g, columns, group_size);
                    for (size_t c = g * group_size; c < (g + 1) * group_size; c++) {
                        dot += code_at(e, w, r, c, columns, group_size) * xq.codes[t * columns + c];
                        part = fmaf(code_at(e, w, r, c, columns, group_size), x[t * columns + c], part);
                    }
                    sum = fmaf((float)dot, scale * xq.scales[t * (columns / group_size) + g], sum);
                    sum32 = fmaf(scale, part, sum32);
                }
                CHECK(y[i] == sum && z[i] == sum32, "matmul %d n %zu row %zu: %g %g, %g %g", (int)e, n, r, y[i], sum,
                      z[i], sum32);
            }
            add_digest(xq.codes, n * columns);
            add_digest(xq.scales, n * (columns / group_size) * 4);
            add_digest(xq.sums, n * (columns / group_size) * 4);
            add_digest(y, n * rows * 4);
            add_digest(z, n * rows * 4);
            for (size_t r = 0; r < rows; r++) {
                k->dequantize_row[e](x, w, r, columns, group_size);
                add_digest(x, columns * 4);
                for (size_t c = 0; spec && c < columns; c++)
                    CHECK(x[c] == scale_at(e, w, r, c / group_size, columns, group_size) *
                          code_at(e, w, r, c, columns, group_size), "dequantize %zu", c);
            }
            release(w, matrix_bytes(e, rows, columns, group_size));
            release(x, n * columns * 4);
            release(y, n * rows * 4);
            release(z, n * rows * 4);
            release_rows(xq, n, columns, group_size);
        }
}

static void matmuls(const Kernels *k, int spec) {
    begin(1);
    for (int encoding = 0; encoding < N_ENCODINGS; encoding++) matmuls_of(k, spec, (Encoding)encoding);
    end(k, "matmul");
}

/* every pair of a weight code and an activation code, in every lane and column of a block */
static void products(const Kernels *k) {
    enum { GROUP = 32, COLUMNS = 256 };
    begin(2);
    uint8_t *w = random_matrix(ENCODING_INT8, 16, COLUMNS, GROUP);
    Int8Rows x = int8_rows(3, COLUMNS, GROUP);
    float y[48];
    for (int a = -127; a <= 127; a++)
        for (int shift = 0; shift < 256; shift++) {
            for (size_t c = 0; c < 3 * COLUMNS; c++) x.codes[c] = (int8_t)a;
            for (size_t g = 0; g < 3 * COLUMNS / GROUP; g++) {
                x.scales[g] = 1;
                x.sums[g] = 128 * GROUP * a;
            }
            int64_t expected[16] = {0};
            for (size_t g = 0; g < COLUMNS / GROUP; g++)
                for (size_t i = 0; i < 16 * GROUP; i++) {
                    int8_t code = (int8_t)(i / 4 * 4 + g * 32 + (size_t)shift);
                    w[g * TILE_BYTES(GROUP) + i] = (uint8_t)code;
                    expected[i / 4 % 16] += code * a;
                }
            for (size_t g = 0; g < COLUMNS / GROUP; g++)
                /* 1.0 */
                for (size_t r = 0; r < 16; r++)
                    memcpy(w + g * TILE_BYTES(GROUP) + 16 * GROUP + 2 * r, "\0\x3c", 2);
            for (size_t n = 1; n <= 3; n++) {
                k->matmul_int8[ENCODING_INT8](y, 16, &x, n, w, 16, COLUMNS, GROUP);
                for (size_t i = 0; i < 16 * n; i++)
                    CHECK(y[i] == (float)expected[i % 16], "%s: code product %d, shift %d: %g not %lld",
                          k->name, a, shift, y[i], (long long)expected[i % 16]);
            }
        }
    release(w, COLUMNS / GROUP * TILE_BYTES(GROUP));
    release_rows(x, 3, COLUMNS, GROUP);
}

/* ---- rows */

static void rows(const Kernels *k, int spec) {
    begin(3);
    for (size_t n = 1; n <= 300; n += n < 40 ? 1 : 37) {
        float *x = floats(n, 4), *w = floats(n, 2), *y = guarded(n * 4), *z = guarded(n * 4);
        k->rmsnorm(y, x, w, n, 1e-6f);
        k->swiglu(z, x, w, n);
        double squares = 0;
        for (size_t i = 0; i < n; i++) squares += (double)x[i] * x[i];
        for (size_t i = 0; spec && i < n; i++) {
            double norm = x[i] / sqrt(squares / (double)n + 1e-6) * w[i],
                silu = x[i] / (1 + exp(-(double)x[i])) * w[i];
            CHECK(fabs(y[i] - norm) <= 1e-6 * fabs(norm) + 1e-12, "rmsnorm %zu: %g %g", i, y[i], norm);
            CHECK(fabs(z[i] - silu) <= 5e-7 * fabs(silu) + 1e-12, "swiglu %zu: %g %g", i, z[i], silu);
        }
        add_digest(y, n * 4);
        add_digest(z, n * 4);
        k->add(y, x, n);
        add_digest(y, n * 4);
        k->add_scaled(y, w, n, 0.3f);
        add_digest(y, n * 4);
        float score, expected = 0;
        k->matvec(&score, x, w, 1, n);
        for (size_t i = 0; i < n; i++) expected += x[i] * w[i];
        CHECK(fabsf(score - expected) <= 1e-3f, "matvec %zu: %g %g", n, score, expected);
        add_digest(&score, 4);
        float total = k->exponentials(y, x, n, 3);
        add_digest(&total, 4);
        add_digest(y, n * 4);
        release(x, n * 4); release(w, n * 4); release(y, n * 4); release(z, n * 4);
    }
    float wild[48] = {0, -0.0f, 1e-40f, -87.6f, -87.8f, -100, -1e30f, -INFINITY, 50, 87, 88, 100, 1e30f,
        -88.5f, 1e-8f}, out[48], ones[48];
    for (size_t i = 0; i < 48; i++) ones[i] = 1;
    k->swiglu(out, wild, ones, 15);
    add_digest(out, 15 * 4);
    float total = k->exponentials(out, wild, 11, 1);
    CHECK(out[7] == 0 && out[6] == 0 && total > 0, "%s: exp of -inf is %g", k->name, out[7]);
    add_digest(out, 11 * 4);
    end(k, "rows");
}

static void ropes(const Kernels *k, int spec) {
    begin(4);
    for (size_t half = 1; half <= 64; half += 7) {
        float *f = guarded(half * 4), *c = guarded(half * 4), *s = guarded(half * 4),
            *x = floats(2 * half, 2);
        for (size_t i = 0; i < half; i++) f[i] = (float)pow(1e6, -(double)i / (double)half);
        for (size_t position = 0; position < 16000000; position = position * 3 + 1) {
            k->rope_angles(c, s, f, half, position, 1);
            for (size_t i = 0; spec && i < half; i++) {
                double angle = (float)position * f[i];
                CHECK(fabs(c[i] - cos(angle)) < 6e-8 && fabs(s[i] - sin(angle)) < 6e-8, "angle %g: %g %g",
                      angle, c[i], s[i]);
            }
            add_digest(c, half * 4);
            add_digest(s, half * 4);
            k->rope(x, c, s, 2 * half, 1.5f);
            k->rope(x, c, s, 2 * half, 1 / 1.5f);
            add_digest(x, 2 * half * 4);
        }
        release(f, half * 4); release(c, half * 4); release(s, half * 4); release(x, 2 * half * 4);
    }
    end(k, "rope");
}

/* ---- attention */

static float as_half(float x) {  /* |x| < 2^16, not subnormal here */
    int exponent;
    frexpf(x, &exponent);
    return x == 0 ? x : ldexpf(nearbyintf(ldexpf(x, 11 - exponent)), exponent - 11);
}

static float largest_of(const float *x, size_t n) {
    float largest = 0;
    for (size_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(x[i]));
    return largest;
}

/* what the cache keeps of a row */
static void as_cached(float *kept, const float *x, size_t n, KVType type) {
    float max = largest_of(x, n), scale = as_half(max / 127);
    int exponent;
    frexpf(scale, &exponent);
    if (max > 127.5f * scale) scale += ldexpf(1, exponent - 11);
    for (size_t i = 0; i < n; i++)
        kept[i] = type == KV_F32 ? x[i] : type == KV_F16 ? as_half(x[i])
            : scale * fminf(127, fmaxf(-127, nearbyintf(x[i] / scale)));
}

/* softmax(q . k) v of one query row in double: weights (seen), out (head_dim) */
static void attend_in_double(double *weights, double *out, const float *q, const float *keys,
                             const float *values, size_t seen, size_t head_dim) {
    double sum = 0;
    for (size_t j = 0; j < seen; j++) {
        double score = 0;
        for (size_t d = 0; d < head_dim; d++) score += (double)q[d] * keys[j * head_dim + d];
        sum += weights[j] = exp(score);
    }
    for (size_t d = 0; d < head_dim; d++) out[d] = 0;
    for (size_t j = 0; j < seen; j++) {
        weights[j] /= sum;
        for (size_t d = 0; d < head_dim; d++) out[d] += weights[j] * values[j * head_dim + d];
    }
}

/* half a step of the int8 attention weights, times what it meets: how far one dimension of out may be off */
static double weight_rounding(const double *weights, const float *values, size_t seen, size_t head_dim,
                              size_t d) {
    double off = 0;
    for (size_t from = 0; from < seen; from += VALUE_GROUP) {
        double largest = 0, codes = 0;
        for (size_t j = from; j < seen && j < from + VALUE_GROUP; j++) {
            double scale = largest_of(values + j * head_dim, head_dim) / 127.0;
            largest = fmax(largest, weights[j] * scale);
            codes += fabs(values[j * head_dim + d]) / fmax(scale, 1e-30);
        }
        off += largest / 254 * codes;
    }
    return off * 1.01;  /* the largest code may be 126 */
}

static double int8_error, int8_square;  /* of the outputs with an int8 cache, from those with all in double */

static void attention_case(const Kernels *k, int spec, size_t head_dim, size_t group, size_t n,
                           size_t position, KVType type) {
    size_t total = position + n, n_blocks = (total + KV_BLOCK - 1) / KV_BLOCK;
    size_t keys = key_bytes(type, head_dim), block = keys + value_bytes(type, head_dim);
    char **blocks = malloc(n_blocks * sizeof *blocks);
    float *k_rows = floats(total * head_dim, 2), *v_rows = floats(total * head_dim, 2);
    for (size_t b = 0; b < n_blocks; b++) blocks[b] = guarded(block);
    for (size_t p = 0; p < total; p++) {
        char *at = blocks[p / KV_BLOCK];
        k->store_kv[type](at, at + keys, p % KV_BLOCK, k_rows + p * head_dim, v_rows + p * head_dim,
                          head_dim);
    }
    size_t size = n * group * head_dim;
    float *q = floats(size, 1 / sqrtf((float)head_dim)), *out = guarded(size * 4),
        *scratch = guarded(ATTENTION_SCRATCH(head_dim) * 4);
    Attention task = {q, out, group * head_dim, group * head_dim, n, group, head_dim, position, blocks, 0,
        keys, scratch};
    k->attend[type](&task);
    add_digest(out, size * 4);
    float *again = guarded(size * 4), *weights = guarded(n * group * total * 4);
    task.out = again, task.weights = weights, task.weights_token = group * total, task.weights_head = total;
    k->attend[type](&task);
    CHECK(memcmp(out, again, size * 4) == 0,
          "attention head_dim %zu group %zu: asking for the weights changes the output", head_dim, group);
    for (size_t row = 0; row < n * group; row++)
        add_digest(weights + row * total, (position + row / group + 1) * 4);
    float *k_kept = malloc(total * head_dim * 4), *v_kept = malloc(total * head_dim * 4),
        *q_kept = malloc(head_dim * 4);
    double *w = malloc(total * sizeof *w), *o = malloc(head_dim * sizeof *o);
    for (size_t p = 0; spec && p < total; p++) {
        as_cached(k_kept + p * head_dim, k_rows + p * head_dim, head_dim, type);
        as_cached(v_kept + p * head_dim, v_rows + p * head_dim, head_dim, type);
    }
    for (size_t row = 0; spec && row < n * group; row++) {
        size_t seen = position + row / group + 1;
        const float *query = q + row * head_dim, *found = out + row * head_dim;
        float max = largest_of(query, head_dim);
        for (size_t d = 0; d < head_dim; d++)
            q_kept[d] = type == KV_I8 ? max / 127 * nearbyintf(query[d] * (127 / max)) : query[d];
        attend_in_double(w, o, q_kept, k_kept, v_kept, seen, head_dim);
        for (size_t j = 0; j < seen; j++)
            CHECK(fabs(weights[row * total + j] - w[j]) < 1e-6,
                  "attention head_dim %zu group %zu row %zu: weight %g %g", head_dim, group,
                  row, weights[row * total + j], w[j]);
        double largest = 0;
        for (size_t d = 0; d < head_dim; d++) largest = fmax(largest, fabs(o[d]));
        for (size_t d = 0; d < head_dim; d++) {
            double off = type == KV_I8 ? weight_rounding(w, v_kept, seen, head_dim, d) : 0;
            CHECK(fabs(found[d] - o[d]) < 1e-6 * largest + 1e-6 + off,
                  "attention type %d head_dim %zu group %zu row %zu: %g %g, off by %g", (int)type,
                  head_dim, group, row, found[d], o[d], off);
        }
        if (type != KV_I8) continue;
        attend_in_double(w, o, query, k_rows, v_rows, seen, head_dim);
        for (size_t d = 0; d < head_dim; d++) {
            int8_error += (found[d] - o[d]) * (found[d] - o[d]);
            int8_square += o[d] * o[d];
        }
    }
    free(k_kept); free(v_kept); free(q_kept); free(w); free(o);
    for (size_t b = 0; b < n_blocks; b++) release(blocks[b], block);
    release(k_rows, total * head_dim * 4); release(v_rows, total * head_dim * 4);
    release(again, size * 4); release(weights, n * group * total * 4);
    release(q, size * 4); release(out, size * 4); release(scratch, ATTENTION_SCRATCH(head_dim) * 4);
    free(blocks);
}

static void attentions(const Kernels *k, int spec) {
    static const size_t head_dims[] = {2, 8, 16, 24, 64, 80, 128}, groups[] = {1, 2, 3, 5, 8, 16};
    static const size_t positions[] = {0, 1, 14, 15, 16, 100, 253, 255, 256, 511, 700};
    begin(5);
    for (size_t h = 0; h < 7; h++)
        for (size_t g = 0; g < 6; g++)
            for (size_t p = 0; p < 11; p++)
                attention_case(k, spec, head_dims[h], groups[g], 1 + p % (ATTENTION_ROWS / groups[g]),
                               positions[p], (KVType)((h + g + p) % 3));
    /* codes are off by at most half of 1 in 127 of the largest of a row: 1e-4 is twice what that comes to */
    if (spec)
        CHECK(int8_error < 1e-4 * int8_square, "attention, int8 cache: NMSE %g", int8_error / int8_square);
    end(k, "attention");
}

/* every fp16 value, what lies halfway to the next, and a little to either side */
static void halves(const Kernels *k) {
    enum { HEAD = 16 };
    begin(6);
    char *keys = guarded(KV_BLOCK * HEAD * 2), *values = guarded(KV_BLOCK * HEAD * 2);
    for (uint32_t half = 0; half < 0x7c00; half++)
        for (int sign = 0; sign < 2; sign++) {
            double value = half < 0x400 ? ldexp(half, -24)
                : ldexp(1024 + (half & 1023), (int)(half >> 10) - 25);
            double up = half + 1 < 0x400 ? ldexp(half + 1, -24)
                : ldexp(1024 + ((half + 1) & 1023), (int)((half + 1) >> 10) - 25);
            float x = (float)value, middle = (float)((value + up) / 2), row[HEAD] = {0};
            row[0] = x;
            row[1] = middle;
            row[2] = nextafterf(middle, 1e9f);
            row[3] = nextafterf(middle, 0);
            for (int i = 0; i < 4 && sign; i++) row[i] = -row[i];
            k->store_kv[KV_F16](keys, values, half % KV_BLOCK, row, row, HEAD);
            uint16_t got[4];
            memcpy(got, values + half % KV_BLOCK * HEAD * 2, 8);
            uint16_t s = (uint16_t)(sign << 15), even = (uint16_t)(half + (half & 1));
            CHECK(got[0] == (s | half) && got[1] == (s | even) && got[2] == (s | (half + 1)) &&
                  got[3] == (s | half),
                  "%s: fp16 of %g: %04x %04x %04x %04x", k->name, x, got[0], got[1], got[2], got[3]);
        }
    release(keys, KV_BLOCK * HEAD * 2);
    release(values, KV_BLOCK * HEAD * 2);
}

/* ---- sampler and exporter */

static void top_ks(const Kernels *k, int spec) {
    begin(7);
    for (size_t n = 1; n < 3000; n = n * 2 + 3)
        for (size_t best = 1; best <= n; best = best * 3 + 1) {
            float *x = floats(n, 5);
            for (size_t i = 0; i < n; i += 3) x[i] = roundf(x[i]);  /* ties */
            int32_t *ids = guarded(best * 4);
            CHECK(k->top_k(ids, x, n, best) == 0, "%s: top_k saw a NaN", k->name);
            for (size_t i = 0; spec && i < best; i++) {
                size_t before = 0;
                for (size_t j = 0; j < n; j++)
                    before += x[j] > x[ids[i]] || (x[j] == x[ids[i]] && (int32_t)j < ids[i]);
                CHECK(before == i, "top_k %zu of %zu: rank %zu", i, n, before);
            }
            add_digest(ids, best * 4);
            x[n / 2] = NAN;
            CHECK(k->top_k(ids, x, n, best) == 1, "%s: top_k missed a NaN at %zu of %zu", k->name, n / 2, n);
            release(x, n * 4);
            release(ids, best * 4);
        }
    end(k, "top_k");
}

static void quantized_tiles_of(const Kernels *k, int type, size_t group_size, Encoding e) {
    size_t columns = 2 * group_size, size = columns * (type == SOURCE_F32 ? 4 : 2);
    size_t bytes = tile_row_bytes(e, columns, group_size);
    const void *source[16] = {0};
    for (int r = 0; r < 15; r++) {  /* the last row is padding */
        uint8_t *row = guarded(size);
        source[r] = row;
        for (size_t c = 0; c < columns; c++) {
            float value = r == 3 ? 0 : uniform(ldexpf(1, -4 * r));
            uint32_t bits;
            memcpy(&bits, &value, 4);
            uint16_t bf16 = (uint16_t)(bits >> 16), f16 = (uint16_t)(next() % 0x6000);
            if (type == SOURCE_F32) memcpy(row + 4 * c, &value, 4);
            else memcpy(row + 2 * c, type == SOURCE_BF16 ? &bf16 : &f16, 2);
        }
    }
    uint8_t *tiles = guarded(bytes), *plain = guarded(bytes);
    float *importance = floats(columns, 1);
    for (size_t c = 0; c < columns; c++) importance[c] = c % 5 ? fabsf(importance[c]) : 0;
    QuantizationError error = {0, 0, 0, -1};
    k->quantize_tiles[e](plain, source, type, NULL, columns, group_size, &error);
    CHECK(error.bad == -1 && error.largest > 0, "%s: bad %lld", k->name, (long long)error.bad);
    add_digest(plain, bytes);
    add_digest(&error, sizeof error);
    for (size_t r = 0; r < 16; r++)
        for (size_t c = 0; c < columns; c++)
            CHECK(code_at(e, plain, r, c, columns, group_size) >= (e == ENCODING_INT8 ? -127 : -31),
                  "%s: encoding %d, code %d", k->name, (int)e, code_at(e, plain, r, c, columns, group_size));
    k->quantize_tiles[e](tiles, source, type, importance, columns, group_size, &error);
    CHECK((memcmp(tiles, plain, bytes) == 0) == (e == ENCODING_INT8), "%s: importance, encoding %d", k->name,
          (int)e);
    add_digest(tiles, bytes);
    memcpy((uint8_t *)source[5] + size / 2,
           type == SOURCE_F32 ? "\0\0\x80\x7f" : type == SOURCE_BF16 ? "\x80\x7f" : "\0\x7c",
           type == SOURCE_F32 ? 4 : 2);
    k->quantize_tiles[e](tiles, source, type, NULL, columns, group_size, &error);
    CHECK(error.bad == (int64_t)(5 * columns + columns / 2), "%s: infinity found at %lld", k->name,
          (long long)error.bad);
    for (int r = 0; r < 15; r++) release((void *)source[r], size);
    release(tiles, bytes); release(plain, bytes); release(importance, columns * 4);
}

static void quantized_tiles(const Kernels *k) {
    begin(8);
    for (int e = 0; e < N_ENCODINGS; e++)
        for (int type = SOURCE_BF16; type <= SOURCE_F32; type++)
            for (size_t gi = 0; gi < 4; gi++) quantized_tiles_of(k, type, group_sizes[gi], (Encoding)e);
    end(k, "quantize_tiles");
}

static void int8_peaks(const Kernels *k) {
    for (size_t rounds = 1; rounds <= 1 << 20; rounds = rounds * 37 + 1) {
        size_t count = k->int8_peak(rounds);
        CHECK(count > 0 && count % (64 * rounds) == 0 && count / (64 * rounds) == k->int8_peak(1) / 64,
              "%s: %zu rounds count %zu", k->name, rounds, count);
    }
}

/* ---- what is not finite stays so, whatever it meets: no instruction set may lose a NaN */

static const float not_finite[] = {NAN, INFINITY, -INFINITY};

/* which NaN it is depends on the instruction set */
static void add_digest_of_numbers(const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float value = x[i] == x[i] ? x[i] : 0.5f;
        add_digest(&value, 4);
        add_digest(x[i] == x[i] ? "=" : "!", 1);
    }
}

static int none_finite(const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (isfinite(x[i])) return 0;
    return 1;
}

static void damaged_products(const Kernels *k, float bad, Encoding e) {
    /* 19 groups: more than are divided at a time */
    enum { ROWS = 21, COLUMNS = 19 * 32, GROUP = 32, N = 3 };
    uint8_t *w = random_matrix(e, ROWS, COLUMNS, GROUP);
    float *x = floats(N * COLUMNS, 3), *y = guarded(N * ROWS * 4), *clean = guarded(N * ROWS * 4);
    Int8Rows xq = int8_rows(N, COLUMNS, GROUP);
    quantize_all(k, &xq, x, N, COLUMNS, GROUP);
    k->matmul_int8[e](clean, ROWS, &xq, N, w, ROWS, COLUMNS, GROUP);
    for (size_t c = 0; c < COLUMNS; c += 37) {
        float kept = x[COLUMNS + c];
        x[COLUMNS + c] = bad;  /* of the second token alone */
        quantize_all(k, &xq, x, N, COLUMNS, GROUP);
        k->matmul_int8[e](y, ROWS, &xq, N, w, ROWS, COLUMNS, GROUP);
        CHECK(none_finite(y + ROWS, ROWS), "%s: matmul_int8 of %g in column %zu", k->name, bad, c);
        CHECK(!memcmp(y, clean, ROWS * 4) && !memcmp(y + 2 * ROWS, clean + 2 * ROWS, ROWS * 4),
              "%s: %g reaches another token", k->name, bad);
        add_digest(xq.codes, N * COLUMNS);
        add_digest(xq.sums, N * COLUMNS / GROUP * 4);
        add_digest_of_numbers(xq.scales, N * COLUMNS / GROUP);
        add_digest_of_numbers(y, N * ROWS);
        k->matmul_float32[e](y, ROWS, x, N, w, ROWS, COLUMNS, GROUP);
        CHECK(none_finite(y + ROWS, ROWS), "%s: matmul_float32 of %g in column %zu", k->name, bad, c);
        add_digest_of_numbers(y, N * ROWS);
        x[COLUMNS + c] = kept;
    }
    uint16_t half = bad != bad ? 0x7e00 : bad > 0 ? 0x7c00 : 0xfc00;
    /* the scale of row 5 in the second group */
    memcpy((uint8_t *)tile_at(e, w, 5, 1, COLUMNS, GROUP) + code_bytes(e, GROUP) + 2 * 5, &half, 2);
    quantize_all(k, &xq, x, N, COLUMNS, GROUP);
    k->matmul_int8[e](y, ROWS, &xq, N, w, ROWS, COLUMNS, GROUP);
    for (size_t t = 0; t < N; t++)
        CHECK(none_finite(y + t * ROWS + 5, 1), "%s: matmul_int8 with a scale of %g", k->name, bad);
    add_digest_of_numbers(y, N * ROWS);
    k->matmul_float32[e](y, ROWS, x, N, w, ROWS, COLUMNS, GROUP);
    for (size_t t = 0; t < N; t++)
        CHECK(none_finite(y + t * ROWS + 5, 1), "%s: matmul_float32 with a scale of %g", k->name, bad);
    add_digest_of_numbers(y, N * ROWS);
    k->dequantize_row[e](x, w, 5, COLUMNS, GROUP);
    CHECK(none_finite(x + GROUP, GROUP), "%s: dequantize_row with a scale of %g", k->name, bad);
    add_digest_of_numbers(x, COLUMNS);
    release(w, matrix_bytes(e, ROWS, COLUMNS, GROUP));
    release(x, N * COLUMNS * 4); release(y, N * ROWS * 4); release(clean, N * ROWS * 4);
    release_rows(xq, N, COLUMNS, GROUP);
}

static void damaged_rows(const Kernels *k, float bad) {
    for (size_t n = 2; n <= 70; n += 17)
        for (size_t at = 0; at < n; at += 9) {
            float *x = floats(n, 4), *w = floats(n, 2), *y = guarded(n * 4), score;
            x[at] = bad;
            k->rmsnorm(y, x, w, n, 1e-6f);
            CHECK(none_finite(y + at, 1), "%s: rmsnorm of %g", k->name, bad);
            add_digest_of_numbers(y, n);
            k->rmsnorm(y, w, x, n, 1e-6f);
            CHECK(none_finite(y + at, 1), "%s: rmsnorm by %g", k->name, bad);
            add_digest_of_numbers(y, n);
            k->swiglu(y, w, x, n);
            CHECK(none_finite(y + at, 1), "%s: swiglu, up %g", k->name, bad);
            add_digest_of_numbers(y, n);
            k->swiglu(y, x, w, n);
            CHECK(none_finite(y + at, 1), "%s: swiglu, gate %g", k->name, bad);
            add_digest_of_numbers(y, n);
            k->matvec(&score, w, x, 1, n);
            CHECK(none_finite(&score, 1), "%s: matvec of %g", k->name, bad);
            if (bad > 0 || bad != bad) {  /* -infinity is how a sampler forbids a token */
                score = k->exponentials(y, x, n, 1);
                CHECK(none_finite(&score, 1), "%s: exponentials of %g", k->name, bad);
            }
            release(x, n * 4); release(w, n * 4); release(y, n * 4);
        }
    for (size_t position = 0; position < 5; position++) {
        float frequencies[] = {1, bad, 1e38f, 0.1f}, c[4], s[4], x[8] = {1, 2, 3, 4, 5, 6, 7, 8};
        k->rope_angles(c, s, frequencies, 4, position, 1);
        CHECK(none_finite(c + 1, 1) && none_finite(s + 1, 1), "%s: the angle of %g at %zu", k->name, bad,
              position);
        add_digest_of_numbers(c, 4);
        add_digest_of_numbers(s, 4);
        k->rope(x, c, s, 8, 1);
        CHECK(none_finite(x + 1, 1) && none_finite(x + 5, 1), "%s: rotation by %g", k->name, bad);
        add_digest_of_numbers(x, 8);
    }
}

/* One number of a query (place 0), key (1) or value (2) is `bad`, in a sequence of one block or three. */
static void damaged_attention(const Kernels *k, float bad, KVType type, size_t head_dim, int place) {
    enum { N = 3, GROUP = 2, ROWS = N * GROUP };
    for (size_t position = 5; position < 600; position += 290) {
        size_t total = position + N, n_blocks = (total + KV_BLOCK - 1) / KV_BLOCK, damaged = total - 2,
            size = ROWS * head_dim;
        size_t keys = key_bytes(type, head_dim), block = keys + value_bytes(type, head_dim);
        char *blocks[3];
        float *k_row = floats(head_dim, 2), *v_row = floats(head_dim, 2), *q = floats(size, 1),
            *out = guarded(size * 4);
        float *scratch = guarded(ATTENTION_SCRATCH(head_dim) * 4), *weights = guarded(ROWS * total * 4);
        for (size_t b = 0; b < n_blocks; b++) blocks[b] = guarded(block);
        for (size_t p = 0; p < total; p++) {
            char *at = blocks[p / KV_BLOCK];
            for (size_t d = 0; d < head_dim; d++) k_row[d] = uniform(2), v_row[d] = uniform(2);
            if (p == damaged && place == 1) k_row[head_dim - 1] = bad;
            if (p == damaged && place == 2) v_row[head_dim - 1] = bad;
            k->store_kv[type](at, at + keys, p % KV_BLOCK, k_row, v_row, head_dim);
            uint16_t scale = 0x7e00;
            if (type == KV_I8 && p == damaged && place == 2)
                memcpy(&scale, at + keys + KV_BLOCK * PADDED(head_dim) + p % KV_BLOCK * 2, 2);
            CHECK((scale & 0x7fff) > 0x7c00, "%s: the scale of a value of %g is %04x, not a NaN", k->name,
                  bad, scale);
        }
        if (place == 0) q[(ROWS - 1) * head_dim] = bad;
        Attention task = {q, out, GROUP * head_dim, GROUP * head_dim, N, GROUP, head_dim, position, blocks, 0,
            keys, scratch};
        task.weights = weights, task.weights_token = GROUP * total, task.weights_head = total;
        k->attend[type](&task);
        add_digest_of_numbers(out, size);
        for (size_t row = 0; row < ROWS; row++) {
            size_t seen = position + row / GROUP + 1;
            int hurt = place == 0 ? row == ROWS - 1 : seen > damaged;
            const float *found = out + row * head_dim;
            CHECK(hurt ? none_finite(place == 2 ? found + head_dim - 1 : found, place == 2 ? 1 : head_dim)
                  : isfinite(found[0]) && isfinite(found[head_dim - 1]),
                  "%s: attention type %d, %g in %c, position %zu, row %zu: %g", k->name, (int)type, bad,
                  "qkv"[place], position, row, found[head_dim - 1]);
            add_digest_of_numbers(weights + row * total, seen);
        }
        for (size_t b = 0; b < n_blocks; b++) release(blocks[b], block);
        release(k_row, head_dim * 4); release(v_row, head_dim * 4); release(q, size * 4);
        release(out, size * 4);
        release(scratch, ATTENTION_SCRATCH(head_dim) * 4); release(weights, ROWS * total * 4);
    }
}

static void not_finites(const Kernels *k) {
    begin(9);
    for (size_t b = 0; b < 3; b++) {
        for (int e = 0; e < N_ENCODINGS; e++) damaged_products(k, not_finite[b], (Encoding)e);
        damaged_rows(k, not_finite[b]);
        for (int type = KV_F32; type <= KV_I8; type++)
            for (int place = 0; place < 3; place++) {
                damaged_attention(k, not_finite[b], (KVType)type, 24, place);
                damaged_attention(k, not_finite[b], (KVType)type, 64, place);
            }
    }
    end(k, "not_finite");
}

static void kernels_named(const char *name, const Kernels *k, int spec) {
    int all = name == NULL;
    if (all || !strcmp(name, "matmul")) matmuls(k, spec);
    if (all || !strcmp(name, "products")) products(k);
    if (all || !strcmp(name, "rows")) rows(k, spec);
    if (all || !strcmp(name, "rope")) ropes(k, spec);
    if (all || !strcmp(name, "attention")) attentions(k, spec);
    if (all || !strcmp(name, "halves")) halves(k);
    if (all || !strcmp(name, "top_k")) top_ks(k, spec);
    if (all || !strcmp(name, "quantize_tiles")) quantized_tiles(k);
    if (all || !strcmp(name, "not_finite")) not_finites(k);
    if (all || !strcmp(name, "int8_peak")) int8_peaks(k);
}

int main(int n_arguments, char **arguments) {  /* the name of a kernel, or nothing for all */
    for (size_t i = 0; i < n_kernels; i++)
        if (kernels_runnable(all_kernels[i]))
            kernels_named(n_arguments > 1 ? arguments[1] : NULL, all_kernels[i], i == 0);
    if (failures) printf("%d failures\n", failures);
    return failures > 0;
}
