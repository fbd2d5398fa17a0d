# cython: language_level=3
"""The table of kernels for Cython code; kernels/kernels.h describes every entry."""

from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t


cdef extern from "kernels/kernels.h" nogil:
    const Py_ssize_t LANES
    const Py_ssize_t KV_BLOCK
    const Py_ssize_t ATTENTION_ROWS
    Py_ssize_t ATTENTION_SCRATCH(Py_ssize_t head_dim)
    ctypedef enum Encoding:
        ENCODING_INT8, ENCODING_INT4, ENCODING_INT6, N_ENCODINGS
    Py_ssize_t code_bytes(Encoding encoding, Py_ssize_t group_size)
    Py_ssize_t tile_row_bytes(Encoding encoding, Py_ssize_t columns, Py_ssize_t group_size)
    ctypedef enum KVType:
        KV_F32, KV_F16, KV_I8
    Py_ssize_t key_bytes(KVType type, Py_ssize_t head_dim)
    Py_ssize_t value_bytes(KVType type, Py_ssize_t head_dim)
    ctypedef enum SourceType:
        SOURCE_BF16, SOURCE_F16, SOURCE_F32
    ctypedef struct Int8Rows:
        int8_t *codes
        float *scales
        int32_t *sums
    ctypedef struct Attention:
        const float *q
        float *out
        size_t q_stride, out_stride, n_tokens, group, head_dim, position
        char **blocks
        size_t k_offset, v_offset
        float *scratch
        float *weights
        size_t weights_token, weights_head
    ctypedef struct QuantizationError:
        double largest, error_square, square
        int64_t bad
    ctypedef struct Kernels:
        const char *name
        void (*rmsnorm)(float *, const float *, const float *, size_t, float) noexcept nogil
        void (*quantize)(Int8Rows *, const float *, size_t, size_t) noexcept nogil
        void (*matmul_int8[3])(
            float *, size_t, const Int8Rows *, size_t, const uint8_t *, size_t, size_t, size_t) noexcept nogil
        void (*matmul_float32[3])(
            float *, size_t, const float *, size_t, const uint8_t *, size_t, size_t, size_t) noexcept nogil
        void (*dequantize_row[3])(float *, const uint8_t *, size_t, size_t, size_t) noexcept nogil
        void (*rope_angles)(float *, float *, const float *, size_t, size_t, float) noexcept nogil
        void (*rope)(float *, const float *, const float *, size_t, float) noexcept nogil
        void (*store_kv[3])(char *, char *, size_t, const float *, const float *, size_t) noexcept nogil
        void (*attend[3])(const Attention *) noexcept nogil
        void (*swiglu)(float *, const float *, const float *, size_t) noexcept nogil
        void (*add)(float *, const float *, size_t) noexcept nogil
        void (*add_scaled)(float *, const float *, size_t, float) noexcept nogil
        void (*matvec)(float *, const float *, const float *, size_t, size_t) noexcept nogil
        float (*exponentials)(float *, const float *, size_t, float) noexcept nogil
        int (*top_k)(int32_t *, const float *, size_t, size_t) noexcept nogil
        void (*quantize_tiles[3])(
            uint8_t *, const void **, SourceType, const float *, size_t, size_t, QuantizationError *
        ) noexcept nogil
        size_t (*int8_peak)(size_t) noexcept nogil


# The kernels of the instruction set in use: one for the whole process.
cdef const Kernels *kernels

# True in a child after fork(), which has none of the threads that OpenMP would wait for.
cdef bint forked
