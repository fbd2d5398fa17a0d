/* The contract of the kernels: what is computed, on which shapes, in which order.

   Every instruction set fills one Kernels table with the same functions. They are written once, in the
   headers that body.h lists, over a vector of 16 lanes; an <isa>.c file says what the lanes are made of.
   scalar.c is the spec.

   The same inputs give the same bits in every table. Three rules make it so:
     - a lane is an output (a row, a position, a column): no sum is ever split between lanes,
       except the sums over 16 lanes named below, which have one fixed tree;
     - float operations are single IEEE operations or one fmaf, in the order written here;
     - int8 dot products are exact in int32, and as floats: |sum| <= MAX_HEAD_DIM * 127 * 128 < 2^24.

   A NaN or an infinity is never lost: what is computed from one is not finite, in every table, so damaged
   weights end in logits that say so. (Which NaN it is, its sign and payload, differs between tables.)

   All arrays are row-major; (a, b) is a rows of b. Pointers need no alignment. A kernel cannot fail. */
#ifndef QWEN3C_KERNELS_H
#define QWEN3C_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* Whether the compiler knows the tile registers of AMX. */
#if defined(__x86_64__) && defined(__linux__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : defined(__GNUC__) && __GNUC__ >= 11)
#define HAVE_AMX 1
#else
#define HAVE_AMX 0
#endif

#define LANES 16           /* of a vector: 16 output rows of a weight tile, 16 positions, 16 values */
#define MAX_HEAD_DIM 1024  /* that a model.bin may have; its groups of weights are 256 columns at most */
#define KV_BLOCK 256       /* positions in a KV block: block b holds positions [256 b, 256 (b + 1)) */
#define VALUE_GROUP 32     /* positions whose attention weights share a scale where the KV cache is int8 */
#define ATTENTION_ROWS 16  /* query rows (tokens x grouped heads) that one attend() call takes at most */

typedef enum { KV_F32, KV_F16, KV_I8 } KVType;
typedef enum { SOURCE_BF16, SOURCE_F16, SOURCE_F32 } SourceType;

/* How a matrix is stored. A kernel that reads or writes matrices has one entry of its table for each. */
typedef enum { ENCODING_INT8, ENCODING_INT4, ENCODING_INT6, N_ENCODINGS } Encoding;

/* A matrix (rows, columns) is stored in tile rows of LANES rows, one after the other; a tile row is its
   codebook, if the encoding has one, then tiles of LANES rows x group_size columns. A tile is codes, then
   fp16 scales (LANES); weight = scale[r] * code. Row r of the tile, from 0, is row LANES R + r of the matrix,
   column c of the tile is column group_size G + c.
     ENCODING_INT8  int8 codes (group_size / 4, LANES, 4): column 4 c + j at [c][r][j]
     ENCODING_INT4  nibbles (group_size / 8, LANES, 4), the index of a code in the codebook: of column 8 c + j
                    in the low half of [c][r][j], of column 8 c + 4 + j in the high half.
                    The codebook is int8 (16), of which the low 6 bits are read, as -32..31, then zeros
                    up to CODEBOOK_BYTES. A scale may be negative
     ENCODING_INT6  code + 32, 1..63: its low 4 bits as the nibbles above, then its high 2 bits
                    (group_size / 16, LANES, 4): those of column 16 c + 4 k + j are bits 2 k and 2 k + 1 of
                    [c][r][j] */
#define TILE_BYTES(group_size) (LANES * ((size_t)(group_size) + 2))  /* of ENCODING_INT8 */
#define CODEBOOK_BYTES 32

/* Bytes of the codes of a tile, without its scales. */
static inline size_t code_bytes(Encoding encoding, size_t group_size) {
    size_t nibbles = LANES * group_size / 2;
    return encoding == ENCODING_INT8 ? 2 * nibbles : encoding == ENCODING_INT6 ? nibbles * 3 / 2 : nibbles;
}

/* Bytes of a tile of LANES rows x group_size columns. */
static inline size_t tile_bytes(Encoding encoding, size_t group_size) {
    return code_bytes(encoding, group_size) + 2 * LANES;
}

/* Bytes of the codebook in front of a tile row. */
static inline size_t codebook_bytes(Encoding encoding) {
    return encoding == ENCODING_INT4 ? CODEBOOK_BYTES : 0;
}

/* Bytes of LANES rows. */
static inline size_t tile_row_bytes(Encoding encoding, size_t columns, size_t group_size) {
    return codebook_bytes(encoding) + columns / group_size * tile_bytes(encoding, group_size);
}

/* Rows of activations as int8: value = scale * code, per group of group_size columns. */
typedef struct {
    int8_t *codes;   /* (n, columns), -127..127 */
    float *scales;   /* (n, columns / group_size) */
    int32_t *sums;   /* (n, columns / group_size), 128 * sum of the group's codes */
} Int8Rows;

