# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False
"""Rows of logits -> tokens, several rows at once on several threads.

    adjust      bias, penalties, tokens that may not come: on a copy of the row
    choose      softmax with a temperature; top-k, top-p and min-p say which tokens remain
    pick        one number, a function of seed and position, picks among them

A row's token depends on nothing but the row and its Draw. What the sampler means by all of it stands in
drivers/sampler.py, which checks every number; nothing here is called by anything else.
"""

import numpy as np

cimport cython
from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY, isfinite, log
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from .table cimport forked, kernels


cdef extern from "kernels/openmp.h" nogil:
    int startable_team(int wanted)


# Falling probabilities that top-p looks at first: mostly they hold enough. Beyond, all are sorted.
cdef Py_ssize_t FIRST_LIKELY = 64
cdef Py_ssize_t MORE_LIKELY = 512

cdef enum:
    DIGIT_BITS = 11  # of the radix sort
    DIGITS = 1 << DIGIT_BITS

cdef enum Fault:
    NO_FAULT
    NOT_FINITE  # the largest logit
    NOTHING_ALLOWED  # by the mask

cdef struct Choice:
    # how tokens are chosen
    Py_ssize_t n  # ids below it exist
    float inverse_temperature  # 0 for the largest logit
    Py_ssize_t top_k  # n for all
    double top_p
    float min_p
    uint64_t seed
    # what changes the logits first
    const int32_t *undefined  # ids that stand for no token
    Py_ssize_t n_undefined
    const int32_t *biased
    const float *bias
    Py_ssize_t n_biased
    const int32_t *known  # tokens that a penalty is for
    const float *times  # how often each came in the reply
    Py_ssize_t n_known
    float repetition, frequency, presence
    # this time
    const float *logits
    const uint8_t *allowed  # NULL: every token
    uint64_t position
    Py_ssize_t n_top  # how many of the model's most likely tokens are wanted; -1: no log-probabilities
    # what came
    Fault fault
    float largest  # of the logits as changed
    Py_ssize_t token
    double share
    float most, exponentials  # the model's own: max x, and the sum of exp(x - max x)
    int32_t *top  # (n_top)
    float *top_logits

cdef struct Scratch:
    float *x  # the row as changed
    float *p
    int32_t *ids
    int32_t *other_ids
    double *sums


# ----------------------------------------------------------------------------
# One row

cdef void draw_row(Choice *c, Scratch *s, bint token) noexcept nogil:
    cdef const float *x = c.logits
    cdef bint greedy = c.inverse_temperature == 0, listed = True  # whether index i of s.p is id s.ids[i]
    cdef Py_ssize_t m = 1 if greedy or c.top_k == c.n else c.top_k, index
    c.fault = NO_FAULT
    if c.n_top >= 0:
        measure(c, s)
    if not token:
        return
    if c.n_undefined or c.n_biased or c.n_known or c.allowed != NULL:
        adjust(c, s.x)
        x = s.x
    if kernels.top_k(s.ids, x, c.n, m):
        s.ids[0] = <int32_t>first_nan(x, c.n)
    c.token, c.share, c.largest = s.ids[0], 1, x[s.ids[0]]
    if not isfinite(c.largest):
        c.fault = NOTHING_ALLOWED if c.allowed != NULL and c.largest == -INFINITY else NOT_FINITE
        return
    if greedy:
        return
    if c.top_k < c.n:
        for index in range(m):
            s.p[index] = x[s.ids[index]]
        softmax(s.p, s.p, m, c.inverse_temperature)
        m = keep(c, s, m)
    else:
        softmax(s.p, x, c.n, c.inverse_temperature)
        m = c.n
        if c.top_p < 1:
            m = keep(c, s, most_likely(c, s))
        elif c.min_p > 0:
            m = keep_likely(s, NULL, c.n, c.min_p * s.p[s.ids[0]])
        else:
            listed = False
    index = pick(s.p, m, uniform(c.seed, c.position), s.sums, &c.share)
    c.token = s.ids[index] if listed else index


