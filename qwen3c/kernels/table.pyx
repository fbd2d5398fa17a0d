# cython: language_level=3, cdivision=True
"""The kernels (kernels/) from Python: which instruction set they use, and those called outside of a pass.

All of it is part of `engine`, which the rest of the package imports.
"""

import math
import os
import time

import numpy as np

from .spinning import give_variable_back

from cython.parallel cimport prange
from libc.stdint cimport int32_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc


cdef extern from "kernels/openmp.h" nogil:
    int HAVE_OPENMP
    int startable_team(int wanted)


cdef extern from "kernels/kernels.h" nogil:
    const Kernels *all_kernels[]
    const Py_ssize_t n_kernels
    int kernels_runnable(const Kernels *)


# When the machine's limits are measured: bytes of memory, and rounds of dot products, that make a task.
cdef Py_ssize_t READ_BYTES = 256 * 1024
cdef size_t PEAK_ROUNDS = 1 << 15


# ----------------------------------------------------------------------------
# The instruction set: one table for the whole process

ISA_NAMES = tuple([all_kernels[i].name.decode() for i in range(n_kernels)])
OPENMP = bool(HAVE_OPENMP)


def runnable_isas():
    """The instruction sets this CPU can run, narrowest first."""
    return tuple([all_kernels[i].name.decode() for i in range(n_kernels) if kernels_runnable(all_kernels[i])])


def isa():
    """The instruction set in use: the widest this CPU runs, or QWEN3C_ISA."""
    return kernels.name.decode()


def set_isa(str name):
    """Switch the kernels of the whole process. ValueError if unknown or not runnable here."""
    global kernels
    if name not in runnable_isas():
        known = "this CPU cannot run it" if name in ISA_NAMES else "there is no such instruction set"
        raise ValueError(f"ISA {name!r}: {known} (runnable here: {', '.join(runnable_isas())})")
    kernels = all_kernels[ISA_NAMES.index(name)]


set_isa(runnable_isas()[-1])
give_variable_back()
if os.environ.get("QWEN3C_ISA"):
    try:
        set_isa(os.environ["QWEN3C_ISA"])
    except ValueError as error:
        raise ImportError(f"QWEN3C_ISA: {error}") from None


def _after_fork():
    global forked
    forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ----------------------------------------------------------------------------
# For the sampler: the same bits on every machine

def _logits(logits):
    array = np.ascontiguousarray(logits, dtype=np.float32)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"logits must have shape (n,), n >= 1, got {array.shape}")
    return array


def softmax(logits, double temperature=1.0):
    """softmax(logits / temperature), shape (n,), with the engine's own exp: the same bits everywhere."""
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature} is not positive")
    cdef const float[::1] x = _logits(logits)
    cdef float[::1] y = np.empty(x.shape[0], dtype=np.float32)
    cdef float total = kernels.exponentials(&y[0], &x[0], x.shape[0], <float>(1.0 / temperature))
    result = np.asarray(y)
    result /= total
    return result


def log_sum_exp(logits):
    """log(sum(exp(logits))); logits[i] - log_sum_exp(logits) is the log-probability of i, in nats."""
    cdef const float[::1] x = _logits(logits)
    cdef float[::1] y = np.empty(x.shape[0], dtype=np.float32)
    cdef float total = kernels.exponentials(&y[0], &x[0], x.shape[0], 1.0)
    return float(np.max(x)) + math.log(total)


def top_k(logits, Py_ssize_t k):
    """Ids of the k largest logits, largest first, ties by lower id. ValueError on NaN."""
    cdef const float[::1] x = _logits(logits)
    if not 1 <= k <= x.shape[0]:
        raise ValueError(f"k = {k} is outside 1..{x.shape[0]}")
    cdef int32_t[::1] ids = np.empty(k, dtype=np.int32)
    if kernels.top_k(&ids[0], &x[0], x.shape[0], k):
        raise ValueError("the logits hold a NaN: the model file is damaged or its weights overflow")
    return np.asarray(ids)


