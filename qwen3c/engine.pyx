# cython: language_level=3, cdivision=True
"""The engine: tokens in, logits out.

    tokens -> embedding -> n_layers x ( x += attention(rmsnorm(x));  x += swiglu(rmsnorm(x)) ) -> rmsnorm -> logits

A forward pass takes rows (token, position, sequence) of any number of sessions: a prompt is many rows of one
session, decoding is one row, a batch is both mixed. One body serves them all.

    dim, hidden_dim      width of the residual stream x, width inside the feed-forward
    q_dim, kv_dim        n_heads * head_dim, n_kv_heads * head_dim
    n                    rows in flight, at most MAX_ROWS; all shapes are (a, b) row-major

All threads of a pass run the same `forward`, in which every block is a stage: tasks that they share out, output rows,
heads or tokens, never a sum, so no thread count changes a bit (kernels/team.h). Arguments are checked at the Python
edge; inside nogil nothing can fail. What the kernels compute is written in kernels/kernels.h.
"""

import fnmatch
import operator
import threading
from typing import Literal

import numpy as np

from .format import KV_TYPES, ROPE_TENSOR, ROUTER, ModelFile
from .kernels.table import (
    ISA_NAMES, OPENMP, int8_peak, isa, log_sum_exp, quantize_tiles, read_bandwidth, runnable_isas, set_isa, softmax, top_k,
)
from .machine import default_threads
from .memory import available, in_huge_pages

Logits = Literal["last", "all", "hidden"]
Activations = Literal["int8", "float32"]
KV = Literal["int8", "f16", "f32"]

cimport cython
from cython.parallel cimport prange
from libc.stdint cimport int8_t, int32_t, uint8_t, uint32_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.math cimport sqrt
from libc.string cimport memcpy, memset

from .kernels.table cimport (
    ATTENTION_ROWS, ATTENTION_SCRATCH, KV_BLOCK, KV_F16, KV_F32, KV_I8, TILE_BYTES,
    Attention, Int8Rows, KVType, forked, kernels, key_bytes, value_bytes,
)


cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **p, size_t alignment, size_t size)


cdef extern from "kernels/openmp.h" nogil:
    int team_size()
    int startable_team(int wanted)


cdef extern from "kernels/team.h" nogil:
    ctypedef struct Team:
        uint32_t *counters
        int stopped
    ctypedef struct Worker:
        size_t index, stages
    int team_reserve(Team *team, size_t max_threads, size_t stages)
    void team_begin(Team *team, size_t threads)
    void team_stop(Team *team)
    Worker team_worker(Team *team, size_t index)
    Py_ssize_t stage(Worker *w, Py_ssize_t n)
    bint take(Worker *w, Py_ssize_t *task)


cdef extern from "Python.h" nogil:
    int CheckSignals "PyErr_CheckSignals"()  # an exception stays pending, for the end of the pass


# Rows one pass through the layers takes; longer prompts go in several. Large enough that reading a weight is
# paid for by using it often, small enough that the buffers stay tens of megabytes.
cdef Py_ssize_t MAX_ROWS = 256

# A pass of fewer multiply-adds is done by one thread: waking a second costs more than it saves.
cdef Py_ssize_t SERIAL_WORK = 8_000_000

# What one task takes: enough to be worth taking, little enough that threads finish together.
cdef Py_ssize_t TASK_BYTES = 64 * 1024  # of weights
cdef Py_ssize_t TASK_ROWS = 4  # of activations
cdef Py_ssize_t TASK_COLUMNS = 1024  # of one row in the feed-forward, or a little more: whole groups


# ----------------------------------------------------------------------------
# Weights: pointers into the mapped file

cdef struct Matrix:
    const uint8_t *tiles  # INT8 tiles of (rows, columns)
    Py_ssize_t rows, columns


cdef struct Layer:
    const float *attention_norm  # (dim,)
    Matrix qkv  # (q_dim + 2 kv_dim, dim)
    const float *qkv_bias  # (q_dim + 2 kv_dim,) or NULL
    const float *q_norm  # (head_dim,) or NULL
    const float *k_norm  # (head_dim,) or NULL
    Matrix o  # (dim, q_dim)
    const float *ffn_norm  # (dim,)
    const float *router  # (n_experts, dim) or NULL: without experts the two below are one matrix each
    Matrix *gate_up  # (n_experts or 1,) of (2 hidden_dim, dim)
    Matrix *down  # (n_experts or 1,) of (dim, hidden_dim)


cdef struct Weights:
    const float *rope_frequencies  # (head_dim / 2,)
    Matrix embedding  # (vocab_size, dim)
    Layer *layers  # (n_layers,)
    const float *final_norm  # (dim,)
    Matrix lm_head  # (vocab_size, dim), the embedding if tied


# Consecutive rows of activations that meet the same matrix.
cdef struct Group:
    Py_ssize_t row, n_rows
    Py_ssize_t matrix  # index


# ----------------------------------------------------------------------------
# Run state: the buffers of a forward pass, sized for `capacity` rows

cdef struct RunState:
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
    int32_t *choices  # (slots,) the choice of each slot, the other way round
    float *xs  # (slots, dim) xb of each slot's row; what its expert makes of it
    Group *groups  # (n_groups,) the slots of each expert that was chosen
    Py_ssize_t n_groups
    float *cosine  # (n, head_dim / 2)
    float *sine  # (n, head_dim / 2)
    Int8Rows xq  # (n, widest input of a matrix)
    float *scratch  # (threads, ATTENTION_SCRATCH)


# Consecutive rows of one sequence, few enough that one attention task takes them with a group of heads.
cdef struct Span:
    Py_ssize_t row, n_rows
    Py_ssize_t position  # of the first row
    char **blocks  # KV blocks of the sequence


# ----------------------------------------------------------------------------
# Trace: where a forward pass leaves copies of what it computes; NULL is not wanted

cdef struct LayerTrace:
    float *attention_norm  # (n, dim)
    float *qkv  # (n, q_dim + 2 kv_dim)
    float *q_norm  # (n, n_heads, head_dim)
    float *k_norm  # (n, n_kv_heads, head_dim)
    float *attention  # (n_heads, n, n) softmax(q k^T), zero where a row does not see
    float *heads  # (n, q_dim) attention output
    float *o  # (n, dim)
    float *ffn_norm  # (n, dim)
    float *gate_up  # (n, 2 hidden_dim)
    float *hidden  # (n, hidden_dim)
    float *down  # (n, dim)
    float *router  # (n, n_experts) logits; with experts, in place of the three above
    float *shares  # (n, n_experts) of the chosen experts, zero of the others
    float *expert_gate_up  # (n, n_experts_per_token, 2 expert_hidden_dim) of each row's experts, ascending
    float *expert_hidden  # (n, n_experts_per_token, expert_hidden_dim)
    float *expert_down  # (n, n_experts_per_token, dim)
    float *experts  # (n, dim) sum of share times expert
    float *x  # (n, dim) residual stream after the layer


cdef struct Trace:
    Py_ssize_t n, row  # rows of the arrays; where the current pass begins in them
    float *embedding  # (n, dim)
    LayerTrace *layers  # (n_layers,)
    float *final_norm  # (n, dim)


# ----------------------------------------------------------------------------
# KV cache: blocks of KV_BLOCK positions at absolute places, all layers in one block

@cython.final
cdef class KVBlock:
    """Keys and values of KV_BLOCK positions: (n_layers, n_kv_heads, keys | values), zero where unwritten.

    The memory comes untouched from the operating system, so a page costs nothing until a position uses it.
    """

    cdef char *data
    cdef Py_ssize_t size
    cdef int owners  # sessions that hold it; fork() shares, writing copies

    def __cinit__(self, Py_ssize_t size):
        self.data = <char *>calloc(size, 1)
        if self.data == NULL:
            raise MemoryError(f"KV cache: no memory for another block of {size:,} bytes")
        self.size = size
        self.owners = 1

    def __dealloc__(self):
        free(self.data)

    cdef KVBlock copy(self):
        cdef KVBlock block = KVBlock(self.size)
        memcpy(block.data, self.data, self.size)
        return block