cdef Py_ssize_t first_nan(const float *x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0
    while i < n - 1 and x[i] == x[i]:
        i += 1
    return i


cdef void measure(Choice *c, Scratch *s) noexcept nogil:
    """The sum and the most likely tokens of the model's own distribution over the tokens that exist."""
    cdef const float *x = c.logits
    cdef int32_t *ids
    cdef Py_ssize_t i
    if c.n_undefined:
        memcpy(s.x, x, c.n * sizeof(float))
        forbid(c, s.x)
        x = s.x
    c.exponentials = kernels.exponentials(s.p, x, c.n, 1)
    ids = c.top if c.n_top else s.ids
    if kernels.top_k(ids, x, c.n, max(c.n_top, 1)):
        ids[0] = <int32_t>first_nan(x, c.n)
    c.most = x[ids[0]]
    for i in range(c.n_top):
        c.top_logits[i] = x[c.top[i]]


cdef void forbid(const Choice *c, float *x) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(c.n_undefined):
        x[c.undefined[i]] = -INFINITY


cdef void adjust(const Choice *c, float *x) noexcept nogil:
    """x (n) = the logits with bias and penalties; -inf for tokens that may not come."""
    cdef Py_ssize_t i
    cdef int32_t id
    memcpy(x, c.logits, c.n * sizeof(float))
    forbid(c, x)
    for i in range(c.n_biased):
        x[c.biased[i]] += c.bias[i]
    for i in range(c.n_known):
        id = c.known[i]
        if c.repetition != 1:
            x[id] = x[id] / c.repetition if x[id] > 0 else x[id] * c.repetition
        if c.times[i] > 0 and (c.frequency != 0 or c.presence != 0):
            x[id] -= c.frequency * c.times[i] + c.presence
    if c.allowed != NULL:
        for i in range(c.n):
            x[i] = x[i] if c.allowed[i] else -INFINITY


cdef void softmax(float *p, const float *x, Py_ssize_t n, float inverse_temperature) noexcept nogil:
    cdef float total = kernels.exponentials(p, x, n, inverse_temperature)
    cdef Py_ssize_t i
    for i in range(n):
        p[i] /= total


cdef Py_ssize_t most_likely(const Choice *c, Scratch *s) noexcept nogil:
    """Put ids and probabilities, falling, equal ones by id, in the places of all: as many as top-p needs."""
    cdef Py_ssize_t n = FIRST_LIKELY, i
    cdef double mass
    while n <= MORE_LIKELY and n < c.n:
        kernels.top_k(s.ids, s.p, c.n, n)
        mass = 0
        for i in range(n):
            mass += s.p[s.ids[i]]
        if mass >= c.top_p:
            break
        n *= MORE_LIKELY // FIRST_LIKELY
    if n > MORE_LIKELY or n >= c.n:
        n = c.n
        sort(s, n)
    for i in range(n):
        s.x[i] = s.p[s.ids[i]]
    memcpy(s.p, s.x, n * sizeof(float))
    return n


cdef void sort(Scratch *s, Py_ssize_t n) noexcept nogil:
    """ids (n) by falling p, equal ones by id: a radix sort, for floats that are not negative order as their
    bits do.
    """
    cdef int32_t *source = s.other_ids
    cdef int32_t *target = s.ids
    cdef Py_ssize_t places[DIGITS]
    cdef Py_ssize_t i, digit, place, count
    cdef int shift = 0
    for i in range(n):
        source[i] = <int32_t>i
    while shift < 32:
        memset(places, 0, sizeof(places))
        for i in range(n):
            places[~(bits(s.p + i) >> shift) & (DIGITS - 1)] += 1
        place = 0
        for digit in range(DIGITS):
            count = places[digit]
            places[digit] = place
            place += count
        for i in range(n):
            digit = ~(bits(s.p + source[i]) >> shift) & (DIGITS - 1)
            target[places[digit]] = source[i]
            places[digit] += 1
        source, target = target, source
        shift += DIGIT_BITS
    # after three passes the last target, now the source, is s.ids


cdef inline uint32_t bits(const float *x) noexcept nogil:
    cdef uint32_t word
    memcpy(&word, x, sizeof(word))
    return word


cdef Py_ssize_t keep(const Choice *c, Scratch *s, Py_ssize_t m) noexcept nogil:
    """Keep of m ids, the most likely first, what top-p and min-p keep: always the first; how many.

    top-p keeps a token while those before it sum to less than top_p; min-p compares with the largest.
    """
    cdef double before = 0
    cdef Py_ssize_t i
    for i in range(m):
        if i and c.top_p < 1 and not before < c.top_p:
            m = i
            break
        before += s.p[i]
    return keep_likely(s, s.ids, m, c.min_p * s.p[0])


cdef Py_ssize_t keep_likely(Scratch *s, const int32_t *ids, Py_ssize_t n, float least) noexcept nogil:
    """Put those of ids (n; NULL: 0 to n - 1) whose p is not below `least` first, and their p; how many."""
    cdef Py_ssize_t i, kept = 0
    for i in range(n):
        if s.p[i] >= least:
            s.ids[kept], s.p[kept] = <int32_t>i if ids == NULL else ids[i], s.p[i]
            kept += 1
    return kept


cdef Py_ssize_t pick(const float *p, Py_ssize_t n, double number, double *sums, double *share) noexcept nogil:
    """The index that a number in [0, 1) picks in proportion to p (n); never where p is 0.

    A tree of sums of pairs, i and i + half, is descended from its root: no order of summation but this one
    decides, and every level adds at the speed of vectors. sums: room for as many as p has, rounded up to a
    power of 2. share: of the index in the sum.
    """
    cdef Py_ssize_t size = 1, half, i, index = 0, other
    cdef double *level = sums
    cdef double total, rest
    while size < n:
        size *= 2
    if size == 1:
        share[0] = 1
        return 0
    half = size // 2
    for i in range(n - half):
        level[i] = <double>p[i] + <double>p[i + half]
    for i in range(n - half, half):
        level[i] = p[i]
    while half > 1:
        half //= 2
        for i in range(half):
            level[2 * half + i] = level[i] + level[half + i]
        level += 2 * half
    total = level[0]
    rest = number * total
    while 2 * half < size:
        half *= 2
        level -= half
        other = index + half // 2
        if rest >= level[index] and level[other] > 0:
            rest -= level[index]
            index = other
    other = index + half
    if other < n and rest >= p[index] and p[other] > 0:
        index = other
    share[0] = p[index] / total
    return index


cdef double uniform(uint64_t seed, uint64_t position) noexcept nogil:
    """The number of `position`, in [0, 1): numpy's Philox with key `seed`, from counter `position` on.

    Philox is a function of key and counter (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").
    """
    cdef uint64_t a = position + 1, b = 0, c = 0, d = 0, key = seed, other_key = 0, high, other_high
    cdef int i
    for i in range(10):
        high, other_high = high_product(0xD2E7470EE14C6C93, a), high_product(0xCA5A826395121157, c)
        a, b, c, d = (
            other_high ^ b ^ key, <uint64_t>0xCA5A826395121157 * c,
            high ^ d ^ other_key, <uint64_t>0xD2E7470EE14C6C93 * a,
        )
        key += <uint64_t>0x9E3779B97F4A7C15
        other_key += <uint64_t>0xBB67AE8584CAA73B
    return (a >> 11) * 2.0**-53


cdef uint64_t high_product(uint64_t a, uint64_t b) noexcept nogil:
    """The upper 64 bits of a * b."""
    cdef uint64_t low_a = <uint32_t>a, high_a = a >> 32, low_b = <uint32_t>b, high_b = b >> 32
    cdef uint64_t middle = high_a * low_b + (low_a * low_b >> 32)
    cdef uint64_t other = low_a * high_b + <uint32_t>middle
    return high_a * high_b + (middle >> 32) + (other >> 32)


class NoTokenError(ValueError):
    """What the next token has to be leaves none."""


# ----------------------------------------------------------------------------
# From Python

@cython.final
cdef class Draw:
    """How the tokens of one sequence are chosen, and the last that was: see drivers/sampler.py.

    rules: a checked Sampling. seed: the one in use. n_tokens: ids below it exist. undefined: ids among
    them that stand for no token. greedy_below: temperatures that count as 0.
    """

    cdef Choice c
    cdef object _undefined, _biased, _bias, _known, _times, _logits, _allowed, _top, _top_logits
    cdef dict _slots  # token -> its place in _known
    cdef bint _penalised

    def __init__(self, rules, seed, Py_ssize_t n_tokens, undefined, double greedy_below):
        cdef Choice *c = &self.c
        memset(c, 0, sizeof(Choice))
        greedy = rules.temperature < greedy_below
        c.n, c.seed = n_tokens, seed
        c.inverse_temperature = 0 if greedy else <float>(1.0 / <double>rules.temperature)
        c.top_k = rules.top_k if 0 < rules.top_k < n_tokens else n_tokens
        c.top_p, c.min_p = rules.top_p, rules.min_p
        c.repetition = rules.repetition_penalty
        c.frequency, c.presence = rules.frequency_penalty, rules.presence_penalty
        self._undefined = np.fromiter(undefined, dtype=np.int32)
        self._biased = np.fromiter(rules.logit_bias, dtype=np.int32)
        self._bias = np.fromiter(rules.logit_bias.values(), dtype=np.float32)
        c.undefined, c.n_undefined = int_data(self._undefined), len(self._undefined)
        c.biased, c.bias, c.n_biased = int_data(self._biased), float_data(self._bias), len(self._biased)
        self._penalised = c.repetition != 1 or c.frequency != 0 or c.presence != 0
        self._slots, self._top, self._top_logits = {}, (), ()
        self._make_room(64)

    def know(self, tokens, reply=True):
        """Penalties are from now on for these tokens, too. reply: they came in the reply, not the prompt."""
        if not (self._penalised if reply else self.c.repetition != 1):
            return
        for token in tokens:
            slot = self._slots.setdefault(token, len(self._slots))
            if slot == self.c.n_known:
                if slot == len(self._known):
                    self._make_room(2 * slot)
                self._known[slot] = token
                self.c.n_known += 1
            if reply:
                self._times[slot] += 1

    cdef _make_room(self, Py_ssize_t n):
        known, times = np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.float32)
        if self.c.n_known:
            known[: self.c.n_known], times[: self.c.n_known] = self._known, self._times
        self._known, self._times = known, times
        self.c.known, self.c.times = int_data(known), float_data(times)

    def begin(self, logits, Py_ssize_t position, allowed=None, n_top=None):
        """The row of the next token, which is number `position` of its sequence, and the mask over its ids.

        n_top: how many of the model's own most likely tokens are wanted, with log-probabilities; None for no
        log-probabilities.
        """
        cdef const float[::1] row = logits
        cdef const uint8_t[::1] mask
        if row.shape[0] < self.c.n:
            raise ValueError(f"the row has {row.shape[0]} logits, the vocabulary {self.c.n} tokens")
        self._logits, self.c.logits = logits, &row[0]
        self._allowed, self.c.allowed = allowed, NULL
        if allowed is not None:
            mask = allowed.view(np.uint8)
            if mask.shape[0] != self.c.n:
                raise ValueError(f"the mask is for {mask.shape[0]} tokens, the vocabulary has {self.c.n}")
            self.c.allowed = &mask[0]
        self.c.position = position
        self.c.n_top = -1 if n_top is None else min(n_top, self.c.n)
        if self.c.n_top > 0 and self.c.n_top != len(self._top):
            self._top, self._top_logits = np.zeros(self.c.n_top, np.int32), np.zeros(self.c.n_top, np.float32)
            self.c.top, self.c.top_logits = int_data(self._top), float_data(self._top_logits)

    def result(self):
        """(the token drawn, its share of what it was drawn from). ValueError if there was none to draw."""
        if self.c.fault == NOTHING_ALLOWED:
            raise NoTokenError("the grammar allows no token that exists and is not forbidden otherwise")
        if self.c.fault == NOT_FINITE:
            raise ValueError(
                f"the largest logit is {self.c.largest}: the model file is damaged or its weights overflow"
            )
        return self.c.token, self.c.share

    def measured(self):
        """(log of the sum of exp(logits), the most likely tokens with their logits): the model's own."""
        top = zip(self._top.tolist(), self._top_logits.tolist()) if self.c.n_top > 0 else ()
        return self.c.most + log(self.c.exponentials), list(top)