/* The queries of one KV head for some consecutive tokens of one sequence, and where its KV lies.
   In a block, keys from k_offset and values from v_offset on:
     KV_F32, KV_F16:  keys    (KV_BLOCK / LANES, head_dim, LANES)   position LANES s + i, dimension d
                                                                    at [s][d][i]
                      values  (KV_BLOCK, PADDED(head_dim))
     KV_I8:           keys    a matrix of ENCODING_INT8, (KV_BLOCK, PADDED(head_dim)), one group: rows are
                              positions
                      values  int8 codes   (PADDED(head_dim) / LANES, KV_BLOCK / 4, LANES, 4)
                                             position 4 c + j, dimension LANES d + i at [d][c][i][j]
                              fp16 scales  (KV_BLOCK)   value = scale[position] * code */
typedef struct {
    const float *q;             /* (n_tokens, group, head_dim) / sqrt(head_dim), tokens are q_stride apart */
    float *out;                 /* (n_tokens, group, head_dim), tokens are out_stride floats apart */
    size_t q_stride, out_stride, n_tokens, group, head_dim;
    size_t position;            /* of the first token; token t sees positions 0..position + t */
    char *const *blocks;        /* the sequence's KV blocks */
    size_t k_offset, v_offset;  /* bytes */
    float *scratch;             /* ATTENTION_SCRATCH(head_dim) floats */
    float *weights;             /* NULL, or where softmax(q . k) is wanted: (n_tokens, group, positions) */
    size_t weights_token, weights_head;  /* floats from a token's to the next token's, from head to head */
} Attention;

#define PADDED(n) (((size_t)(n) + LANES - 1) / LANES * LANES)  /* n values in whole vectors */
/* Floats of scratch memory that one row of Int8Rows takes. */
#define INT8_FLOATS(columns, group_size) ((columns) / 4 + 2 * ((columns) / (group_size)))
#define ATTENTION_SCRATCH(head_dim) \
    (ATTENTION_ROWS * (KV_BLOCK + PADDED(head_dim) + 2 + INT8_FLOATS(KV_BLOCK, VALUE_GROUP) + \
                       INT8_FLOATS(PADDED(head_dim), PADDED(head_dim))))

/* Bytes of the keys of one KV head in a block, and of its values. */
static inline size_t key_bytes(KVType type, size_t head_dim) {
    if (type == KV_I8) return KV_BLOCK / LANES * TILE_BYTES(PADDED(head_dim));
    return KV_BLOCK * head_dim * (type == KV_F16 ? 2 : 4);
}
static inline size_t value_bytes(KVType type, size_t head_dim) {
    if (type == KV_I8) return KV_BLOCK * (PADDED(head_dim) + 2);
    return KV_BLOCK * PADDED(head_dim) * (type == KV_F16 ? 2 : 4);
}

/* How far stored weights are from the source weights w (quantize_tiles). */
typedef struct {
    double largest;       /* max |w - stored| */
    double error_square;  /* sum (w - stored)^2 */
    double square;        /* sum w^2 */
    int64_t bad;          /* row * columns + column of the first value that cannot be stored, or -1 */
} QuantizationError;