cdef class Session:
    """One sequence: its position and its KV cache. Made by Model.session().

    Sessions of one model are independent; a batch (Model.forward) takes any number of them forward at once.
    """

    cdef Model _model
    cdef Py_ssize_t _position, _context
    cdef list blocks
    cdef char **pointers  # data of each block, for nogil code

    def __cinit__(self, model=None, context=None):
        if not isinstance(model, Model):
            raise TypeError("a Session is made by Model.session()")
        limit = model.config.context
        self._context = limit if context is None else _integer("context", context)
        if not 1 <= self._context <= limit:
            raise ValueError(f"context = {self._context} is outside 1..{limit}, the context of the model")
        self.pointers = <char **>calloc((self._context + KV_BLOCK - 1) // KV_BLOCK, sizeof(char *))
        if self.pointers == NULL:
            raise MemoryError(f"no memory for a session of context {self._context}")
        self.blocks = []
        self._model = model

    def __repr__(self):
        return f"<Session, {self._position} of {self._context} positions, {self.kv_bytes:,} bytes of KV cache>"

    def __reduce__(self):
        raise TypeError("a Session cannot be pickled or copied: its KV cache lives in this process; fork() makes a second one")

    def __dealloc__(self):
        cdef KVBlock block
        if self.blocks is not None:
            for block in self.blocks:
                block.owners -= 1
        free(self.pointers)

    @property
    def model(self):
        """The Model that this sequence belongs to."""
        return self._model

    @property
    def position(self):
        """How many tokens the sequence has: the position of the next one."""
        return self._position

    @property
    def context(self):
        """How many positions the sequence may have."""
        return self._context

    @property
    def kv_bytes(self):
        """Bytes of KV cache allocated so far (blocks shared after fork() count in each session)."""
        return len(self.blocks) * self._model.block_bytes

    def forward(self, ids, logits="last"):
        """Append token ids; return (vocab_size,) logits of the last one, or (len(ids), vocab_size) of all.

        logits: "last", "all", or "hidden": (dim,) of the last one after the final norm, which the logits would
        be made of.
        ValueError, with both numbers and the session unchanged, if ids is empty, an id is outside the vocabulary
        or the positions would pass the context. KeyboardInterrupt leaves the session as it was.
        """
        return self._model.forward([(self, ids)], logits)[0]

    def rewind(self, position):
        """Forget everything from `position` on; the memory behind it is given back."""
        cdef Py_ssize_t target = _integer("position", position)
        with self._model.lock:
            if not 0 <= target <= self._position:
                raise ValueError(f"cannot rewind to {target}: the session is at position {self._position}")
            self._position = target
            self._drop_blocks((target + KV_BLOCK - 1) // KV_BLOCK)

    def fork(self):
        """A second sequence with the same past; full cache blocks are shared until one side writes."""
        cdef Session other = Session(self._model, self._context)
        cdef KVBlock block
        with self._model.lock:
            self._model._check_open()
            other._position = self._position
            for i, block in enumerate(self.blocks):
                block.owners += 1
                other.blocks.append(block)
                other.pointers[i] = block.data
        return other

    cdef _drop_blocks(self, Py_ssize_t keep):
        cdef KVBlock block
        while len(self.blocks) > keep:
            block = self.blocks.pop()
            block.owners -= 1

    cdef _make_room(self, Py_ssize_t n):
        """Blocks for n more positions, none of those written to shared with another session."""
        cdef Py_ssize_t i
        cdef KVBlock block
        for i in range(self._position // KV_BLOCK, (self._position + n + KV_BLOCK - 1) // KV_BLOCK):
            if i == len(self.blocks):
                self.blocks.append(KVBlock(self._model.block_bytes))
            elif (<KVBlock>self.blocks[i]).owners > 1:
                block = (<KVBlock>self.blocks[i]).copy()
                (<KVBlock>self.blocks[i]).owners -= 1
                self.blocks[i] = block
            self.pointers[i] = (<KVBlock>self.blocks[i]).data


# ----------------------------------------------------------------------------
# Model: the mapped file, its weights, its run state

cdef class Model:
    """A mapped model.bin and the buffers of its forward pass; threads may share it (calls take turns).

    path: the file. threads: None for as many as this machine can feed. kv: "f16", "f32" or "int8", the KV cache.
    activations: "int8", or "float32" to compare with other implementations. huge_pages: copy the weights into
    memory of large pages (memory.in_huge_pages says what that costs and gains).
    ModelFileError, one line, if the file is not a model.bin that this version can run.
    """

    cdef str _path, _kv, _activations
    cdef object _config, _metadata, _file
    cdef int _threads
    cdef bint _closed
    cdef object lock
    cdef Weights w
    cdef RunState s
    cdef Trace t
    cdef Team team
    cdef Py_ssize_t n_layers, n_heads, n_kv_heads, head_dim, dim, hidden_dim, q_dim, kv_dim, vocab_size, group_size
    cdef Py_ssize_t n_experts, n_experts_per_token, expert_hidden_dim
    cdef bint norm_topk_prob
    cdef Py_ssize_t block_bytes, head_bytes  # of a KV block; of one (layer, KV head) in it
    cdef Py_ssize_t row_work  # multiply-adds of the matrices for one row
    cdef float eps, rope_scale
    cdef KVType kv_type
    cdef bint int8

    def __cinit__(self, *arguments, **options):
        if not arguments and "path" not in options:
            raise TypeError(f"{type(self).__name__}() needs the path of a model.bin: {type(self).__name__}(path)")

    @cython.embedsignature(True)  # to begin the docstring of the class; what binds has its signature anyway
    def __init__(self, path, threads=None, kv="f16", activations="int8", huge_pages=False):
        if self.lock is not None:
            raise TypeError(f"{self._path}: the model is open already")
        if kv not in KV_TYPES:
            raise ValueError(f"kv is {kv!r}, not 'int8', 'f16' or 'f32'")
        if activations not in ("int8", "float32"):
            raise ValueError(f"activations is {activations!r}, not 'int8' or 'float32'")
        wanted = default_threads() if threads is None else _integer("threads", threads)
        if not 1 <= wanted <= 1024:
            raise ValueError(f"threads = {wanted} is outside 1..1024")
        self._file = ModelFile(path)
        if huge_pages:
            self._file.use_copy(in_huge_pages(self._file.weights))
        self._path, self._kv, self._activations = self._file.path, kv, activations
        self._config, self._metadata = self._file.config, self._file.metadata
        self.kv_type = {"int8": KV_I8, "f16": KV_F16, "f32": KV_F32}[kv]
        self.int8 = activations == "int8"
        self._set_dimensions()
        self._map_weights()
        self._threads = _team(wanted)
        self.t.layers = <LayerTrace *>calloc(self.n_layers, sizeof(LayerTrace))
        if self.t.layers == NULL:
            raise MemoryError(f"no memory for {self.n_layers} layers")
        team_stop(&self.team)  # so that this pass does nothing but count its stages
        if team_reserve(&self.team, self._threads, forward(self, 0, NULL, 0, NULL, 0, NULL, 0, False, NULL)):
            raise MemoryError(f"no memory for {self._threads} threads")
        self._reserve(1)
        self.lock = threading.Lock()  # last: a model without one was never opened

    def __dealloc__(self):
        cdef Py_ssize_t l
        for l in range(self.n_layers if self.w.layers else 0):
            free(self.w.layers[l].gate_up)
            free(self.w.layers[l].down)
        free(self.w.layers)
        free(self.t.layers)
        free(self.team.counters)
        self._free_buffers()

    def __reduce__(self):
        raise TypeError("an engine.Model cannot be pickled or copied: open its path again; a qwen3c.Model does that by itself")

    @property
    def path(self):
        """The path of the model.bin, as it was given."""
        return self._path

    @property
    def file(self):
        """The mapped file: a format.ModelFile."""
        return self._file

    @property
    def config(self):
        """The numbers of the forward pass: a format.Config, such as config.n_layers and config.context."""
        return self._config

    @property
    def metadata(self):
        """What else the file says of the model, such as metadata["name"]."""
        return self._metadata

    @property
    def threads(self):
        """How many threads a pass has: those asked for that could be started."""
        return self._threads

    @property
    def kv(self):
        """The type of the KV cache: "f16", "f32" or "int8"."""
        return self._kv

    @property
    def activations(self):
        """What meets the weights: "int8" or "float32"."""
        return self._activations

    @property
    def closed(self):
        """Whether close() was called."""
        return self._closed

    def close(self):
        """Release the weights and the buffers; a call under way in another thread ends first.

        From then on every call that needs them is a ValueError, also of the model's sessions. The KV cache of a
        session goes with the session.
        """
        with self.lock:
            self._closed = True
            self._file.close()
            self._free_buffers()

    def _check_open(self):
        if self.lock is None:
            raise ValueError("the model was never opened: its __init__ did not run or raised")
        if self._closed:
            raise ValueError(f"{self._path}: the model is closed")

    cdef _set_dimensions(self):
        c = self._config
        self.n_layers, self.n_heads, self.n_kv_heads, self.head_dim = c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim
        self.dim, self.hidden_dim, self.q_dim, self.kv_dim = c.dim, c.hidden_dim, c.q_dim, c.kv_dim
        self.vocab_size, self.group_size = c.vocab_size, c.group_size
        self.n_experts, self.n_experts_per_token, self.expert_hidden_dim = c.n_experts, c.n_experts_per_token, c.expert_hidden_dim
        self.norm_topk_prob = c.norm_topk_prob
        self.eps, self.rope_scale = c.rms_eps, c.rope_attention_scale
        self.head_bytes = key_bytes(self.kv_type, self.head_dim) + value_bytes(self.kv_type, self.head_dim)
        self.block_bytes = self.n_layers * self.n_kv_heads * self.head_bytes
        hidden = max(self.hidden_dim, self.n_experts_per_token * self.expert_hidden_dim)
        self.row_work = self.dim * (self.n_layers * (2 * self.q_dim + 2 * self.kv_dim + 3 * hidden) + self.vocab_size)

    # ---- weights

    cdef _map_weights(self):
        places = {t.name: t for t in self._file.tensors}
        embedding = "model.embed_tokens.weight"
        cdef Layer *layer
        self.w.layers = <Layer *>calloc(self.n_layers, sizeof(Layer))
        if self.w.layers == NULL:
            raise MemoryError(f"no memory for {self.n_layers} layers")
        self.w.rope_frequencies = self._vector(places[ROPE_TENSOR])
        self.w.embedding = self._matrix(places[embedding])
        for l in range(self.n_layers):
            layer = &self.w.layers[l]
            p = f"model.layers.{l}."
            layer.attention_norm = self._vector(places[p + "input_layernorm.weight"])
            layer.qkv = self._matrix(places[p + "self_attn.qkv_proj.weight"])
            if self._config.qkv_bias:
                layer.qkv_bias = self._vector(places[p + "self_attn.qkv_proj.bias"])
            if self._config.qk_norm:
                layer.q_norm = self._vector(places[p + "self_attn.q_norm.weight"])
                layer.k_norm = self._vector(places[p + "self_attn.k_norm.weight"])
            layer.o = self._matrix(places[p + "self_attn.o_proj.weight"])
            layer.ffn_norm = self._vector(places[p + "post_attention_layernorm.weight"])
            blocks = [p + "mlp."]
            if self._config.has_experts(l):
                layer.router = self._vector(places[p + ROUTER])
                blocks = [f"{p}mlp.experts.{e}." for e in range(self.n_experts)]
            layer.gate_up = self._matrices([places[block + "gate_up_proj.weight"] for block in blocks])
            layer.down = self._matrices([places[block + "down_proj.weight"] for block in blocks])
        self.w.final_norm = self._vector(places["model.norm.weight"])
        self.w.lm_head = self._matrix(places[embedding if self._config.tied_embedding else "lm_head.weight"])

    cdef const uint8_t *_data(self, tensor) except NULL:
        # self._file keeps the map, and so this address, alive as long as the model
        return <const uint8_t *><uintptr_t>np.frombuffer(self._file.data(tensor), dtype=np.uint8).ctypes.data

    cdef const float *_vector(self, tensor) except NULL:
        return <const float *>self._data(tensor)

    cdef Matrix _matrix(self, tensor) except *:
        cdef Matrix matrix
        matrix.tiles = self._data(tensor)
        matrix.rows, matrix.columns = tensor.shape
        return matrix

    cdef Matrix *_matrices(self, list tensors) except NULL:
        cdef Py_ssize_t i
        cdef Matrix *matrices = <Matrix *>calloc(len(tensors), sizeof(Matrix))
        if matrices == NULL:
            raise MemoryError(f"no memory for {len(tensors)} matrices")
        for i in range(len(tensors)):
            matrices[i] = self._matrix(tensors[i])
        return matrices

    def weight(self, str name):
        """Dequantised weights by Hugging Face name and shape. KeyError if there is no such tensor."""
        self._check_open()
        with self.lock:
            self._check_open()
            return self._weight(name)

    cdef _weight(self, str name):
        cdef Matrix matrix
        cdef Py_ssize_t r
        cdef float[:, ::1] view
        for tensor in self._file.tensors:
            for part in tensor.parts:
                if part.name != name:
                    continue
                if not tensor.quantized:
                    stored = np.frombuffer(self._file.data(tensor), dtype="<f4").reshape(tensor.shape)
                    return stored[part.row : part.row + part.rows].copy()
                matrix = self._matrix(tensor)
                result = np.empty((part.rows, matrix.columns), dtype=np.float32)
                view = result
                for r in range(view.shape[0]):
                    kernels.dequantize_row(&view[r, 0], matrix.tiles, <Py_ssize_t>part.row + r, matrix.columns, self.group_size)
                return result
        raise KeyError(name)

    # ---- run state

    cdef _reserve(self, Py_ssize_t n):
        """Buffers for n rows in flight; they only ever grow."""
        if n <= self.s.capacity:
            return
        cdef Py_ssize_t k = self.n_experts_per_token, rows = 1
        cdef Py_ssize_t hidden = max(self.hidden_dim, k * self.expert_hidden_dim)
        cdef Py_ssize_t widest = max(self.dim, self.q_dim, hidden, k * self.dim)
        while rows < n:
            rows *= 2
        self._free_buffers()
        self.s.x = _floats(rows * self.dim)
        self.s.xb = _floats(rows * max(self.dim, self.q_dim))
        self.s.qkv = _floats(rows * (self.q_dim + 2 * self.kv_dim))
        self.s.y = _floats(rows * self.dim)
        self.s.h = _floats(rows * 2 * hidden)
        self.s.hb = _floats(rows * hidden)
        self.s.scores = _floats(rows * self.n_experts)
        self.s.shares = _floats(rows * k)
        self.s.chosen = <int32_t *>_floats(rows * k)
        self.s.slots = <int32_t *>_floats(rows * k)
        self.s.choices = <int32_t *>_floats(rows * k)
        self.s.xs = _floats(rows * k * self.dim)
        self.s.groups = <Group *>_floats(self.n_experts * sizeof(Group) // sizeof(float))
        self.s.cosine = _floats(rows * self.head_dim // 2)
        self.s.sine = _floats(rows * self.head_dim // 2)
        self.s.xq.codes = <int8_t *>_floats((rows * widest + 3) // 4)
        self.s.xq.scales = _floats(rows * widest // self.group_size)
        self.s.xq.sums = <int32_t *>_floats(rows * widest // self.group_size)
        self.s.scratch = _floats(self._threads * ATTENTION_SCRATCH(self.head_dim))
        self.s.capacity = rows

    cdef _free_buffers(self):
        for p in (<uintptr_t>self.s.x, <uintptr_t>self.s.xb, <uintptr_t>self.s.qkv, <uintptr_t>self.s.y,
                  <uintptr_t>self.s.h, <uintptr_t>self.s.hb, <uintptr_t>self.s.scores, <uintptr_t>self.s.shares,
                  <uintptr_t>self.s.chosen, <uintptr_t>self.s.slots, <uintptr_t>self.s.choices,
                  <uintptr_t>self.s.xs, <uintptr_t>self.s.groups, <uintptr_t>self.s.cosine, <uintptr_t>self.s.sine,
                  <uintptr_t>self.s.xq.codes, <uintptr_t>self.s.xq.scales, <uintptr_t>self.s.xq.sums,
                  <uintptr_t>self.s.scratch):
            free(<void *><uintptr_t>p)
        memset(&self.s, 0, sizeof(RunState))

    # ---- Python surface

    def session(self, context=None):
        """An empty sequence of at most `context` positions (default: the model's). Memory grows with use."""
        self._check_open()
        return Session(self, context)

    def forward(self, batch, logits="last"):
        """ONE ragged batch over any sessions of this model; a list of what Session.forward returns, in order.

        batch: pairs of a session and the token ids to append to it, each session once. Prompts and single tokens
        may be mixed: what is computed of a session does not depend on the others, not by a bit.
        """
        self._check_open()
        if logits not in ("last", "all", "hidden"):
            raise ValueError(f"logits is {logits!r}, not 'last', 'all' or 'hidden'")
        batch = [(session, _token_ids(ids, self.vocab_size)) for session, ids in batch]
        if not batch:
            raise ValueError("the batch is empty")
        with self.lock:
            self._check_batch(batch)
            return self._forward_batch(batch, logits == "all", logits == "hidden")

    cdef _check_batch(self, list batch):
        self._check_open()
        seen = set()
        for session, ids in batch:
            if not isinstance(session, Session) or (<Session>session)._model is not self:
                raise ValueError("a session of the batch does not belong to this model")
            if id(session) in seen:
                raise ValueError("a session is in the batch twice; give it all its ids at once")
            seen.add(id(session))
            if session.position + len(ids) > session.context:
                raise ValueError(f"{len(ids)} more ids from position {session.position} pass the context of {session.context}")

    cdef _forward_batch(self, list batch, bint every, bint hidden):
        """Cut the rows of the batch into passes of at most MAX_ROWS; collect the logits, or what they are made of."""
        cdef Py_ssize_t n_total = sum([len(ids) for _, ids in batch]), start, n, out_row = 0, i, first, last
        cdef Session session
        for session, ids in batch:
            session._make_room(len(ids))
        self._reserve(min(n_total, MAX_ROWS))
        tokens = np.concatenate([ids for _, ids in batch])
        ends = np.cumsum([len(ids) for _, ids in batch])
        wanted = np.arange(n_total) if every else ends - 1  # rows whose logits are returned, ascending
        out = np.empty((len(wanted), self.dim if hidden else self.vocab_size), dtype=np.float32)
        for start in range(0, n_total, MAX_ROWS):
            n = min(MAX_ROWS, n_total - start)
            self.t.row = start
            segments = []
            for i, (session, ids) in enumerate(batch):
                first, last = max(start, ends[i] - len(ids)), min(start + n, ends[i])
                if first < last:
                    segments.append((session, first - start, last - first, session._position + first - (ends[i] - len(ids))))
            rows = wanted[(wanted >= start) & (wanted < start + n)] - start
            self._forward_rows(tokens[start : start + n], segments, rows, hidden, out[out_row : out_row + len(rows)])
            out_row += len(rows)
        for session, ids in batch:
            session._position += len(ids)
        if not every:
            return list(out)
        return [out[end - len(ids) : end] for end, (_, ids) in zip(ends, batch)]

    cdef _forward_rows(self, const int32_t[::1] tokens, list segments, rows, bint hidden, float[:, ::1] out):
        """One pass: hand plain arrays to `forward` and let go of the GIL."""
        cdef Py_ssize_t[::1] wanted = rows.astype(np.intp)
        cdef Py_ssize_t n = tokens.shape[0], n_wanted = wanted.shape[0], n_spans = 0, row
        cdef Py_ssize_t tokens_per_span = max(1, ATTENTION_ROWS // (self.n_heads // self.n_kv_heads))
        cdef int i, threads = self._begin_pass(n)
        cdef Session session
        cdef Span *spans = <Span *>malloc(n * sizeof(Span))
        if spans == NULL:
            raise MemoryError(f"no memory for a batch of {n} rows")
        try:
            for session, first, n_rows, position in segments:
                for row in range(0, n_rows, tokens_per_span):
                    spans[n_spans] = Span(first + row, min(tokens_per_span, n_rows - row), position + row, session.pointers)
                    n_spans += 1
            for i in prange(threads, nogil=True, schedule="static", num_threads=threads, use_threads_if=threads > 1):
                forward(self, i, &tokens[0], n, spans, n_spans, &wanted[0] if n_wanted else NULL, n_wanted,
                        hidden, &out[0, 0] if n_wanted else NULL)
        finally:
            free(spans)
        if self.team.stopped:
            raise_pending()

    cdef int _begin_pass(self, Py_ssize_t n):
        """Ready for a pass of n rows; returns for how many threads."""
        cdef int threads = 1 if forked or n * self.row_work < SERIAL_WORK else startable_team(self._threads)
        team_begin(&self.team, threads)
        return threads

    # ---- trace

    def trace(self, ids, names="*"):
        """What a forward pass of `ids` (n) computed on its way, by name, in order: float32, copied in that pass.

        A name is that of the module in transformers, and the array is what the module returns, (n, width):
        model.embed_tokens, model.layers.0.self_attn.q_proj, ..., model.norm, lm_head. Heads keep their axis:
        q_norm and k_norm are (n, heads, head_dim). model.layers.0 is the residual stream after the layer. Some
        are not modules: self_attn.attn_weights, the attention probabilities, (n_heads, n, n), zero where a row
        does not see; self_attn.o_proj.input, (n, q_dim); mlp.down_proj.input, (n, hidden_dim); and beside the
        router's logits mlp.gate, mlp.gate.shares, (n, n_experts): of the chosen experts, zero of the others.
        names: a pattern such as "model.layers.*.attn_weights", or several, to keep less. ValueError if nothing
        is called that, ids are not as in Session.forward, or the arrays pass the memory available.
        """
        self._check_open()
        ids = _token_ids(ids, self.vocab_size)
        batch = [(self.session(), ids)]
        arrays = {}
        with self.lock:
            self._check_batch(batch)
            try:
                self._lay_out_trace(arrays, names, len(ids))
                self._check_trace(arrays, len(ids))
                logits = self._forward_batch(batch, _matches("model.norm", names) or _matches("lm_head", names), False)[0]
            finally:
                self._forget_trace()
        if _matches("lm_head", names):
            arrays["lm_head"] = logits
        if not arrays:
            raise ValueError(f"no activation of this model is called {names!r}")
        return arrays

    cdef _lay_out_trace(self, dict arrays, names, Py_ssize_t n):
        """Arrays for the activations of n rows whose names match, in order, and the pointers `forward` looks at."""
        cdef LayerTrace *t
        cdef Py_ssize_t dim = self.dim, heads = self.n_heads, kv_heads = self.n_kv_heads
        self.t.n = n
        self.t.embedding = _traced(arrays, names, "model.", {"embed_tokens": dim}, (n, dim))
        for l in range(self.n_layers):
            t = &self.t.layers[l]
            p = f"model.layers.{l}."
            qkv = {"q_proj": self.q_dim, "k_proj": self.kv_dim, "v_proj": self.kv_dim}
            t.attention_norm = _traced(arrays, names, p, {"input_layernorm": dim}, (n, dim))
            t.qkv = _traced(arrays, names, p + "self_attn.", qkv, (n, self.q_dim + 2 * self.kv_dim))
            if self.w.layers[l].q_norm != NULL:
                t.q_norm = _traced(arrays, names, p + "self_attn.", {"q_norm": self.head_dim}, (n, heads, self.head_dim))
                t.k_norm = _traced(arrays, names, p + "self_attn.", {"k_norm": self.head_dim}, (n, kv_heads, self.head_dim))
            t.attention = _traced(arrays, names, p + "self_attn.", {"attn_weights": n}, (heads, n, n))
            t.heads = _traced(arrays, names, p + "self_attn.", {"o_proj.input": self.q_dim}, (n, self.q_dim))
            t.o = _traced(arrays, names, p + "self_attn.", {"o_proj": dim}, (n, dim))
            t.ffn_norm = _traced(arrays, names, p, {"post_attention_layernorm": dim}, (n, dim))
            if self.w.layers[l].router != NULL:
                t.router = _traced(arrays, names, p + "mlp.", {"gate": self.n_experts}, (n, self.n_experts))
                t.shares = _traced(arrays, names, p + "mlp.", {"gate.shares": self.n_experts}, (n, self.n_experts))
                e, each = self.expert_hidden_dim, (n, self.n_experts_per_token)
                t.expert_gate_up = _traced(arrays, names, p + "mlp.experts.", {"gate_proj": e, "up_proj": e}, (*each, 2 * e))
                t.expert_hidden = _traced(arrays, names, p + "mlp.experts.", {"down_proj.input": e}, (*each, e))
                t.expert_down = _traced(arrays, names, p + "mlp.experts.", {"down_proj": dim}, (*each, dim))
                t.experts = _traced(arrays, names, p + "mlp.", {"experts": dim}, (n, dim))
            else:
                gate_up = {"gate_proj": self.hidden_dim, "up_proj": self.hidden_dim}
                t.gate_up = _traced(arrays, names, p + "mlp.", gate_up, (n, 2 * self.hidden_dim))
                t.hidden = _traced(arrays, names, p + "mlp.", {"down_proj.input": self.hidden_dim}, (n, self.hidden_dim))
                t.down = _traced(arrays, names, p + "mlp.", {"down_proj": dim}, (n, dim))
            t.x = _traced(arrays, names, "model.", {f"layers.{l}": dim}, (n, dim))
        self.t.final_norm = _traced(arrays, names, "model.", {"norm": dim}, (n, dim))

    cdef _check_trace(self, dict arrays, Py_ssize_t n):
        """The arrays are memory that was asked for but not yet touched: refuse what is not there."""
        needed, free_bytes = sum([array.nbytes for array in arrays.values()]), available()
        if free_bytes is not None and needed > free_bytes:
            raise ValueError(f"the trace of {n} tokens takes {needed:,} bytes, {free_bytes:,} are available; "
                             "ask for fewer tokens or names")

    cdef _forget_trace(self):
        self.t.embedding = self.t.final_norm = NULL
        memset(self.t.layers, 0, self.n_layers * sizeof(LayerTrace))

    def logit_lens(self, x):
        """Logits (n, vocab_size) of rows (n, dim) of the residual stream, as if no layer came after them."""
        self._check_open()
        cdef float[:, ::1] rows = np.ascontiguousarray(x, dtype=np.float32)
        if rows.shape[0] == 0 or rows.shape[1] != self.dim:
            raise ValueError(f"x must have shape (n, {self.dim}), n >= 1, got ({rows.shape[0]}, {rows.shape[1]})")
        logits = np.empty((rows.shape[0], self.vocab_size), dtype=np.float32)
        cdef float[:, ::1] out = logits
        cdef Py_ssize_t start, n
        cdef int i, threads
        with self.lock:
            self._check_open()
            self._reserve(min(rows.shape[0], MAX_ROWS))
            for start in range(0, rows.shape[0], MAX_ROWS):
                n = min(MAX_ROWS, rows.shape[0] - start)
                threads = self._begin_pass(n)
                for i in prange(threads, nogil=True, schedule="static", num_threads=threads, use_threads_if=threads > 1):
                    read_out(self, i, &rows[start, 0], n, &out[start, 0])
        return logits


# ----------------------------------------------------------------------------
# Blocks

cdef Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef bint interrupted() noexcept nogil:
    """Whether a signal has raised an exception."""
    with gil:
        return CheckSignals() != 0


cdef int raise_pending() except -1:
    """Hand on the exception that `interrupted` left."""
    return -1


cdef inline void record(float *to, Py_ssize_t row, const float *values, Py_ssize_t n, Py_ssize_t columns) noexcept nogil:
    """Copy (n, columns) to the rows of a trace from `row` on, if it has that array."""
    if to != NULL:
        memcpy(to + row * columns, values, n * columns * sizeof(float))


cdef Int8Rows int8_rows(Model m, Py_ssize_t row, Py_ssize_t columns) noexcept nogil:
    """xq from `row` on, if it has so many columns."""
    cdef Int8Rows rows
    rows.codes = m.s.xq.codes + row * columns
    rows.scales = m.s.xq.scales + row * (columns // m.group_size)
    rows.sums = m.s.xq.sums + row * (columns // m.group_size)
    return rows


cdef void quantize_row(Model m, const float *x, Py_ssize_t row, Py_ssize_t columns) noexcept nogil:
    cdef Int8Rows to = int8_rows(m, row, columns)
    kernels.quantize(&to, x + row * columns, columns, m.group_size)


cdef void matmul_tiles(
    Model m, float *y, const float *x, const Group *group, const Matrix *w, Py_ssize_t tile, Py_ssize_t n_tiles
) noexcept nogil:
    cdef Py_ssize_t row = tile * 16, rows = min(n_tiles * 16, w.rows - row)
    cdef const uint8_t *tiles = w.tiles + tile * (w.columns // m.group_size) * TILE_BYTES(m.group_size)
    cdef float *out = y + group.row * w.rows + row
    cdef Int8Rows xq
    if m.int8:
        xq = int8_rows(m, group.row, w.columns)
        kernels.matmul_int8(out, w.rows, &xq, group.n_rows, tiles, rows, w.columns, m.group_size)
    else:
        kernels.matmul_float32(out, w.rows, x + group.row * w.columns, group.n_rows, tiles, rows, w.columns, m.group_size)


cdef void matmul(Model m, Worker *worker, float *y, const float *x, Py_ssize_t n, const Matrix *w) noexcept nogil:
    """y (n, rows) = x (n, columns) w^T; x is taken from xq instead, where it was quantised, if activations are int8."""
    cdef Group all_rows = Group(0, n, 0)
    cdef Py_ssize_t n_groups = min(n, 1)
    matmul_groups(m, worker, y, x, &all_rows, &n_groups, n_groups, w)


cdef void matmul_groups(
    Model m, Worker *worker, float *y, const float *x,
    const Group *groups, const Py_ssize_t *n_groups,  # known when the stage has begun
    Py_ssize_t max_groups, const Matrix *matrices,
) noexcept nogil:
    """The same, each group of rows with its own of the matrices, which all have one shape."""
    cdef const Matrix *w = matrices
    cdef Py_ssize_t n_tiles = ceil_div(w.rows, 16)
    cdef Py_ssize_t per_task = max(2, TASK_BYTES // (16 * w.columns) // 2 * 2)  # the kernels take tile rows in pairs
    cdef Py_ssize_t per_group = ceil_div(n_tiles, per_task)
    cdef Py_ssize_t tile, task = stage(worker, max_groups * per_group)
    cdef const Group *group
    while take(worker, &task):
        if task // per_group < n_groups[0]:
            group, tile = &groups[task // per_group], task % per_group * per_task
            matmul_tiles(m, y, x, group, &matrices[group.matrix], tile, min(per_task, n_tiles - tile))


cdef void embed(Model m, Worker *worker, const int32_t *tokens, const Span *spans, Py_ssize_t n_spans) noexcept nogil:
    """x (n, dim) = the tokens' rows of the embedding; cosine, sine (n, head_dim / 2) of their positions."""
    cdef Py_ssize_t row, half = m.head_dim // 2, task = stage(worker, n_spans)
    cdef const Span *span
    while take(worker, &task):
        span = &spans[task]
        for row in range(span.row, span.row + span.n_rows):
            kernels.dequantize_row(m.s.x + row * m.dim, m.w.embedding.tiles, tokens[row], m.dim, m.group_size)
            record(m.t.embedding, m.t.row + row, m.s.x + row * m.dim, 1, m.dim)
            kernels.rope_angles(m.s.cosine + row * half, m.s.sine + row * half, m.w.rope_frequencies, half,
                                span.position + row - span.row, m.rope_scale)


cdef void rmsnorm(
    Model m, Worker *worker, const float *x, const Py_ssize_t *wanted, Py_ssize_t n, const float *weight, float *trace
) noexcept nogil:
    """xb (n, dim), and xq, = x / rms(x) * weight of the wanted rows, NULL for all (https://arxiv.org/abs/1910.07467)."""
    cdef Py_ssize_t i, task = stage(worker, ceil_div(n, TASK_ROWS))
    while take(worker, &task):
        for i in range(task * TASK_ROWS, min(n, (task + 1) * TASK_ROWS)):
            kernels.rmsnorm(m.s.xb + i * m.dim, x + (wanted[i] if wanted != NULL else i) * m.dim, weight, m.dim, m.eps)
            record(trace, m.t.row + i, m.s.xb + i * m.dim, 1, m.dim)
            if m.int8:
                quantize_row(m, m.s.xb, i, m.dim)


cdef void quantize(Model m, Worker *worker, Py_ssize_t n, float *trace) noexcept nogil:
    """xq = the attention output xb (n, q_dim)."""
    cdef Py_ssize_t i, task = stage(worker, ceil_div(n, TASK_ROWS))
    while take(worker, &task):
        for i in range(task * TASK_ROWS, min(n, (task + 1) * TASK_ROWS)):
            record(trace, m.t.row + i, m.s.xb + i * m.q_dim, 1, m.q_dim)
            if m.int8:
                quantize_row(m, m.s.xb, i, m.q_dim)


cdef void add(Model m, Worker *worker, Py_ssize_t n, float *trace_y, float *trace_x) noexcept nogil:
    """x (n, dim) += y."""
    cdef Py_ssize_t i, task = stage(worker, ceil_div(n, TASK_ROWS))
    while take(worker, &task):
        for i in range(task * TASK_ROWS, min(n, (task + 1) * TASK_ROWS)):
            record(trace_y, m.t.row + i, m.s.y + i * m.dim, 1, m.dim)
            kernels.add(m.s.x + i * m.dim, m.s.y + i * m.dim, m.dim)
            record(trace_x, m.t.row + i, m.s.x + i * m.dim, 1, m.dim)


cdef char *kv_at(Model m, char *block, Py_ssize_t layer, Py_ssize_t kv_head) noexcept nogil:
    """Where a block holds the keys of a layer and head; the values follow them."""
    return block + (layer * m.n_kv_heads + kv_head) * m.head_bytes


cdef void rotate_head(Model m, const Span *span, Py_ssize_t l, Py_ssize_t kv_head) noexcept nogil:
    """The part of `rotate_and_store` that a KV head and the query heads of its group have."""
    cdef const Layer *layer = &m.w.layers[l]
    cdef LayerTrace *t = &m.t.layers[l]
    cdef Py_ssize_t group = m.n_heads // m.n_kv_heads, stride = m.q_dim + 2 * m.kv_dim
    cdef Py_ssize_t k_column = m.q_dim + kv_head * m.head_dim, v_column = k_column + m.kv_dim
    cdef Py_ssize_t i, h, row, position, half = m.head_dim // 2
    cdef float *qkv
    cdef float *cosine
    cdef float *sine
    cdef float scale = 1.0 / <float>sqrt(<double>m.head_dim)
    cdef char *keys
    for i in range(span.n_rows):
        row, position = span.row + i, span.position + i
        qkv, cosine, sine = m.s.qkv + row * stride, m.s.cosine + row * half, m.s.sine + row * half
        for h in range(kv_head * group, (kv_head + 1) * group):
            add_bias(m, layer, t, row, h * m.head_dim)
            if layer.q_norm:
                kernels.rmsnorm(qkv + h * m.head_dim, qkv + h * m.head_dim, layer.q_norm, m.head_dim, m.eps)
            record(t.q_norm, (m.t.row + row) * m.n_heads + h, qkv + h * m.head_dim, 1, m.head_dim)
            kernels.rope(qkv + h * m.head_dim, cosine, sine, m.head_dim, scale)
        add_bias(m, layer, t, row, k_column)
        add_bias(m, layer, t, row, v_column)
        if layer.k_norm:
            kernels.rmsnorm(qkv + k_column, qkv + k_column, layer.k_norm, m.head_dim, m.eps)
        record(t.k_norm, (m.t.row + row) * m.n_kv_heads + kv_head, qkv + k_column, 1, m.head_dim)
        kernels.rope(qkv + k_column, cosine, sine, m.head_dim, 1.0)
        keys = kv_at(m, span.blocks[position // KV_BLOCK], l, kv_head)
        kernels.store_kv[<int>m.kv_type](keys, keys + key_bytes(m.kv_type, m.head_dim), position % KV_BLOCK,
                                         qkv + k_column, qkv + v_column, m.head_dim)


cdef void add_bias(Model m, const Layer *layer, const LayerTrace *t, Py_ssize_t row, Py_ssize_t column) noexcept nogil:
    """To the head that begins at a column of qkv."""
    cdef Py_ssize_t stride = m.q_dim + 2 * m.kv_dim
    cdef float *head = m.s.qkv + row * stride + column
    if layer.qkv_bias:
        kernels.add(head, layer.qkv_bias + column, m.head_dim)
    if t.qkv != NULL:
        memcpy(t.qkv + (m.t.row + row) * stride + column, head, m.head_dim * sizeof(float))


cdef void rotate_and_store(Model m, Worker *worker, const Span *spans, Py_ssize_t n_spans, Py_ssize_t l) noexcept nogil:
    """q and k: bias, norm per head, rotate; k and v go to the cache; q is scaled by 1 / sqrt(head_dim)."""
    cdef Py_ssize_t task = stage(worker, n_spans * m.n_kv_heads)
    while take(worker, &task):
        rotate_head(m, &spans[task % n_spans], l, task // n_spans)


cdef void attend(
    Model m, Worker *worker, const Span *span, Py_ssize_t l, Py_ssize_t kv_head, Py_ssize_t part, Py_ssize_t heads
) noexcept nogil:
    """xb (n, q_dim) = softmax(q k^T) v for `heads` query heads of one KV head, the part-th so many of its group."""
    cdef Py_ssize_t group = m.n_heads // m.n_kv_heads, head = kv_head * group + part * heads
    cdef Attention task
    task.q = m.s.qkv + span.row * (m.q_dim + 2 * m.kv_dim) + head * m.head_dim
    task.q_stride = m.q_dim + 2 * m.kv_dim
    task.out = m.s.xb + span.row * m.q_dim + head * m.head_dim
    task.out_stride = m.q_dim
    task.n_tokens = span.n_rows
    task.group = min(heads, group - part * heads)
    task.head_dim = m.head_dim
    task.position = span.position
    task.blocks = span.blocks
    task.k_offset = (l * m.n_kv_heads + kv_head) * m.head_bytes
    task.v_offset = task.k_offset + key_bytes(m.kv_type, m.head_dim)
    task.scratch = m.s.scratch + worker.index * ATTENTION_SCRATCH(m.head_dim)
    task.weights = m.t.layers[l].attention
    if task.weights != NULL:
        task.weights += (head * m.t.n + m.t.row + span.row) * m.t.n
        task.weights_token, task.weights_head = m.t.n, m.t.n * m.t.n
    kernels.attend[<int>m.kv_type](&task)


cdef void attention(Model m, Worker *worker, const Span *spans, Py_ssize_t n_spans, Py_ssize_t l) noexcept nogil:
    """xb (n, q_dim) for all rows: one task per span, KV head and at most ATTENTION_ROWS of its query heads."""
    cdef Py_ssize_t group = m.n_heads // m.n_kv_heads, heads = min(group, ATTENTION_ROWS)
    cdef Py_ssize_t parts = ceil_div(group, heads), task = stage(worker, n_spans * m.n_kv_heads * parts)
    # span after span of one head: what they all read of the cache stays near
    while take(worker, &task):
        attend(m, worker, &spans[task % n_spans], l, task // n_spans // parts, task // n_spans % parts, heads)


cdef void swiglu(
    Model m, Worker *worker, Py_ssize_t n, Py_ssize_t hidden_dim,
    const int32_t *places, Py_ssize_t first_place, float *trace_h, float *trace_hb,  # rows of the trace; NULL: in order
) noexcept nogil:
    """hb (n, hidden_dim), and xq, = silu(gate) * up (https://arxiv.org/abs/2002.05202)."""
    cdef Py_ssize_t step = ceil_div(TASK_COLUMNS, m.group_size) * m.group_size, parts = ceil_div(hidden_dim, step)
    cdef Py_ssize_t row, place, column, columns, task = stage(worker, n * parts)
    cdef const float *gate
    cdef float *hb
    cdef Int8Rows to
    while take(worker, &task):
        row, column = task // parts, task % parts * step
        columns = min(step, hidden_dim - column)
        gate, hb = m.s.h + 2 * row * hidden_dim + column, m.s.hb + row * hidden_dim + column
        kernels.swiglu(hb, gate, gate + hidden_dim, columns)
        if m.int8:
            to = int8_rows(m, row, hidden_dim)
            to.codes, to.scales, to.sums = to.codes + column, to.scales + column // m.group_size, to.sums + column // m.group_size
            kernels.quantize(&to, hb, columns, m.group_size)
        place = first_place + (places[row] if places != NULL else row)
        if trace_h != NULL:
            memcpy(trace_h + 2 * place * hidden_dim + column, gate, columns * sizeof(float))
            memcpy(trace_h + (2 * place + 1) * hidden_dim + column, gate + hidden_dim, columns * sizeof(float))
        if trace_hb != NULL:
            memcpy(trace_hb + place * hidden_dim + column, hb, columns * sizeof(float))


# ----------------------------------------------------------------------------
# Mixture of experts

cdef void route(Model m, Worker *worker, const float *router, Py_ssize_t n) noexcept nogil:
    """scores (n, n_experts) = xb router^T in float32, whatever the activations."""
    cdef Py_ssize_t row, first, parts = ceil_div(m.n_experts, 16), task = stage(worker, n * parts)
    while take(worker, &task):
        row, first = task // parts, task % parts * 16
        kernels.matvec(m.s.scores + row * m.n_experts + first, m.s.xb + row * m.dim,
                       router + first * m.dim, min(16, m.n_experts - first), m.dim)


cdef void choose_experts(Model m, const LayerTrace *t, Py_ssize_t row) noexcept nogil:
    """chosen, shares of a row from its scores: the largest by softmax over all, ties by lower id, in order of id."""
    cdef Py_ssize_t i, j, k = m.n_experts_per_token
    cdef float *scores = m.s.scores + row * m.n_experts
    cdef float *shares = m.s.shares + row * k
    cdef int32_t *chosen = m.s.chosen + row * k
    cdef int32_t expert
    cdef float total, not_finite = 0, sum_chosen = 0
    record(t.router, m.t.row + row, scores, 1, m.n_experts)
    if kernels.top_k(chosen, scores, m.n_experts, k):
        for i in range(k):  # NaN: any experts will do, the shares are NaN too and so are the logits
            chosen[i] = i
    for i in range(m.n_experts):
        not_finite = not_finite + scores[i] * 0  # 0; NaN also for an infinite score, of which softmax could make a 0
    for i in range(1, k):
        expert, j = chosen[i], i
        while j > 0 and chosen[j - 1] > expert:
            chosen[j] = chosen[j - 1]
            j = j - 1
        chosen[j] = expert
    total = kernels.exponentials(scores, scores, m.n_experts, 1.0) + not_finite
    for i in range(k):
        shares[i] = scores[chosen[i]] / total
        sum_chosen = sum_chosen + shares[i]
    if m.norm_topk_prob:
        for i in range(k):
            shares[i] = shares[i] / sum_chosen
    if t.shares != NULL:
        for i in range(k):
            t.shares[(m.t.row + row) * m.n_experts + chosen[i]] = shares[i]


cdef void choose(Model m, Worker *worker, const LayerTrace *t, Py_ssize_t n) noexcept nogil:
    """chosen, shares of all rows."""
    cdef Py_ssize_t task = stage(worker, n)
    while take(worker, &task):
        choose_experts(m, t, task)


cdef void group_rows(Model m, Py_ssize_t n) noexcept nogil:
    """slots, choices and groups from the choices of n rows."""
    cdef Py_ssize_t i, expert, start = 0, n_groups = 0, k = m.n_experts_per_token
    cdef Group *groups = m.s.groups
    memset(groups, 0, m.n_experts * sizeof(Group))
    for i in range(n * k):
        groups[m.s.chosen[i]].n_rows += 1
    for expert in range(m.n_experts):
        groups[expert].row = start
        start += groups[expert].n_rows
    for i in range(n * k):
        expert = m.s.chosen[i]
        m.s.slots[i] = groups[expert].row
        m.s.choices[groups[expert].row] = i
        groups[expert].row += 1
    for expert in range(m.n_experts):
        if groups[expert].n_rows:
            groups[n_groups] = Group(groups[expert].row - groups[expert].n_rows, groups[expert].n_rows, expert)
            n_groups += 1
    m.s.n_groups = n_groups


cdef void group_by_expert(Model m, Worker *worker, Py_ssize_t n) noexcept nogil:
    """Every choice of n rows gets its slot, where the rows of one expert lie together."""
    cdef Py_ssize_t task = stage(worker, 1)
    while take(worker, &task):
        group_rows(m, n)


cdef void gather(Model m, Worker *worker, Py_ssize_t n_slots) noexcept nogil:
    """xs (slots, dim), and xq, = xb of each slot's row."""
    cdef Py_ssize_t row, slot, task = stage(worker, ceil_div(n_slots, TASK_ROWS))
    while take(worker, &task):
        for slot in range(task * TASK_ROWS, min(n_slots, (task + 1) * TASK_ROWS)):
            row = m.s.choices[slot] // m.n_experts_per_token
            memcpy(m.s.xs + slot * m.dim, m.s.xb + row * m.dim, m.dim * sizeof(float))
            if m.int8:
                quantize_row(m, m.s.xs, slot, m.dim)


cdef void combine(Model m, Worker *worker, const LayerTrace *t, Py_ssize_t n) noexcept nogil:
    """y (n, dim) = sum of share * what the expert made of the row, by ascending expert."""
    cdef Py_ssize_t i, k = m.n_experts_per_token, row = stage(worker, n)
    cdef float *y
    while take(worker, &row):
        y = m.s.y + row * m.dim
        memset(y, 0, m.dim * sizeof(float))
        for i in range(row * k, (row + 1) * k):
            kernels.add_scaled(y, m.s.xs + m.s.slots[i] * m.dim, m.dim, m.s.shares[i])
            record(t.expert_down, m.t.row * k + i, m.s.xs + m.s.slots[i] * m.dim, 1, m.dim)


cdef void mixture(Model m, Worker *worker, const Layer *layer, const LayerTrace *t, Py_ssize_t n) noexcept nogil:
    """y (n, dim) = sum over each row's experts of share * down(silu(gate(xb)) * up(xb)), grouped by expert."""
    cdef Py_ssize_t n_slots = n * m.n_experts_per_token, max_groups = min(n_slots, m.n_experts)
    route(m, worker, layer.router, n)
    choose(m, worker, t, n)
    group_by_expert(m, worker, n)
    gather(m, worker, n_slots)
    matmul_groups(m, worker, m.s.h, m.s.xs, m.s.groups, &m.s.n_groups, max_groups, layer.gate_up)
    swiglu(m, worker, n_slots, m.expert_hidden_dim,
           m.s.choices, m.t.row * m.n_experts_per_token, t.expert_gate_up, t.expert_hidden)
    matmul_groups(m, worker, m.s.xs, m.s.hb, m.s.groups, &m.s.n_groups, max_groups, layer.down)
    combine(m, worker, t, n)


cdef void feed_forward(Model m, Worker *worker, const Layer *layer, const LayerTrace *t, Py_ssize_t n) noexcept nogil:
    """y (n, dim) = down(silu(gate(xb)) * up(xb))."""
    matmul(m, worker, m.s.h, m.s.xb, n, layer.gate_up)
    swiglu(m, worker, n, m.hidden_dim, NULL, m.t.row, t.gate_up, t.hidden)
    matmul(m, worker, m.s.y, m.s.hb, n, layer.down)


# ----------------------------------------------------------------------------
# The forward pass

cdef size_t forward(
    Model m,
    size_t thread,
    const int32_t *tokens,  # (n,)
    Py_ssize_t n,
    const Span *spans,  # (n_spans,), they cover the n rows in order
    Py_ssize_t n_spans,
    const Py_ssize_t *wanted,  # (n_wanted,) rows whose logits are asked for, ascending
    Py_ssize_t n_wanted,
    bint hidden,  # stop before the product with the vocabulary
    float *out,  # (n_wanted, vocab_size) logits, or (n_wanted, dim) if hidden
) noexcept nogil:
    """One pass, as one of its threads; returns how many stages it has."""
    cdef RunState *s = &m.s
    cdef Worker self = team_worker(&m.team, thread)
    cdef Worker *w = &self
    cdef Layer *layer
    cdef LayerTrace *t
    cdef Py_ssize_t l

    # the residual stream starts as the embedding of the tokens; positions become angles once for all layers
    embed(m, w, tokens, spans, n_spans)

    for l in range(m.n_layers):
        layer, t = &m.w.layers[l], &m.t.layers[l]
        if thread == 0 and n > 16 and interrupted():
            team_stop(&m.team)

        # q, k, v of the normalised rows in one product
        rmsnorm(m, w, s.x, NULL, n, layer.attention_norm, t.attention_norm)
        matmul(m, w, s.qkv, s.xb, n, &layer.qkv)

        # add the biases, norm q and k per head, rotate them by position, put k and v into the cache
        rotate_and_store(m, w, spans, n_spans, l)

        # attention over all positions up to each row's own
        attention(m, w, spans, n_spans, l)

        # x += attention output
        quantize(m, w, n, t.heads)
        matmul(m, w, s.y, s.xb, n, &layer.o)
        add(m, w, n, t.o, NULL)

        # x += down(silu(gate(x)) * up(x)) of the normalised rows, by one block or by the experts of each row
        rmsnorm(m, w, s.x, NULL, n, layer.ffn_norm, t.ffn_norm)
        if layer.router:
            mixture(m, w, layer, t, n)
        else:
            feed_forward(m, w, layer, t, n)
        add(m, w, n, t.experts if layer.router else t.down, t.x)

    # the wanted rows only: final norm, then the product with the vocabulary
    rmsnorm(m, w, s.x, wanted, n_wanted, m.w.final_norm, m.t.final_norm)
    if not hidden:
        matmul(m, w, out, s.xb, n_wanted, &m.w.lm_head)
    elif n_wanted and thread == 0:
        memcpy(out, s.xb, n_wanted * m.dim * sizeof(float))
    return self.stages


cdef void read_out(Model m, size_t thread, const float *x, Py_ssize_t n, float *out) noexcept nogil:
    """out (n, vocab_size) = logits of the residual stream x (n, dim): the end of `forward` alone."""
    cdef Worker worker = team_worker(&m.team, thread)
    rmsnorm(m, &worker, x, NULL, n, m.w.final_norm, NULL)
    matmul(m, &worker, out, m.s.xb, n, &m.w.lm_head)


# ----------------------------------------------------------------------------
# Helpers of the Python edge

cdef float *_floats(Py_ssize_t n) except NULL:
    """n floats, 64-byte aligned."""
    cdef void *p = NULL
    if posix_memalign(&p, 64, max(n, 1) * sizeof(float)):
        raise MemoryError(f"no memory for a buffer of {n * sizeof(float):,} bytes")
    return <float *>p


cdef int _team(int wanted) noexcept:
    """How many threads a pass can have if `wanted` are asked for."""
    cdef int i, size = 1
    wanted = 1 if forked else startable_team(wanted)
    for i in prange(wanted, nogil=True, schedule="static", num_threads=wanted, use_threads_if=wanted > 1):
        if i == 0:
            store_team_size(&size)
    return size


cdef void store_team_size(int *size) noexcept nogil:
    size[0] = team_size()


def _matches(str name, names):
    """Whether `name` is one of `names`: a pattern, or several."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in ([names] if isinstance(names, str) else names))


cdef float *_traced(dict arrays, names, str prefix, dict parts, tuple shape) except? NULL:
    """A new array of `shape` if one of its parts {name: columns} matches; the parts that do go into `arrays`."""
    wanted = [part for part in parts if _matches(prefix + part, names)]
    if not wanted:
        return NULL
    array = np.zeros(shape, dtype=np.float32)
    start = 0
    for part, columns in parts.items():
        if part in wanted:
            arrays[prefix + part] = array[..., start : start + columns]
        start += columns
    return <float *><uintptr_t>array.ctypes.data


def _integer(str name, value):
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, not an integer") from None


def _token_ids(ids, Py_ssize_t vocab_size):
    """ids as int32 (n,), n >= 1, every one a row of the embedding."""
    array = np.asarray(ids)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise ValueError(f"ids must be a non-empty one-dimensional sequence of integers, got shape {array.shape}, {array.dtype}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token id {low if low < 0 else high} is outside 0..{vocab_size - 1}")
    return np.ascontiguousarray(array, dtype=np.int32)
