# cython: language_level=3, cdivision=True
"""The engine: tokens in, logits out.

A forward pass (forward.pyx) takes rows (token, position, sequence) of any number of sessions: a prompt is
many rows of one session, decoding is one row, a batch is both mixed. This module has what surrounds the pass:
sessions with their KV cache, the mapped file and its weights, and the Python surface, which checks every
argument.
"""

import fnmatch
import operator
import threading
from collections import defaultdict
from typing import Literal

import numpy as np

from ..format import KV_TYPES, Encoding, ModelFile, Role
from ..memory import available, in_huge_pages
from ..system.machine import default_threads
from .probes import ARRAYS, places

Logits = Literal["last", "all", "hidden"]
Activations = Literal["int8", "float32"]
KV = Literal["int8", "f16", "f32"]

cimport cython
from cython.parallel cimport prange
from libc.stdint cimport int32_t, uint8_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from .forward cimport (
    N_ARRAYS, Network, Layer, Matrix, Pass, RunState, Span, Weights,
    ceil_div, forward, lay_out, raise_pending, read_out, team_begin, team_reserve, team_stop,
)
from ..kernels.table cimport (
    ATTENTION_ROWS, ENCODING_INT4, ENCODING_INT6, ENCODING_INT8, KV_BLOCK, KV_F16, KV_F32, KV_I8, forked, kernels, key_bytes, value_bytes,
)


cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **p, size_t alignment, size_t size)


cdef extern from "kernels/openmp.h" nogil:
    int team_size()
    int startable_team(int wanted)


# Rows that one pass through the layers takes; a longer prompt goes in several passes. Many enough that
# reading a weight is paid for by using it often, few enough that the buffers stay tens of megabytes.
cdef Py_ssize_t MAX_ROWS = 256

# A pass of fewer multiply-adds is done by one thread: waking a second one costs more than it saves.
cdef Py_ssize_t SERIAL_WORK = 8_000_000

# ----------------------------------------------------------------------------
# KV cache: blocks of KV_BLOCK positions at absolute places, all layers in one block

