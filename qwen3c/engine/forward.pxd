# cython: language_level=3
"""The structs of the forward pass: plain numbers and pointers, without Python.

    dim, hidden_dim      width of the residual stream x, width inside the feed-forward
    q_dim, kv_dim        n_heads * head_dim, n_kv_heads * head_dim
    n                    rows in flight; all shapes are (a, b) row-major
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t

from ..kernels.table cimport Encoding, Int8Rows, KVType


cdef extern from "kernels/team.h" nogil:
    ctypedef struct Team:
        uint32_t *counters
        size_t capacity
        int stopped
    ctypedef struct Worker:
        size_t index, stages
    int team_reserve(Team *team, size_t max_threads, size_t stages)
    void team_begin(Team *team, size_t threads)
    void team_stop(Team *team)
    Worker team_worker(Team *team, size_t index)
    Py_ssize_t stage(Worker *w, Py_ssize_t n)
    bint take(Worker *w, Py_ssize_t *task)


# ----------------------------------------------------------------------------
# Weights: pointers into the mapped file

cdef struct Matrix:
    const uint8_t *tiles  # of (rows, columns)
    Py_ssize_t rows, columns
    Encoding encoding


cdef struct Layer:
    const float *attention_norm  # (dim,)
    Matrix *qkv  # (n_qkv,) that together have (q_dim + 2 kv_dim, dim): one, or more if encodings differ
    Py_ssize_t n_qkv
    const float *qkv_bias  # (q_dim + 2 kv_dim,) or NULL
    const float *q_norm  # (head_dim,) or NULL
    const float *k_norm  # (head_dim,) or NULL
    Matrix o  # (dim, q_dim)
    const float *ffn_norm  # (dim,)
    const float *router  # (n_experts, dim), or NULL: no experts, gate_up and down are one matrix each
    Matrix *gate_up  # (n_experts or 1,) of (2 hidden_dim, dim)
    Matrix *down  # (n_experts or 1,) of (dim, hidden_dim)


cdef struct Weights:
    const float *rope_frequencies  # (head_dim / 2,)
    Matrix embedding  # (vocab_size, dim)
    Layer *layers  # (n_layers,)
    const float *final_norm  # (dim,)
    Matrix lm_head  # (vocab_size, dim), the embedding if tied


# Consecutive rows of activations that are multiplied by the same matrix, such as that of one expert.
cdef struct Group:
    Py_ssize_t row, n_rows
    Py_ssize_t matrix  # its index among the layer's matrices


# ----------------------------------------------------------------------------
# Run state: the buffers of a pass, sized for `capacity` rows; lay_out places them in one piece of memory

cdef struct RunState:
    char *memory
    Py_ssize_t capacity
    float *x  # (n, dim) residual stream
    float *xb  # (n, max(dim, q_dim)) normalised x; attention output
    float *qkv  # (n, q_dim + 2 kv_dim)
    float *y  # (n, dim) what a branch adds to x
    float *h  # (n, 2 hidden_dim) gate, up; with experts (slots, 2 expert_hidden_dim)
    float *hb  # (n, hidden_dim) swiglu(gate, up); with experts (slots, expert_hidden_dim)
    float *scores  # (n, n_experts) of the router
    float *shares  # (n, n_experts_per_token) weights of the chosen experts
    int32_t *chosen  # (n, n_experts_per_token) the chosen experts, ascending
    int32_t *slots  # (n, n_experts_per_token) the slot of each choice: choices sorted by expert, then by row
    int32_t *choices  # (slots,) the choice of each slot: the inverse of `slots`
    float *xs  # (slots, dim) xb of each slot's row; then what the slot's expert makes of it
    Group *groups  # (n_groups,) the slots of each expert that was chosen
    Py_ssize_t n_groups
    float *cosine  # (n, head_dim / 2)
    float *sine  # (n, head_dim / 2)
    Int8Rows xq  # (n, widest input of a matrix) the input of the next product as int8
    float *scratch  # (threads, ATTENTION_SCRATCH)


# Consecutive rows of one sequence, few enough that one attention task takes them with a group of heads.
cdef struct Span:
    Py_ssize_t row, n_rows
    Py_ssize_t position  # of the first row
    char **blocks  # KV blocks of the sequence


# What one forward pass is asked for.
cdef struct Pass:
    const int32_t *tokens  # (n,)
    Py_ssize_t n
    const Span *spans  # (n_spans,), they cover the n rows in order
    Py_ssize_t n_spans
    const Py_ssize_t *wanted  # (n_wanted,) rows whose logits are asked for, ascending
    Py_ssize_t n_wanted
    bint hidden  # stop before the product with the vocabulary
    float *out  # (n_wanted, vocab_size) logits, or (n_wanted, dim) if hidden


# The arrays a trace can fill, in the order of probes.ARRAYS, and the points of a pass where they are filled.
cdef enum Array:
    EMBEDDING, ATTENTION_NORM, QKV, Q_NORM, K_NORM, ATTENTION, HEADS, O, FFN_NORM, GATE_UP, HIDDEN, DOWN,
    ROUTER, SHARES, EXPERT_GATE_UP, EXPERT_HIDDEN, EXPERT_DOWN, EXPERTS, X, FINAL_NORM, N_ARRAYS

cdef enum Point:
    EMBEDDED, PROJECTED, ATTENDED, FED_FORWARD, LAYER_DONE, NORMED


cdef struct Trace:
    bint on
    Py_ssize_t n, row  # rows of the arrays; the row of them at which the current pass begins
    float **arrays  # (n_layers, N_ARRAYS), NULL: not wanted


# A model as the threads of a pass see it: plain numbers and pointers, no Python objects.
cdef struct Network:
    Py_ssize_t n_layers, n_heads, n_kv_heads, head_dim, dim, hidden_dim, q_dim, kv_dim, vocab_size, group_size
    Py_ssize_t n_experts, n_experts_per_token, expert_hidden_dim
    bint norm_topk_prob
    float eps, rope_scale
    KVType kv_type
    bint int8  # whether activations are int8 (else float32)
    Py_ssize_t block_bytes, head_bytes  # of a KV block; of one (layer, KV head) in it
    Py_ssize_t row_work  # multiply-adds of the matrices for one row
    int threads
    Weights weights
    RunState s
    Trace trace
    Team team



cdef size_t forward(Network *m, size_t thread, const Pass *p) noexcept nogil
cdef void read_out(Network *m, size_t thread, const float *x, Py_ssize_t n, float *out) noexcept nogil
cdef size_t lay_out(Network *m, Py_ssize_t rows, char *memory) noexcept
cdef int raise_pending() except -1
cdef Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil
