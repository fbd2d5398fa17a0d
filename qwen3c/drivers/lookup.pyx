# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False
"""Where the end of a text stood before: what came after it there is a guess at what comes now.

A Lookup holds the last tokens of a text, or of many, in a ring, and chains the places that follow the same
two tokens, the newest first (as LZ77 compressors do). So a token is added in constant time, memory is bounded, the
oldest are forgotten, and of several longest matches the newest is found. A suffix automaton finds the longest
match of all, but can forget nothing and knows the oldest place best.
"""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

cimport cython

LONGEST = 32  # tokens of a match that are counted
MOST = (1 << 16) - 1  # tokens that a Lookup holds, unless told otherwise
BETWEEN = -1  # in place of a token: what comes after it does not go on from what comes before

cdef int LENGTH = LONGEST
cdef int STEPS = 64  # places of a chain that are looked at: no text, however odd, makes it slow


@cython.final
cdef class Lookup:
    """The last tokens of what was added, `capacity` of them or up to twice as many."""

    cdef int32_t *tokens  # (capacity,), by place modulo capacity
    cdef int64_t *older  # (capacity,): the place before that follows the same two tokens
    cdef int64_t *newest  # (capacity,), by hash of two tokens: the newest place that follows them, + 1
    cdef int64_t n  # tokens added so far: the place of the next one
    cdef uint64_t mask

    def __cinit__(self, Py_ssize_t capacity=MOST):
        cdef uint64_t size = 64
        while size <= <uint64_t>capacity:
            size *= 2
        self.mask = size - 1
        self.tokens = <int32_t *>calloc(size, sizeof(int32_t))
        self.older = <int64_t *>calloc(size, sizeof(int64_t))
        self.newest = <int64_t *>calloc(size, sizeof(int64_t))
        if self.tokens == NULL or self.older == NULL or self.newest == NULL:
            raise MemoryError(f"no memory to look up {size} tokens")

    def __dealloc__(self):
        free(self.tokens)
        free(self.older)
        free(self.newest)

    def __len__(self):
        """How many tokens were added, forgotten ones included."""
        return self.n

    @property
    def capacity(self):
        """How many tokens it holds before it forgets the oldest."""
        return self.mask

    cdef int32_t at(self, int64_t place) noexcept nogil:
        return self.tokens[<uint64_t>place & self.mask]

    cdef uint64_t slot(self, int32_t a, int32_t b) noexcept nogil:
        cdef uint64_t mixed = (<uint64_t><uint32_t>a << 32 | <uint32_t>b) * <uint64_t>0x9E3779B97F4A7C15
        return (mixed >> 32) & self.mask

    def add(self, tokens):
        """The text goes on with `tokens`; BETWEEN ends a text."""
        cdef int32_t token
        for token in tokens:
            self.put(token)

    cdef void put(self, int32_t token) noexcept:
        cdef int32_t before = self.at(self.n - 1) if self.n else BETWEEN
        cdef uint64_t slot
        self.tokens[<uint64_t>self.n & self.mask] = token
        self.n += 1
        if token != BETWEEN and before != BETWEEN:
            slot = self.slot(before, token)
            self.older[<uint64_t>self.n & self.mask] = self.newest[slot] - 1
            self.newest[slot] = self.n + 1

    def find(self, Lookup text, int64_t before=-1):
        """(tokens in common, place): of the places in here, what comes before which has most of the end of
        `text`, which may be this text itself.

        before: the place that was found when the text had one token less: a match that goes on is not lost.
        (0, -1) if there are not two tokens in common.
        """
        cdef int64_t place, found = -1
        cdef int length, longest = 1, steps = 0
        if text.n < 2 or text.at(text.n - 1) == BETWEEN or text.at(text.n - 2) == BETWEEN:
            return 0, -1
        if before >= 0:
            length = self.common(text, before + 1)
            if length > longest:
                longest, found = length, before + 1
        place = self.newest[self.slot(text.at(text.n - 2), text.at(text.n - 1))] - 1
        if place == self.n:  # nothing came there yet
            place = self.older[<uint64_t>place & self.mask]
        while longest < LENGTH and steps < STEPS and self.holds(place):
            length = self.common(text, place)
            if length > longest:
                longest, found = length, place
            steps += 1
            place = self.older[<uint64_t>place & self.mask]
        return longest if found >= 0 else 0, found

    cdef bint holds(self, int64_t place) noexcept nogil:
        """Whether the token at `place` is there: it came, and is not forgotten."""
        return 0 <= place < self.n and self.n - place <= <int64_t>self.mask

    cdef int common(self, Lookup text, int64_t place) noexcept:
        """How many tokens before `place` are those at the end of `text`, LONGEST at most."""
        cdef int length = 0
        cdef int32_t token
        if not self.holds(place):
            return 0
        while length < LENGTH and length < text.n and self.holds(place - 1 - length):
            token = text.at(text.n - 1 - length)
            if token == BETWEEN or token != self.at(place - 1 - length):
                break
            length += 1
        return length

    def read(self, int64_t place, int n):
        """At most n tokens from `place` on, as far as the text goes."""
        cdef list tokens = []
        cdef int32_t token
        while n > 0 and self.holds(place):
            token = self.at(place)
            if token == BETWEEN:
                break
            tokens.append(token)
            place += 1
            n -= 1
        return tokens