def draw(draws, int threads=1, bint tokens=True):
    """What each of `draws` was begun for, on so many threads. tokens: false to measure the rows alone."""
    cdef Py_ssize_t i, n = len(draws), longest = 1
    cdef Draw one
    cdef Choice **choices
    cdef Scratch *scratches
    borrowed = []
    if n == 0:
        return
    threads = 1 if forked else startable_team(min(threads, n))
    choices, scratches = <Choice **>malloc(n * sizeof(Choice *)), <Scratch *>malloc(threads * sizeof(Scratch))
    try:
        if choices == NULL or scratches == NULL:
            raise MemoryError(f"no memory to draw {n} tokens")
        for i in range(n):
            one = draws[i]
            choices[i], longest = &one.c, max(longest, one.c.n)
        for i in range(threads):
            borrowed.append(borrow(&scratches[i], longest))
        if threads == 1 and n == 1:  # too short for others to have their turn meanwhile
            draw_row(choices[0], &scratches[0], tokens)
        else:
            for i in prange(n, nogil=True, schedule="dynamic", num_threads=threads, use_threads_if=threads > 1):
                draw_row(choices[i], &scratches[threadid()], tokens)
        for i in range(n):
            one = draws[i]
            one._logits = one._allowed = None  # the memory of all rows is that of one pass
    finally:
        spare.extend(borrowed)
        free(choices)
        free(scratches)


def pick_index(p, double number):
    """(the index that `number`, in [0, 1), picks in proportion to p (n,), its share of the sum)."""
    cdef const float[::1] values = np.ascontiguousarray(p, dtype=np.float32)
    cdef double[::1] sums = np.empty(2 * len(values))
    cdef double share
    index = pick(&values[0], len(values), number, &sums[0], &share)
    return index, share


cdef list spare = []  # memory of earlier calls, which hold the GIL when they take and return it


cdef borrow(Scratch *s, Py_ssize_t n):
    """Room for a row of n; a page of it costs nothing until it is used."""
    cdef Py_ssize_t power = 1
    cdef uint8_t[::1] view
    while power < n:
        power *= 2
    memory = spare.pop() if spare else None
    if memory is None or len(memory) < 8 * power + 16 * n:
        memory = np.empty(8 * power + 16 * n, dtype=np.uint8)
    view = memory
    s.sums = <double *>&view[0]
    s.x = <float *>(s.sums + power)
    s.p = s.x + n
    s.ids = <int32_t *>(s.p + n)
    s.other_ids = s.ids + n
    return memory


cdef int32_t *int_data(array):
    cdef int32_t[::1] view = array
    return &view[0] if view.shape[0] else NULL


cdef float *float_data(array):
    cdef float[::1] view = array
    return &view[0] if view.shape[0] else NULL