def all_finite(rows, Py_ssize_t n, int threads=1):
    """Whether the first n numbers of every row, each float32 (n or more,), are finite."""
    cdef const float[::1] row
    cdef Py_ssize_t i, n_rows = len(rows), broken = 0
    cdef const float **pointers = <const float **>malloc(max(n_rows, 1) * sizeof(float *))
    if pointers == NULL:
        raise MemoryError(f"no memory to look at {n_rows} rows")
    try:
        for i in range(n_rows):
            row = rows[i]
            if not 1 <= n <= row.shape[0]:
                raise ValueError(f"n = {n} is outside 1..{row.shape[0]}, the length of a row")
            pointers[i] = &row[0]
        threads = 1 if forked else startable_team(max(min(threads, n_rows), 1))
        for i in prange(
            n_rows, nogil=True, schedule="dynamic", num_threads=threads, use_threads_if=threads > 1
        ):
            broken += count_broken(pointers[i], n)
    finally:
        free(pointers)
    return broken == 0


cdef int32_t count_broken(const float *x, Py_ssize_t n) noexcept nogil:
    """How many of x (n) are not finite: those are what differs from itself by something else than 0."""
    cdef int32_t broken = 0
    cdef Py_ssize_t i
    for i in range(n):
        broken += x[i] - x[i] != 0
    return broken


# ----------------------------------------------------------------------------
# For the exporter

cdef struct TileRow:
    const void *rows[LANES]  # NULL past the end of the matrix


ENCODINGS = {"int8": ENCODING_INT8, "int4": ENCODING_INT4, "int6": ENCODING_INT6}