@cython.final
cdef class KVBlock:
    """Keys and values of KV_BLOCK positions: (n_layers, n_kv_heads, keys | values), zero where unwritten.

    calloc leaves large memory to the operating system untouched, so a page costs nothing until it is written.
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


@cython.no_gc_clear  # __dealloc__ needs the model
cdef class Session:
    """One sequence: its position and its KV cache. Made by Model.session().

    Sessions of one model are independent; a batch (Model.forward) takes any number of them forward at once.
    """

    cdef Engine _model
    cdef Py_ssize_t _position, _context
    cdef list blocks
    cdef char **pointers  # data of each block, for nogil code

    def __cinit__(self, model=None, context=None):
        if not isinstance(model, Engine):
            raise TypeError("a Session is made by Model.session()")
        limit = model.config.context
        self._context = limit if context is None else _integer("context", context)
        if not 1 <= self._context <= limit:
            raise ValueError(f"context = {self._context} is outside 1..{limit}, the context of the model")
        self.pointers = <char **>calloc(ceil_div(self._context, KV_BLOCK), sizeof(char *))
        if self.pointers == NULL:
            raise MemoryError(f"no memory for a session of context {self._context}")
        self.blocks = []
        self._model = model

    def __dealloc__(self):
        cdef KVBlock block
        if self.blocks is not None:
            for block in self.blocks:
                self._release(block)
        free(self.pointers)

    def __repr__(self):
        filled = f"{self._position} of {self._context} positions"
        return f"<Session, {filled}, {self.kv_bytes:,} bytes of KV cache>"

    def __reduce__(self):
        raise TypeError("a Session cannot be pickled or copied: its KV cache lives in this process; "
                        "fork() makes a second one")

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
        return len(self.blocks) * self._model.m.block_bytes

    def growth(self, n):
        """Bytes of KV cache that forward() of n more ids will allocate: new blocks, and copies of shared ones."""
        cdef Py_ssize_t i, blocks = 0, count = _integer("n", n)
        for i in range(self._position // KV_BLOCK, ceil_div(self._position + count, KV_BLOCK)):
            blocks += i >= len(self.blocks) or (<KVBlock>self.blocks[i]).owners > 1
        return blocks * self._model.m.block_bytes

    def forward(self, ids, logits="last"):
        """Append token ids; return (vocab_size,) logits of the last one, or (len(ids), vocab_size) of all.

        logits: "last", "all", or "hidden": instead of logits the hidden state (dim,) of the last id after the
        final norm, which the product with the vocabulary would turn into logits.
        ValueError, with both numbers and the session unchanged, if ids is empty, an id is outside the
        vocabulary or the positions would pass the context. KeyboardInterrupt leaves the session as it was.
        """
        return self._model.forward([(self, ids)], logits)[0]

    def rewind(self, position):
        """Forget everything from `position` on and free the cache blocks behind it."""
        cdef Py_ssize_t target = _integer("position", position)
        with self._model.lock:
            if not 0 <= target <= self._position:
                raise ValueError(f"cannot rewind to {target}: the session is at position {self._position}")
            self._position = target
            self._drop_blocks(ceil_div(target, KV_BLOCK))

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
            self._release(block)

    cdef _release(self, KVBlock block):
        """This session no longer holds `block`, whose memory goes with its last owner."""
        block.owners -= 1
        if block.owners == 0:
            self._model._kv_bytes -= block.size

    cdef KVBlock _own(self, KVBlock block):
        """`block`, just made for this session, counted."""
        self._model._kv_bytes += block.size
        return block

    cdef _make_room(self, Py_ssize_t n):
        """Make blocks for n more positions; a shared block that will be written is copied."""
        cdef Py_ssize_t i
        cdef KVBlock block
        for i in range(self._position // KV_BLOCK, ceil_div(self._position + n, KV_BLOCK)):
            if i == len(self.blocks):
                self.blocks.append(self._own(KVBlock(self._model.m.block_bytes)))
            elif (<KVBlock>self.blocks[i]).owners > 1:
                block = self._own((<KVBlock>self.blocks[i]).copy())
                self._release(self.blocks[i])
                self.blocks[i] = block
            self.pointers[i] = (<KVBlock>self.blocks[i]).data


# ----------------------------------------------------------------------------
# Engine: a mapped file, its network and its buffers

cdef class Engine:
    """A mapped model.bin and the buffers of its forward pass; threads may share it (calls take turns).

    path: the file. threads: None for as many as this machine can feed. kv: "f16", "f32" or "int8", the KV
    cache. activations: "int8", or "float32" to compare with other implementations. huge_pages: copy the
    weights into memory of large pages (memory.in_huge_pages says what that costs and gains).
    ModelFileError, one line, if the file is not a model.bin that this version can run.
    """

    cdef object _file
    cdef str _path, _kv, _activations
    cdef bint _closed
    cdef Py_ssize_t _kv_bytes  # of all blocks that sessions hold, each counted once
    cdef object lock
    cdef Network m

    def __cinit__(self, *arguments, **options):
        if not arguments and "path" not in options:
            name = type(self).__name__
            raise TypeError(f"{name}() needs the path of a model.bin: {name}(path)")

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
        self.m.kv_type = {"int8": KV_I8, "f16": KV_F16, "f32": KV_F32}[kv]
        self.m.int8 = activations == "int8"
        set_numbers(&self.m, self._file.config)
        self._map_weights()
        self.m.threads = _team(wanted)
        self.m.trace.arrays = <float **>calloc(self.m.n_layers * N_ARRAYS, sizeof(float *))
        if self.m.trace.arrays == NULL:
            raise MemoryError(f"no memory for {self.m.n_layers} layers")
        self._reserve_stages()
        self._reserve(1)
        self.lock = threading.Lock()  # last: without a lock a model counts as never opened

    def __dealloc__(self):
        cdef Py_ssize_t l
        for l in range(self.m.n_layers if self.m.weights.layers else 0):
            free(self.m.weights.layers[l].qkv)
            free(self.m.weights.layers[l].gate_up)
            free(self.m.weights.layers[l].down)
        free(self.m.weights.layers)
        free(self.m.trace.arrays)
        free(self.m.team.counters)
        self._free_buffers()

    def __reduce__(self):
        raise TypeError("an Engine cannot be pickled or copied: open its path again; "
                        "a qwen3c.Model does that by itself")

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
        return self._file.config

    @property
    def metadata(self):
        """What else the file says of the model, such as metadata["name"]."""
        return self._file.metadata

    @property
    def threads(self):
        """How many threads a pass has: as many as were asked for, if the system could start them."""
        return self.m.threads

    @property
    def kv(self):
        """The type of the KV cache: "f16", "f32" or "int8"."""
        return self._kv

    @property
    def kv_bytes(self):
        """Bytes of KV cache that the sessions of this model hold; a block that several share counts once."""
        return self._kv_bytes

    def kv_bytes_of(self, sessions):
        """Bytes of KV cache that some sessions of this model hold; a block that several share counts once."""
        cdef Session session
        cdef set blocks = set()
        for session in sessions:
            blocks.update(session.blocks)
        return len(blocks) * self.m.block_bytes

    @property
    def kv_block_bytes(self):
        """Bytes of the smallest piece of KV cache, a block of 256 positions."""
        return self.m.block_bytes

    @property
    def activations(self):
        """The type of the activations that are multiplied by the weights: "int8" or "float32"."""
        return self._activations

    @property
    def closed(self):
        """Whether close() was called."""
        return self._closed

    def close(self):
        """Release the weights and the buffers; a call under way in another thread ends first.

        From then on every call that needs them, of the model or its sessions, raises ValueError. The KV cache
        of a session is freed with the session.
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

    # ---- the forward pass

    def session(self, context=None):
        """An empty sequence of at most `context` positions (default: the model's). Memory grows with use."""
        self._check_open()
        return Session(self, context)

    def forward(self, batch, logits="last"):
        """One ragged batch over any sessions of this model; a list of what Session.forward returns, in order.

        batch: pairs of a session and the token ids to append to it, each session once. Prompts and single
        tokens may be mixed: the results of a session do not depend on the others by a single bit.
        logits: besides those words, a list of how many rows are wanted of each session, 1 to len(ids): the
        logits of so many of its last ids, (n, vocab_size).
        """
        self._check_open()
        batch = [(session, _token_ids(ids, self.m.vocab_size)) for session, ids in batch]
        if not batch:
            raise ValueError("the batch is empty")
        counts = _wanted_rows(logits, batch)
        kind = logits if isinstance(logits, str) else "all"
        with self.lock:
            self._check_batch(batch)
            outputs = self._forward_batch(batch, counts, kind == "hidden")
        return outputs if kind == "all" else [output[0] for output in outputs]

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
                raise ValueError(f"{len(ids)} more ids from position {session.position} pass the context of "
                                 f"{session.context}")

    cdef _forward_batch(self, list batch, list counts, bint hidden):
        """Cut the rows of the batch into passes of at most MAX_ROWS; collect the logits or hidden states.

        counts: of how many of its last rows each session wants them. A list of their (count, width).
        """
        cdef Py_ssize_t n_total = sum([len(ids) for _, ids in batch])
        cdef Py_ssize_t start, n, i, begin, first, last, out_row = 0
        cdef Session session
        for session, ids in batch:
            session._make_room(len(ids))
        self._reserve(min(n_total, MAX_ROWS))
        tokens = np.concatenate([ids for _, ids in batch])
        ends = np.cumsum([len(ids) for _, ids in batch])
        # rows whose logits are returned, ascending
        wanted = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts)])
        out = np.empty((len(wanted), self.m.dim if hidden else self.m.vocab_size), dtype=np.float32)
        for start in range(0, n_total, MAX_ROWS):
            n = min(MAX_ROWS, n_total - start)
            self.m.trace.row = start
            segments = []
            for i, (session, ids) in enumerate(batch):
                begin = ends[i] - len(ids)  # row of its first id
                first, last = max(start, begin), min(start + n, ends[i])
                if first < last:
                    segments.append((session, first - start, last - first, session._position + first - begin))
            rows = wanted[(wanted >= start) & (wanted < start + n)] - start
            results = out[out_row : out_row + len(rows)]
            self._forward_rows(tokens[start : start + n], segments, rows, hidden, results)
            out_row += len(rows)
        for session, ids in batch:
            session._position += len(ids)
        return np.split(out, np.cumsum(counts)[:-1])

    cdef _forward_rows(self, const int32_t[::1] tokens, list segments, rows, bint hidden, float[:, ::1] out):
        """One pass: hand plain arrays to `forward` and let go of the GIL."""
        cdef Py_ssize_t[::1] wanted = rows.astype(np.intp)
        cdef Py_ssize_t n = tokens.shape[0], n_wanted = wanted.shape[0], n_spans = 0, row
        cdef Py_ssize_t tokens_per_span = max(1, ATTENTION_ROWS // (self.m.n_heads // self.m.n_kv_heads))
        cdef int i, threads = self._begin_pass(n)
        cdef bint parallel = threads > 1
        cdef Network *m = &self.m
        cdef Session session
        cdef Pass p
        cdef Span *spans = <Span *>malloc(n * sizeof(Span))
        if spans == NULL:
            raise MemoryError(f"no memory for a batch of {n} rows")
        try:
            for session, first, n_rows, position in segments:
                for row in range(0, n_rows, tokens_per_span):
                    spans[n_spans] = Span(first + row, min(tokens_per_span, n_rows - row), position + row,
                                          session.pointers)
                    n_spans += 1
            p.tokens, p.n, p.spans, p.n_spans = &tokens[0], n, spans, n_spans
            p.wanted, p.n_wanted, p.hidden = &wanted[0] if n_wanted else NULL, n_wanted, hidden
            p.out = &out[0, 0] if n_wanted else NULL
            for i in prange(
                threads, nogil=True, schedule="static", num_threads=threads, use_threads_if=parallel
            ):
                forward(m, i, &p)
        finally:
            free(spans)
        if self.m.team.stopped:
            raise_pending()

    cdef int _begin_pass(self, Py_ssize_t n):
        """Make the team ready for a pass of n rows; returns its number of threads."""
        cdef bint alone = forked or n * self.m.row_work < SERIAL_WORK
        cdef int threads = 1 if alone else startable_team(self.m.threads)
        team_begin(&self.m.team, threads)
        return threads

    cdef _reserve_stages(self):
        """Room in the team for the stages of a pass."""
        cdef size_t stages = self._count_stages()
        if stages > self.m.team.capacity and team_reserve(&self.m.team, self.m.threads, stages):
            raise MemoryError(f"no memory for {self.m.threads} threads")

    cdef size_t _count_stages(self) noexcept:
        """Dry run: a stopped team hands out no task, so forward() only walks through its stages.

        It returns how many there are.
        """
        cdef Pass nothing
        memset(&nothing, 0, sizeof(Pass))
        team_stop(&self.m.team)
        return forward(&self.m, 0, &nothing)

    cdef _reserve(self, Py_ssize_t n):
        """Buffers for passes of n rows; they only ever grow."""
        cdef Py_ssize_t rows = 1
        cdef void *memory = NULL
        cdef size_t size
        if n <= self.m.s.capacity:
            return
        while rows < n:
            rows *= 2
        self._free_buffers()
        size = lay_out(&self.m, rows, NULL)
        self.m.s.capacity = 0
        if posix_memalign(&memory, 64, size):
            raise MemoryError(f"no memory for the buffers of {rows} rows, {size:,} bytes")
        lay_out(&self.m, rows, <char *>memory)

    cdef _free_buffers(self):
        free(self.m.s.memory)
        memset(&self.m.s, 0, sizeof(RunState))

    # ---- weights

    cdef _map_weights(self):
        """Pointers to every tensor, found by its role and layer."""
        cdef Weights *weights = &self.m.weights
        cdef Layer *layer
        tensors = defaultdict(list)
        for tensor in self._file.tensors:
            tensors[tensor.role, tensor.layer].append(tensor)
        weights.layers = <Layer *>calloc(self.m.n_layers, sizeof(Layer))
        if weights.layers == NULL:
            raise MemoryError(f"no memory for {self.m.n_layers} layers")
        weights.rope_frequencies = self._vector(tensors[Role.ROPE_FREQUENCIES, None])
        weights.final_norm = self._vector(tensors[Role.FINAL_NORM, None])
        weights.lm_head = self._matrix(tensors[Role.LM_HEAD, None][0])
        embedding = tensors[Role.EMBEDDING, None]
        weights.embedding = self._matrix(embedding[0]) if embedding else weights.lm_head
        for l in range(self.m.n_layers):
            layer = &weights.layers[l]
            layer.attention_norm = self._vector(tensors[Role.ATTENTION_NORM, l])
            layer.qkv, layer.n_qkv = self._matrices(tensors[Role.QKV, l]), len(tensors[Role.QKV, l])
            layer.qkv_bias = self._vector(tensors[Role.QKV_BIAS, l])
            layer.q_norm = self._vector(tensors[Role.Q_NORM, l])
            layer.k_norm = self._vector(tensors[Role.K_NORM, l])
            layer.o = self._matrix(tensors[Role.O, l][0])
            layer.ffn_norm = self._vector(tensors[Role.FFN_NORM, l])
            layer.router = self._vector(tensors[Role.ROUTER, l])
            layer.gate_up = self._matrices(tensors[Role.GATE_UP, l])
            layer.down = self._matrices(tensors[Role.DOWN, l])

    cdef const uint8_t *_data(self, tensor) except NULL:
        # self._file keeps the map, and so this address, alive as long as the model is open
        return <const uint8_t *><uintptr_t>np.frombuffer(self._file.data(tensor), dtype=np.uint8).ctypes.data

    cdef const float *_vector(self, list tensors) except? NULL:
        """The float32 data of the one tensor in `tensors`; NULL if the list is empty: the model has none."""
        return <const float *>self._data(tensors[0]) if tensors else NULL

    cdef Matrix _matrix(self, tensor) except *:
        cdef Matrix matrix
        matrix.tiles = self._data(tensor)
        matrix.rows, matrix.columns = tensor.shape
        matrix.encoding = _ENCODINGS[tensor.encoding]
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
            for tensor in self._file.tensors:
                for part in tensor.parts:
                    if part.name == name:
                        return self._rows_of(tensor, part.row, part.rows)
        raise KeyError(name)

    cdef _rows_of(self, tensor, Py_ssize_t first, Py_ssize_t n):
        """Rows first..first + n - 1 of a tensor as float32 (n, columns)."""
        cdef Matrix w
        cdef float[:, ::1] view
        cdef Py_ssize_t r
        if tensor.encoding is Encoding.FLOAT32:
            stored = np.frombuffer(self._file.data(tensor), dtype="<f4").reshape(tensor.shape)
            return stored[first : first + n].copy()
        w = self._matrix(tensor)
        result = np.empty((n, w.columns), dtype=np.float32)
        view = result
        for r in range(n):
            kernels.dequantize_row[<int>w.encoding](
                &view[r, 0], w.tiles, first + r, w.columns, self.m.group_size)
        return result

    # ---- trace

    def trace(self, ids, names="*"):
        """The activations of a forward pass of `ids` (n), by name, in the order of the pass; float32 copies.

        A name is that of a module in transformers, and the array is what the module returns, (n, width):
        model.embed_tokens, model.layers.0.self_attn.q_proj, ..., model.norm, lm_head. Heads keep their axis:
        q_norm and k_norm are (n, heads, head_dim). model.layers.0 is the residual stream after the layer.
        Some are not modules: self_attn.attn_weights, the attention probabilities, (n_heads, n, n), zero where
        a row does not see; self_attn.o_proj.input, (n, q_dim); mlp.down_proj.input, (n, hidden_dim); and
        beside the router's logits mlp.gate, mlp.gate.shares, (n, n_experts): the shares of the chosen
        experts, zero for the others. probes.py lists them all.
        names: a pattern such as "model.layers.*.attn_weights", or several, to keep less.
        ValueError if no activation matches `names`, ids are not as Session.forward takes them, or the arrays
        need more memory than is available.
        """
        self._check_open()
        ids = _token_ids(ids, self.m.vocab_size)
        batch = [(self.session(), ids)]
        every = _matches("model.norm", names) or _matches("lm_head", names)
        with self.lock:
            self._check_batch(batch)
            try:
                arrays = self._begin_trace(names, len(ids))
                logits = self._forward_batch(batch, [len(ids) if every else 1], False)[0]
            finally:
                self.m.trace.on = False
                memset(self.m.trace.arrays, 0, self.m.n_layers * N_ARRAYS * sizeof(float *))
        if _matches("lm_head", names):
            arrays["lm_head"] = logits
        if not arrays:
            raise ValueError(f"no activation of this model is called {names!r}")
        return arrays

    cdef dict _begin_trace(self, names, Py_ssize_t n):
        """Allocate arrays for the activations of n rows that match `names`; `probe` gets pointers to them.

        Returns {name: array}, in the order of the pass.
        """
        config = self._file.config
        wanted = {name for name, _, _ in places(config) if _matches(name, names)}
        widths, found, arrays = defaultdict(list), {}, {}
        for name, layer, part in places(config):
            widths[layer, part.array].append((name, part.shape_of(config, n)))
        chosen = {key: parts for key, parts in widths.items() if any([name in wanted for name, _ in parts])}
        needed = sum([4 * int(np.prod(shape)) for parts in chosen.values() for _, shape in parts])
        free_bytes = available()
        if free_bytes is not None and needed > free_bytes:
            raise ValueError(f"the trace of {n} tokens takes {needed:,} bytes, {free_bytes:,} are available; "
                             "ask for fewer tokens or names")
        for (layer, array), parts in chosen.items():  # parts are columns of one array
            whole = np.zeros((*parts[0][1][:-1], sum([shape[-1] for _, shape in parts])), dtype=np.float32)
            self.m.trace.arrays[<Py_ssize_t>layer * N_ARRAYS + <Py_ssize_t>ARRAYS.index(array)] = (
                <float *><uintptr_t>whole.ctypes.data)
            start = 0
            for name, shape in parts:
                found[name] = whole[..., start : start + shape[-1]]
                start += shape[-1]
        for name, _, _ in places(config):
            if name in wanted:
                arrays[name] = found[name]
        self.m.trace.n, self.m.trace.on = n, True
        self._reserve_stages()
        return arrays

    def logit_lens(self, x):
        """Logits (n, vocab_size) of rows (n, dim) of the residual stream, as if no layer came after them."""
        self._check_open()
        cdef float[:, ::1] rows = np.ascontiguousarray(x, dtype=np.float32)
        if rows.shape[0] == 0 or rows.shape[1] != self.m.dim:
            shape = (rows.shape[0], rows.shape[1])
            raise ValueError(f"x must have shape (n, {self.m.dim}), n >= 1, got {shape}")
        logits = np.empty((rows.shape[0], self.m.vocab_size), dtype=np.float32)
        cdef float[:, ::1] out = logits
        cdef Network *m = &self.m
        cdef Py_ssize_t start, n
        cdef int i, threads
        cdef bint parallel
        with self.lock:
            self._check_open()
            self._reserve(min(rows.shape[0], MAX_ROWS))
            for start in range(0, rows.shape[0], MAX_ROWS):
                n = min(MAX_ROWS, rows.shape[0] - start)
                threads = self._begin_pass(n)
                parallel = threads > 1
                for i in prange(
                    threads, nogil=True, schedule="static", num_threads=threads, use_threads_if=parallel
                ):
                    read_out(m, i, &rows[start, 0], n, &out[start, 0])
        return logits


# ----------------------------------------------------------------------------
# The numbers of a network

cdef void set_numbers(Network *m, c):
    """Set the numbers of `m` from a format.Config; m.kv_type must be set before."""
    m.n_layers, m.n_heads, m.n_kv_heads, m.head_dim = c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim
    m.dim, m.hidden_dim, m.q_dim, m.kv_dim = c.dim, c.hidden_dim, c.q_dim, c.kv_dim
    m.vocab_size, m.group_size = c.vocab_size, c.group_size
    m.n_experts, m.n_experts_per_token = c.n_experts, c.n_experts_per_token
    m.expert_hidden_dim, m.norm_topk_prob = c.expert_hidden_dim, c.norm_topk_prob
    m.eps, m.rope_scale = c.rms_eps, c.rope_attention_scale
    m.head_bytes = key_bytes(m.kv_type, m.head_dim) + value_bytes(m.kv_type, m.head_dim)
    m.block_bytes = m.n_layers * m.n_kv_heads * m.head_bytes
    hidden = max(m.hidden_dim, m.n_experts_per_token * m.expert_hidden_dim)
    m.row_work = m.dim * (m.n_layers * (2 * m.q_dim + 2 * m.kv_dim + 3 * hidden) + m.vocab_size)


def run_state_bytes(config, Py_ssize_t rows=MAX_ROWS, int threads=1):
    """Bytes of the buffers for passes of `rows` rows; memory.run_state_bytes has a formula for them."""
    cdef Network m
    memset(&m, 0, sizeof(Network))
    m.threads = threads
    set_numbers(&m, config)
    return lay_out(&m, rows, NULL)


# ----------------------------------------------------------------------------
# Helpers of the Python edge

_ENCODINGS = {Encoding.INT8: ENCODING_INT8, Encoding.INT4: ENCODING_INT4, Encoding.INT6: ENCODING_INT6}


cdef int _team(int wanted) noexcept:
    """How many threads, at most `wanted`, a pass can have, found by running a team of that size."""
    cdef int i, size = 1
    wanted = 1 if forked else startable_team(wanted)
    for i in prange(wanted, nogil=True, schedule="static", num_threads=wanted, use_threads_if=wanted > 1):
        if i == 0:
            store_team_size(&size)
    return size


cdef void store_team_size(int *size) noexcept nogil:
    size[0] = team_size()


def _matches(str name, names):
    """Whether `name` matches `names`: one pattern or a list of patterns."""
    patterns = [names] if isinstance(names, str) else names
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _integer(str name, value):
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, not an integer") from None


def _wanted_rows(logits, list batch):
    """How many rows of each session of a batch Engine.forward returns. ValueError for a bad `logits`."""
    if isinstance(logits, str):
        if logits not in ("last", "all", "hidden"):
            raise ValueError(f"logits is {logits!r}, not 'last', 'all' or 'hidden'")
        return [len(ids) if logits == "all" else 1 for _, ids in batch]
    if not isinstance(logits, (list, tuple)):
        raise ValueError(f"logits is {logits!r}, not 'last', 'all', 'hidden' or a list of numbers of rows")
    counts = [_integer("logits", count) for count in logits]
    if len(counts) != len(batch):
        raise ValueError(f"logits are {len(counts)} numbers of rows, for {len(batch)} sessions")
    for count, (_, ids) in zip(counts, batch):
        if not 1 <= count <= len(ids):
            raise ValueError(f"logits = {count} rows of a session that is given {len(ids)} ids")
    return counts


def _token_ids(ids, Py_ssize_t vocab_size):
    """ids as int32 (n,). ValueError unless n >= 1 and every id is in 0..vocab_size - 1."""
    array = np.asarray(ids)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise ValueError("ids must be a non-empty one-dimensional sequence of integers, "
                         f"got shape {array.shape}, {array.dtype}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token id {low if low < 0 else high} is outside 0..{vocab_size - 1}")
    return np.ascontiguousarray(array, dtype=np.int32)