typedef struct {
    const char *name;

    /* y[i] = (x[i] * (1 / sqrt(mean(x^2) + eps))) * weight[i]; the sum: 16 lanes, then the tree. */
    void (*rmsnorm)(float *y, const float *x, const float *weight, size_t n, float eps);

    /* Per group: scale = max|x| / 127, code = round to nearest even(x * (127 / max|x|)); all zero below
       1e-30. A group that holds a NaN or an infinity has the scale NaN and codes of zero. */
    void (*quantize)(Int8Rows *row, const float *x, size_t n, size_t group_size);

    /* y[t][r] = sum over groups, in order, of fmaf((float)dot, weight scale * activation scale, sum)
       for rows 0..n_rows of consecutive tile rows; y rows are `stride` floats apart. The codes are those of
       the encoding as int8, whatever their number of bits. */
    void (*matmul_int8[N_ENCODINGS])(float *y, size_t stride, const Int8Rows *x, size_t n_tokens,
                                     const uint8_t *tiles, size_t n_rows, size_t columns, size_t group_size);

    /* y = x w^T with float activations x (n_tokens, columns): per group part = fmaf(code, x, part)
       over columns in order, then y = fmaf(scale, part, y). */
    void (*matmul_float32[N_ENCODINGS])(float *y, size_t stride, const float *x, size_t n_tokens,
                                        const uint8_t *tiles, size_t n_rows, size_t columns,
                                        size_t group_size);

    /* y[c] = scale * code of one row of a matrix (exact: 11 + 7 bits fit in a float). */
    void (*dequantize_row[N_ENCODINGS])(float *y, const uint8_t *matrix, size_t row, size_t columns,
                                        size_t group_size);

    /* cosine[i], sine[i] of the float32 product position * frequency[i], times scale; argument reduced and
       evaluated in double, so that no libm decides a bit. */
    void (*rope_angles)(float *cosine, float *sine, const float *frequency, size_t n, size_t position,
                        float scale);

    /* In place, rotate-half: x0' = fmaf(x0, cos, -(x1 * sin)), x1' = fmaf(x1, cos, x0 * sin); * scale. */
    void (*rope)(float *x, const float *cosine, const float *sine, size_t head_dim, float scale);

    /* Put k and v (head_dim) of position `index` of a block in their places. fp16 is rounded to nearest even.
       int8 has the scale and codes that quantize_tiles tries first, one scale for k and one for v; the scale
       is NaN if a value is not finite. */
    void (*store_kv[3])(char *keys, char *values, size_t index, const float *k, const float *v,
                        size_t head_dim);

    /* out = softmax(q . k) v, by KVType. Per block, from absolute position 0:
         score = fmaf chain over dimensions in order;  m_b = max;  p = exp(score - m_b);
         l_b = sum p (16 lanes, then the tree);  o_b = fmaf chain over positions in order;
       blocks are merged in order: m' = max(m, m_b), a = exp(m - m'), b = exp(m_b - m'),
         l = fmaf(l, a, l_b * b), o = fmaf(o, a, o_b * b);  at the end out = o * (1 / l).
       l_b is NaN if a score is not finite, and so is all of out then.
       Where weights are wanted: weight = exp(score - m) * (1 / l) of every position seen.
       KV_I8 differs in its two products. Scores are those of matmul_int8 after quantize made one group of q,
       with zeros up to PADDED(head_dim). And p times the scale of its position's value, zero if the position
       is not seen, is quantised in groups of VALUE_GROUP positions: o_b = fmaf((float)dot, scale, o_b), over
       groups in order. */
    void (*attend[3])(const Attention *task);

    /* y[i] = (gate[i] / (1 + exp(-gate[i]))) * up[i] */
    void (*swiglu)(float *y, const float *gate, const float *up, size_t n);

    /* y[i] += x[i] */
    void (*add)(float *y, const float *x, size_t n);

    /* y[i] = fmaf(scale, x[i], y[i]) */
    void (*add_scaled)(float *y, const float *x, size_t n, float scale);

    /* y[r] = sum of w[r][c] x[c]: fmaf in 16 lanes, then the tree. w (rows, columns) is plain float32. */
    void (*matvec)(float *y, const float *x, const float *w, size_t rows, size_t columns);

    /* y[i] = exp((x[i] - max x) * inverse_temperature); returns the sum of y (16 lanes, then the tree). */
    float (*exponentials)(float *y, const float *x, size_t n, float inverse_temperature);

    /* Ids of the k largest of x, largest first, equal ones by lower id; k <= n. 1 if x holds a NaN. */
    int (*top_k)(int32_t *ids, const float *x, size_t n, size_t k);

    /* Stored form of one tile row (16 rows) from rows of `type`, NULL for padding. Per group and row:
       ENCODING_INT8:
         scale = fp16(max|w| / 127), the next fp16 up if max|w| > 127.5 scale;
         code = w / scale rounded to nearest even, clamped to -127..127;
       then once more from scale = fp16(sum w code / sum code^2), kept if sum (w - scale code)^2 is less.
       The others: of the scales tried, the first with the least sum of importance (w - scale code)^2, where
       code is the nearest that there is and importance is (columns) >= 0 or NULL for 1 everywhere. Tried are
       fp16(w of the largest magnitude, the first such, / an end of the codes x a factor), and each of them
       once more as fp16(sum importance w code / sum importance code^2). tiles_fitted.h has them. */
    void (*quantize_tiles[N_ENCODINGS])(uint8_t *tiles, const void *const rows[LANES], SourceType type,
                                        const float *importance, size_t columns, size_t group_size,
                                        QuantizationError *error);

    /* The int8 dot products of this table on registers alone, nothing read and nothing stored: the most that
       a product of matrices could reach. Every factor is 1, so the sum counts the multiply-adds, which are
       returned. rounds <= 2^20. */
    size_t (*int8_peak)(size_t rounds);
} Kernels;

/* Every table compiled in, narrowest first, and how many. */
extern const Kernels *const all_kernels[];
extern const size_t n_kernels;

/* Whether this CPU (and operating system) runs that table. */
int kernels_runnable(const Kernels *kernels);

#endif