def quantize_tiles(parts, Py_ssize_t columns, Py_ssize_t group_size, out, str encoding="int8", importance=None):
    """Quantise tile rows, of 16 rows each, into `out`, the stored form of a matrix (docs/FORMAT.md).

    parts: (buffer of row-major bytes, "BF16" | "F16" | "F32") stacked by rows; rows past the end are zero.
    out: writable buffer of whole stored tile rows: as many as are made. encoding: "int8", "int4" or "int6".
    importance: (columns,) float32, the weight of each column's squared error; None for 1. INT8 ignores it.
    Returns (largest |w - stored|, sum (w - stored)^2, sum w^2, bad), where bad is the flat index
    row * columns + column of the first NaN, Inf or value too large for an fp16 scale, or -1.
    """
    cdef uintptr_t address
    cdef Py_ssize_t i, n_tiles, row = 0, rows, row_bytes
    cdef Encoding kind_of_code = ENCODINGS[encoding]
    cdef Py_ssize_t tile_size = tile_row_bytes(kind_of_code, columns, group_size)
    cdef uint8_t[::1] target = out
    cdef const float *weight = NULL
    cdef float[::1] weights
    if columns < 1 or columns % group_size or group_size not in (32, 64, 128, 256):
        raise ValueError(f"{columns} columns do not divide into groups of {group_size}")
    if importance is not None:
        weights = _importance(importance, columns)
        weight = &weights[0]
    n_tiles = target.shape[0] // tile_size
    if target.shape[0] != n_tiles * tile_size or n_tiles < 1:
        raise ValueError(f"out holds {target.shape[0]} bytes, not whole tile rows of {tile_size}")
    types = {"BF16": SOURCE_BF16, "F16": SOURCE_F16, "F32": SOURCE_F32}
    sizes = {"BF16": 2, "F16": 2, "F32": 4}
    buffers = [(np.frombuffer(data, dtype=np.uint8), types[dtype], sizes[dtype]) for data, dtype in parts]
    if len({kind for _, kind, _ in buffers}) != 1:
        raise ValueError("the parts of one matrix have different dtypes")
    cdef SourceType kind = buffers[0][1]
    cdef QuantizationError *errors = <QuantizationError *>calloc(n_tiles, sizeof(QuantizationError))
    cdef TileRow *tiles = <TileRow *>calloc(n_tiles, sizeof(TileRow))
    try:
        if errors == NULL or tiles == NULL:
            raise MemoryError(f"no memory for {n_tiles} tiles")
        for data, _, size in buffers:
            address, row_bytes, rows = data.ctypes.data, columns * size, data.size // (columns * size)
            if data.size % row_bytes:
                raise ValueError(f"a part of {data.size} bytes is not whole rows of {row_bytes}")
            for i in range(min(rows, LANES * n_tiles - row)):
                tiles[(row + i) // LANES].rows[(row + i) % LANES] = <const void *>(address + i * row_bytes)
            row += rows
        # no prange: OpenMP does not survive an exporter's thread that is here when the interpreter ends
        with nogil:
            for i in range(n_tiles):
                errors[i].bad = -1
                kernels.quantize_tiles[<int>kind_of_code](
                    &target[i * tile_size], <const void **>tiles[i].rows, kind, weight, columns, group_size,
                    &errors[i])
        largest, error_square, square, bad = 0.0, 0.0, 0.0, -1
        for i in range(n_tiles):
            largest = max(largest, errors[i].largest)
            error_square += errors[i].error_square
            square += errors[i].square
            if bad < 0 and errors[i].bad >= 0:
                bad = i * LANES * columns + errors[i].bad
        return largest, error_square, square, bad
    finally:
        free(errors)
        free(tiles)


def _importance(importance, Py_ssize_t columns):
    """importance as float32 (columns,). ValueError unless it has this shape and is finite and not negative."""
    array = np.array(importance, dtype=np.float32)
    if array.shape != (columns,):
        raise ValueError(f"importance has shape {array.shape}, expected ({columns},)")
    if not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError("importance holds a number that is negative or not finite")
    return array


# ----------------------------------------------------------------------------
# For the benchmark: what this machine can do at most, whatever the model

cdef uint64_t folded = 0  # what was read goes here, so that no compiler leaves the reading out


cdef uint64_t fold(const uint64_t *words, Py_ssize_t n) noexcept nogil:
    """The xor of all n words (a multiple of 8): each must be read. Eight independent chains hide latency."""
    cdef uint64_t a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0
    cdef Py_ssize_t i
    for i in range(0, n, 8):
        a ^= words[i]
        b ^= words[i + 1]
        c ^= words[i + 2]
        d ^= words[i + 3]
        e ^= words[i + 4]
        f ^= words[i + 5]
        g ^= words[i + 6]
        h ^= words[i + 7]
    return a ^ b ^ c ^ d ^ e ^ f ^ g ^ h


def read_bandwidth(data, int threads=1):
    """Bytes per second at which `threads` threads together read a buffer once, from end to end."""
    whole = np.frombuffer(data, dtype=np.uint8)[: len(data) // 64 * 64]
    cdef const uint64_t[::1] words = whole.view(np.uint64)
    cdef Py_ssize_t i, n = words.shape[0], step = READ_BYTES // 8, tasks = (n + step - 1) // step
    cdef const uint64_t *start
    cdef uint64_t all_folded = 0
    global folded
    if n == 0:
        raise ValueError(f"{len(data)} bytes are too few to time, at least 64 are needed")
    start = &words[0]
    threads = 1 if forked else startable_team(threads)
    begin = time.perf_counter()
    for i in prange(tasks, nogil=True, schedule="static", num_threads=threads, use_threads_if=threads > 1):
        all_folded ^= fold(start + i * step, min(step, n - i * step))
    seconds = time.perf_counter() - begin
    folded = all_folded
    return 8 * n / seconds


def int8_peak(int threads=1, double seconds=0.05):
    """Multiply-adds per second of the int8 dot products of the instruction set in use, on registers alone."""
    cdef Py_ssize_t i, tasks
    cdef size_t count = 0
    threads = 1 if forked else startable_team(threads)
    begin = time.perf_counter()
    kernels.int8_peak(PEAK_ROUNDS)
    tasks = threads * max(1, int(seconds / (time.perf_counter() - begin)))
    begin = time.perf_counter()
    for i in prange(tasks, nogil=True, schedule="dynamic", num_threads=threads, use_threads_if=threads > 1):
        count += kernels.int8_peak(PEAK_ROUNDS)
    return count / (time.perf_counter() - begin)
