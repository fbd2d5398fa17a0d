# cython: language_level=3, cdivision=True
"""The forward pass: rows of tokens in, logits out.

    tokens -> embedding
           -> n_layers x ( x += attention(rmsnorm(x));  x += swiglu(rmsnorm(x)) )
           -> rmsnorm -> logits

All threads of a pass run the same `forward`, in which every block is a stage: tasks that the threads share
out (kernels/team.h). A task is output rows, heads or tokens, never a part of a sum, so the number of threads
changes no bit. Arguments were checked at the Python edge (engine.pyx); in here nothing can fail.
The nouns are in forward.pxd; what the kernels compute is written in kernels/kernels.h.
"""

from libc.math cimport sqrt
from libc.stdint cimport int8_t, int32_t, uint8_t
from libc.string cimport memcpy, memset

from ..kernels.table cimport (
    ATTENTION_ROWS, ATTENTION_SCRATCH, KV_BLOCK, LANES, Attention, Int8Rows, code_bytes, kernels, key_bytes,
    tile_row_bytes,
)


cdef extern from "Python.h" nogil:
    int CheckSignals "PyErr_CheckSignals"()  # an exception stays pending, for the end of the pass


# A pass of more rows than this takes long: it checks for a signal (Ctrl-C) at every layer.
cdef Py_ssize_t LONG_PASS = 16

# The size of a task: large enough to be worth taking, small enough that the threads finish together.
cdef Py_ssize_t TASK_BYTES = 64 * 1024  # of weights
cdef Py_ssize_t TASK_ROWS = 4  # of activations
cdef Py_ssize_t TASK_COLUMNS = 1024  # of one row in the feed-forward, rounded up to whole groups


# ----------------------------------------------------------------------------
# The forward pass

cdef size_t forward(Network *m, size_t thread, const Pass *p) noexcept nogil:
    """One pass, as thread number `thread` of the team; returns how many stages the pass has."""
    cdef RunState *s = &m.s
    cdef const Weights *weights = &m.weights
    cdef Worker worker = team_worker(&m.team, thread)
    cdef const Layer *layer
    cdef Py_ssize_t l

    # the residual stream starts as the embedding of the tokens; positions become angles once for all layers
    embed(m, &worker, p)
    probe(m, &worker, p, 0, EMBEDDED)

    for l in range(m.n_layers):
        layer = &weights.layers[l]
        if thread == 0 and p.n > LONG_PASS and interrupted():
            team_stop(&m.team)

        # q, k, v of the normalised rows in one product
        rmsnorm(m, &worker, s.x, NULL, p.n, layer.attention_norm)
        project(m, &worker, layer, p.n)
        probe(m, &worker, p, l, PROJECTED)

        # add the biases, norm q and k per head, rotate them by position, put k and v into the cache
        rotate_and_store(m, &worker, p, l)

        # attention over all positions up to each row's own
        attention(m, &worker, p, l)

        # x += attention output
        quantize(m, &worker, p.n)
        matmul(m, &worker, s.y, s.xb, p.n, &layer.o)
        probe(m, &worker, p, l, ATTENDED)
        add(m, &worker, p.n)

        # x += down(silu(gate(x)) * up(x)) of the normalised rows, by one block or by the experts of each row
        rmsnorm(m, &worker, s.x, NULL, p.n, layer.ffn_norm)
        if layer.router:
            mixture(m, &worker, layer, p.n)
        else:
            feed_forward(m, &worker, layer, p.n)
        probe(m, &worker, p, l, FED_FORWARD)
        add(m, &worker, p.n)
        probe(m, &worker, p, l, LAYER_DONE)

    # the wanted rows only: final norm, then the product with the vocabulary
    rmsnorm(m, &worker, s.x, p.wanted, p.n_wanted, weights.final_norm)
    probe(m, &worker, p, 0, NORMED)
    if not p.hidden:
        matmul(m, &worker, p.out, s.xb, p.n_wanted, &weights.lm_head)
    elif p.n_wanted and thread == 0:
        memcpy(p.out, s.xb, p.n_wanted * m.dim * sizeof(float))
    return worker.stages


cdef void read_out(Network *m, size_t thread, const float *x, Py_ssize_t n, float *out) noexcept nogil:
    """out (n, vocab_size) = logits of the residual stream x (n, dim): the end of `forward` alone."""
    cdef Worker worker = team_worker(&m.team, thread)
    rmsnorm(m, &worker, x, NULL, n, m.weights.final_norm)
    matmul(m, &worker, out, m.s.xb, n, &m.weights.lm_head)


cdef bint interrupted() noexcept nogil:
    """True once a signal handler (Ctrl-C) has raised; the exception stays set."""
    with gil:
        return CheckSignals() != 0


cdef int raise_pending() except -1:
    """Raise the exception that interrupted() left set: -1 is how a `cdef int except -1` says so."""
    return -1


# ----------------------------------------------------------------------------
# Blocks: products

cdef Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef Int8Rows int8_rows(Network *m, Py_ssize_t row, Py_ssize_t columns) noexcept nogil:
    """A view of s.xq as rows of `columns` values, from `row` on."""
    cdef Int8Rows rows
    rows.codes = m.s.xq.codes + row * columns
    rows.scales = m.s.xq.scales + row * (columns // m.group_size)
    rows.sums = m.s.xq.sums + row * (columns // m.group_size)
    return rows


cdef void quantize_row(Network *m, const float *x, Py_ssize_t row, Py_ssize_t columns) noexcept nogil:
    """Row `row` of s.xq = int8 of row `row` of x (n, columns)."""
    cdef Int8Rows to = int8_rows(m, row, columns)
    kernels.quantize(&to, x + row * columns, columns, m.group_size)


cdef void matmul_tiles(
    Network *m, float *y, Py_ssize_t stride, const float *x, const Group *group,
    const Matrix *w, Py_ssize_t tile, Py_ssize_t n_tiles,
) noexcept nogil:
    """The part of y = x w^T for the rows of `group` and n_tiles tile rows of w, from `tile` on.

    Rows of y are `stride` floats apart.
    """
    cdef Py_ssize_t row = tile * LANES, rows = min(n_tiles * LANES, w.rows - row)
    cdef const uint8_t *tiles = w.tiles + tile * tile_row_bytes(w.encoding, w.columns, m.group_size)
    cdef float *out = y + group.row * stride + row
    cdef Int8Rows xq
    if m.int8:
        xq = int8_rows(m, group.row, w.columns)
        kernels.matmul_int8[<int>w.encoding](
            out, stride, &xq, group.n_rows, tiles, rows, w.columns, m.group_size)
    else:
        x = x + group.row * w.columns
        kernels.matmul_float32[<int>w.encoding](
            out, stride, x, group.n_rows, tiles, rows, w.columns, m.group_size)


cdef Py_ssize_t tiles_per_task(Network *m, const Matrix *w) noexcept nogil:
    """Tile rows of a task: an even number, as the kernels take them in pairs."""
    cdef Py_ssize_t tile_row = w.columns // m.group_size * code_bytes(w.encoding, m.group_size)
    return max(2, TASK_BYTES // tile_row // 2 * 2)


cdef void project(Network *m, Worker *worker, const Layer *layer, Py_ssize_t n) noexcept nogil:
    """qkv (n, q_dim + 2 kv_dim) = xb (n, dim) w^T, where w is one matrix or more, below each other."""
    cdef Group all_rows = Group(0, n, 0)
    cdef Py_ssize_t i, n_tiles, per_task, tasks = 0, row = 0, task
    cdef const Matrix *w
    for i in range(layer.n_qkv if n else 0):
        w = &layer.qkv[i]
        tasks += ceil_div(ceil_div(w.rows, LANES), tiles_per_task(m, w))
    task = stage(worker, tasks)
    tasks = 0  # of the matrices before w
    w = layer.qkv
    while take(worker, &task):
        # a thread's tasks do not ascend: those of another thread may come last
        if task < tasks:
            w, tasks, row = layer.qkv, 0, 0
        n_tiles, per_task = ceil_div(w.rows, LANES), tiles_per_task(m, w)
        while task - tasks >= ceil_div(n_tiles, per_task):
            tasks, row, w = tasks + ceil_div(n_tiles, per_task), row + w.rows, w + 1
            n_tiles, per_task = ceil_div(w.rows, LANES), tiles_per_task(m, w)
        i = (task - tasks) * per_task
        matmul_tiles(m, m.s.qkv + row, m.q_dim + 2 * m.kv_dim, m.s.xb, &all_rows, w, i,
                     min(per_task, n_tiles - i))


cdef void matmul(
    Network *m, Worker *worker, float *y, const float *x, Py_ssize_t n, const Matrix *w
) noexcept nogil:
    """y (n, rows) = x (n, columns) w^T.

    With int8 activations the caller has already quantised x into s.xq; x itself is then not read.
    """
    cdef Group all_rows = Group(0, n, 0)
    cdef Py_ssize_t n_groups = min(n, 1)
    matmul_groups(m, worker, y, x, &all_rows, &n_groups, n_groups, w)


cdef void matmul_groups(
    Network *m, Worker *worker, float *y, const float *x,
    const Group *groups, const Py_ssize_t *n_groups,  # an earlier stage computes them
    Py_ssize_t max_groups, const Matrix *matrices,
) noexcept nogil:
    """matmul for experts: rows of group i times matrices[groups[i].matrix], all of one shape."""
    cdef const Matrix *w = matrices
    cdef Py_ssize_t n_tiles = ceil_div(w.rows, LANES)
    cdef Py_ssize_t per_task = tiles_per_task(m, w), per_group = ceil_div(n_tiles, per_task)
    cdef Py_ssize_t tile, task = stage(worker, max_groups * per_group)
    cdef const Group *group
    while take(worker, &task):
        if task // per_group < n_groups[0]:
            group, tile = &groups[task // per_group], task % per_group * per_task
            matmul_tiles(
                m, y, w.rows, x, group, &matrices[group.matrix], tile, min(per_task, n_tiles - tile))


# ----------------------------------------------------------------------------
# Blocks: the residual stream

cdef void embed(Network *m, Worker *worker, const Pass *p) noexcept nogil:
    """x (n, dim) = the tokens' rows of the embedding; cosine, sine (n, head_dim / 2) of their positions."""
    cdef Py_ssize_t row, half = m.head_dim // 2, task = stage(worker, p.n_spans)
    cdef const Matrix *w = &m.weights.embedding
    cdef const Span *span
    while take(worker, &task):
        span = &p.spans[task]
        for row in range(span.row, span.row + span.n_rows):
            kernels.dequantize_row[<int>w.encoding](
                m.s.x + row * m.dim, w.tiles, p.tokens[row], m.dim, m.group_size)
            kernels.rope_angles(
                m.s.cosine + row * half, m.s.sine + row * half, m.weights.rope_frequencies, half,
                span.position + row - span.row, m.rope_scale)


cdef void rmsnorm(
    Network *m, Worker *worker, const float *x, const Py_ssize_t *wanted, Py_ssize_t n, const float *weight
) noexcept nogil:
    """xb (n, dim), and s.xq, = x / rms(x) * weight (https://arxiv.org/abs/1910.07467).

    wanted: the n rows of x to take, NULL for the first n.
    """
    cdef Py_ssize_t i, row, task = stage(worker, ceil_div(n, TASK_ROWS))
    while take(worker, &task):
        for i in range(task * TASK_ROWS, min(n, (task + 1) * TASK_ROWS)):
            row = wanted[i] if wanted != NULL else i
            kernels.rmsnorm(m.s.xb + i * m.dim, x + row * m.dim, weight, m.dim, m.eps)
            if m.int8:
                quantize_row(m, m.s.xb, i, m.dim)


cdef void quantize(Network *m, Worker *worker, Py_ssize_t n) noexcept nogil:
    """s.xq = the attention output xb (n, q_dim)."""
    cdef Py_ssize_t i, task = stage(worker, ceil_div(n, TASK_ROWS))
    while take(worker, &task):
        for i in range(task * TASK_ROWS, min(n, (task + 1) * TASK_ROWS)):
            if m.int8:
                quantize_row(m, m.s.xb, i, m.q_dim)


cdef void add(Network *m, Worker *worker, Py_ssize_t n) noexcept nogil:
    """x (n, dim) += y."""
    cdef Py_ssize_t i, task = stage(worker, ceil_div(n, TASK_ROWS))
    while take(worker, &task):
        for i in range(task * TASK_ROWS, min(n, (task + 1) * TASK_ROWS)):
            kernels.add(m.s.x + i * m.dim, m.s.y + i * m.dim, m.dim)


# ----------------------------------------------------------------------------
# Blocks: attention

cdef char *kv_at(Network *m, char *block, Py_ssize_t layer, Py_ssize_t kv_head) noexcept nogil:
    """Where a block holds the keys of a layer and KV head; the values follow them."""
    return block + (layer * m.n_kv_heads + kv_head) * m.head_bytes


cdef void add_bias(Network *m, const Layer *layer, Py_ssize_t row, Py_ssize_t column) noexcept nogil:
    """Add its bias to the head of s.qkv that begins at `column`."""
    if layer.qkv_bias:
        kernels.add(m.s.qkv + row * (m.q_dim + 2 * m.kv_dim) + column, layer.qkv_bias + column, m.head_dim)


cdef void rotate_head(Network *m, const Span *span, Py_ssize_t l, Py_ssize_t kv_head) noexcept nogil:
    """rotate_and_store for one KV head and the query heads that share it."""
    cdef const Layer *layer = &m.weights.layers[l]
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
            add_bias(m, layer, row, h * m.head_dim)
            if layer.q_norm:
                kernels.rmsnorm(qkv + h * m.head_dim, qkv + h * m.head_dim, layer.q_norm, m.head_dim, m.eps)
            kernels.rope(qkv + h * m.head_dim, cosine, sine, m.head_dim, scale)
        add_bias(m, layer, row, k_column)
        add_bias(m, layer, row, v_column)
        if layer.k_norm:
            kernels.rmsnorm(qkv + k_column, qkv + k_column, layer.k_norm, m.head_dim, m.eps)
        kernels.rope(qkv + k_column, cosine, sine, m.head_dim, 1.0)
        keys = kv_at(m, span.blocks[position // KV_BLOCK], l, kv_head)
        kernels.store_kv[<int>m.kv_type](keys, keys + key_bytes(m.kv_type, m.head_dim), position % KV_BLOCK,
                                         qkv + k_column, qkv + v_column, m.head_dim)


cdef void rotate_and_store(Network *m, Worker *worker, const Pass *p, Py_ssize_t l) noexcept nogil:
    """q and k: bias, norm per head, rotate; k and v go to the cache; q is scaled by 1 / sqrt(head_dim)."""
    cdef Py_ssize_t task = stage(worker, p.n_spans * m.n_kv_heads)
    while take(worker, &task):
        rotate_head(m, &p.spans[task % p.n_spans], l, task // p.n_spans)


cdef void attend(
    Network *m, size_t thread, const Span *span, Py_ssize_t l,
    Py_ssize_t kv_head, Py_ssize_t part, Py_ssize_t heads,
) noexcept nogil:
    """xb (n, q_dim) = softmax(q k^T) v for some of the query heads that share kv_head.

    They are heads [part * heads, (part + 1) * heads) of the group.
    """
    cdef Py_ssize_t group = m.n_heads // m.n_kv_heads, head = kv_head * group + part * heads
    cdef float *weights = m.trace.arrays[l * N_ARRAYS + ATTENTION]
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
    task.scratch = m.s.scratch + thread * ATTENTION_SCRATCH(m.head_dim)
    task.weights = weights
    if weights != NULL:
        task.weights += (head * m.trace.n + m.trace.row + span.row) * m.trace.n
        task.weights_token, task.weights_head = m.trace.n, m.trace.n * m.trace.n
    kernels.attend[<int>m.kv_type](&task)


cdef void attention(Network *m, Worker *worker, const Pass *p, Py_ssize_t l) noexcept nogil:
    """xb (n, q_dim) for all rows. A task: a span, a KV head and at most ATTENTION_ROWS of its query heads."""
    cdef Py_ssize_t group = m.n_heads // m.n_kv_heads, heads = min(group, ATTENTION_ROWS), n = p.n_spans
    cdef Py_ssize_t parts = ceil_div(group, heads), task = stage(worker, n * m.n_kv_heads * parts)
    # all spans of one head in a row: they share keys and values, which then stay in the CPU's cache
    while take(worker, &task):
        attend(m, worker.index, &p.spans[task % n], l, task // n // parts, task // n % parts, heads)


# ----------------------------------------------------------------------------
# Blocks: feed-forward

cdef void swiglu(Network *m, Worker *worker, Py_ssize_t n, Py_ssize_t hidden_dim) noexcept nogil:
    """hb (n, hidden_dim), and s.xq, = silu(gate) * up (https://arxiv.org/abs/2002.05202)."""
    cdef Py_ssize_t step = ceil_div(TASK_COLUMNS, m.group_size) * m.group_size
    cdef Py_ssize_t parts = ceil_div(hidden_dim, step), task = stage(worker, n * parts)
    cdef Py_ssize_t row, column, columns, first_group
    cdef const float *gate
    cdef float *hb
    cdef Int8Rows to
    while take(worker, &task):
        row, column = task // parts, task % parts * step
        columns, first_group = min(step, hidden_dim - column), column // m.group_size
        gate, hb = m.s.h + 2 * row * hidden_dim + column, m.s.hb + row * hidden_dim + column
        kernels.swiglu(hb, gate, gate + hidden_dim, columns)
        if m.int8:
            to = int8_rows(m, row, hidden_dim)
            to.codes, to.scales, to.sums = to.codes + column, to.scales + first_group, to.sums + first_group
            kernels.quantize(&to, hb, columns, m.group_size)


cdef void feed_forward(Network *m, Worker *worker, const Layer *layer, Py_ssize_t n) noexcept nogil:
    """y (n, dim) = down(silu(gate(xb)) * up(xb))."""
    matmul(m, worker, m.s.h, m.s.xb, n, layer.gate_up)
    swiglu(m, worker, n, m.hidden_dim)
    matmul(m, worker, m.s.y, m.s.hb, n, layer.down)


cdef void mixture(Network *m, Worker *worker, const Layer *layer, Py_ssize_t n) noexcept nogil:
    """y (n, dim) = sum over each row's experts of share * down(silu(gate(xb)) * up(xb))."""
    cdef Py_ssize_t n_slots = n * m.n_experts_per_token, max_groups = min(n_slots, m.n_experts)
    route(m, worker, layer.router, n)
    choose(m, worker, n)
    group_by_expert(m, worker, n)
    gather(m, worker, n_slots)
    matmul_groups(m, worker, m.s.h, m.s.xs, m.s.groups, &m.s.n_groups, max_groups, layer.gate_up)
    swiglu(m, worker, n_slots, m.expert_hidden_dim)
    matmul_groups(m, worker, m.s.xs, m.s.hb, m.s.groups, &m.s.n_groups, max_groups, layer.down)
    combine(m, worker, n)


cdef void route(Network *m, Worker *worker, const float *router, Py_ssize_t n) noexcept nogil:
    """scores (n, n_experts) = xb router^T in float32, whatever the activations."""
    cdef Py_ssize_t row, first, parts = ceil_div(m.n_experts, LANES), task = stage(worker, n * parts)
    while take(worker, &task):
        row, first = task // parts, task % parts * LANES
        kernels.matvec(m.s.scores + row * m.n_experts + first, m.s.xb + row * m.dim,
                       router + first * m.dim, min(LANES, m.n_experts - first), m.dim)


cdef void choose_experts(Network *m, Py_ssize_t row) noexcept nogil:
    """chosen and shares of a row: the experts of largest softmax(scores), of equal ones the lower id.

    chosen is sorted by id.
    """
    cdef Py_ssize_t i, j, k = m.n_experts_per_token
    cdef float *scores = m.s.scores + row * m.n_experts
    cdef float *shares = m.s.shares + row * k
    cdef int32_t *chosen = m.s.chosen + row * k
    cdef int32_t expert
    cdef float total, not_finite = 0, sum_chosen = 0
    if kernels.top_k(chosen, scores, m.n_experts, k):
        for i in range(k):  # NaN: any experts will do, as their shares, and so the logits, are NaN
            chosen[i] = i
    # 0, or NaN if a score is not finite: softmax alone would turn a score of -infinity into a share of 0
    for i in range(m.n_experts):
        not_finite = not_finite + scores[i] * 0
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


cdef void choose(Network *m, Worker *worker, Py_ssize_t n) noexcept nogil:
    """choose_experts for n rows."""
    cdef Py_ssize_t task = stage(worker, n)
    while take(worker, &task):
        choose_experts(m, task)


cdef void group_rows(Network *m, Py_ssize_t n) noexcept nogil:
    """Sort the choices of n rows by expert: slots, choices and groups from chosen."""
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
            start = groups[expert].row - groups[expert].n_rows
            groups[n_groups] = Group(start, groups[expert].n_rows, expert)
            n_groups += 1
    m.s.n_groups = n_groups


cdef void group_by_expert(Network *m, Worker *worker, Py_ssize_t n) noexcept nogil:
    """group_rows as a stage of one task: choices get slots in which the rows of one expert lie together."""
    cdef Py_ssize_t task = stage(worker, 1)
    while take(worker, &task):
        group_rows(m, n)


cdef void gather(Network *m, Worker *worker, Py_ssize_t n_slots) noexcept nogil:
    """xs (slots, dim), and s.xq, = xb of each slot's row."""
    cdef Py_ssize_t row, slot, task = stage(worker, ceil_div(n_slots, TASK_ROWS))
    while take(worker, &task):
        for slot in range(task * TASK_ROWS, min(n_slots, (task + 1) * TASK_ROWS)):
            row = m.s.choices[slot] // m.n_experts_per_token
            memcpy(m.s.xs + slot * m.dim, m.s.xb + row * m.dim, m.dim * sizeof(float))
            if m.int8:
                quantize_row(m, m.s.xs, slot, m.dim)


cdef void combine(Network *m, Worker *worker, Py_ssize_t n) noexcept nogil:
    """y (n, dim) = sum of share * what the expert made of the row, by ascending expert."""
    cdef Py_ssize_t i, k = m.n_experts_per_token, row = stage(worker, n)
    cdef float *y
    while take(worker, &row):
        y = m.s.y + row * m.dim
        memset(y, 0, m.dim * sizeof(float))
        for i in range(row * k, (row + 1) * k):
            kernels.add_scaled(y, m.s.xs + m.s.slots[i] * m.dim, m.dim, m.s.shares[i])


# ----------------------------------------------------------------------------
# Trace: at each point of a pass the buffers still hold what the stages before it computed

cdef void probe(Network *m, Worker *worker, const Pass *p, Py_ssize_t l, Point point) noexcept nogil:
    """A stage that copies the activations a trace wants at this point of layer l; none without a trace."""
    cdef Py_ssize_t row
    if not m.trace.on:
        return
    row = stage(worker, p.n_wanted if point == NORMED else p.n)
    while take(worker, &row):
        if point == EMBEDDED:
            copy_row(m, l, EMBEDDING, row, m.s.x, m.dim)
        elif point == PROJECTED:
            copy_row(m, l, ATTENTION_NORM, row, m.s.xb, m.dim)
            copy_projections(m, l, row)
        elif point == ATTENDED:
            copy_row(m, l, HEADS, row, m.s.xb, m.q_dim)
            copy_row(m, l, O, row, m.s.y, m.dim)
        elif point == FED_FORWARD:
            copy_row(m, l, FFN_NORM, row, m.s.xb, m.dim)
            copy_row(m, l, GATE_UP, row, m.s.h, 2 * m.hidden_dim)
            copy_row(m, l, HIDDEN, row, m.s.hb, m.hidden_dim)
            copy_row(m, l, DOWN, row, m.s.y, m.dim)
            copy_row(m, l, EXPERTS, row, m.s.y, m.dim)
            if m.weights.layers[l].router != NULL:
                copy_choices(m, l, row)
        elif point == LAYER_DONE:
            copy_row(m, l, X, row, m.s.x, m.dim)
        else:
            copy_row(m, l, FINAL_NORM, row, m.s.xb, m.dim)


cdef float *traced(Network *m, Py_ssize_t l, Array which, Py_ssize_t row, Py_ssize_t columns) noexcept nogil:
    """Where a trace keeps row `row` of the pass in an array of `columns` columns; NULL if it does not."""
    cdef float *array = m.trace.arrays[l * N_ARRAYS + which]
    return array + (m.trace.row + row) * columns if array != NULL else NULL


cdef void copy_row(
    Network *m, Py_ssize_t l, Array which, Py_ssize_t row, const float *buffer, Py_ssize_t columns
) noexcept nogil:
    cdef float *to = traced(m, l, which, row, columns)
    if to != NULL:
        memcpy(to, buffer + row * columns, columns * sizeof(float))


cdef void copy_projections(Network *m, Py_ssize_t l, Py_ssize_t row) noexcept nogil:
    """q, k, v with their biases, q and k normed per head: what rotate_head will do in place."""
    cdef const Layer *layer = &m.weights.layers[l]
    cdef Py_ssize_t columns = m.q_dim + 2 * m.kv_dim
    cdef float *to = traced(m, l, QKV, row, columns)
    copy_row(m, l, QKV, row, m.s.qkv, columns)
    if to != NULL and layer.qkv_bias:
        kernels.add(to, layer.qkv_bias, columns)
    copy_normed(m, row, 0, layer.q_norm, traced(m, l, Q_NORM, row, m.q_dim), m.n_heads)
    copy_normed(m, row, m.q_dim, layer.k_norm, traced(m, l, K_NORM, row, m.kv_dim), m.n_kv_heads)


cdef void copy_normed(
    Network *m, Py_ssize_t row, Py_ssize_t column, const float *weight, float *to, Py_ssize_t heads
) noexcept nogil:
    """`to` (heads, head_dim), if wanted, = the heads of s.qkv from `column` on, normed."""
    cdef Py_ssize_t h
    cdef const float *x = m.s.qkv + row * (m.q_dim + 2 * m.kv_dim) + column
    if to != NULL:
        for h in range(heads):
            kernels.rmsnorm(to + h * m.head_dim, x + h * m.head_dim, weight, m.head_dim, m.eps)


cdef void copy_choices(Network *m, Py_ssize_t l, Py_ssize_t row) noexcept nogil:
    """Copy what the experts did. The router's logits are computed again: their buffer now holds their exp."""
    cdef Py_ssize_t i, slot, k = m.n_experts_per_token, wide = m.expert_hidden_dim
    cdef float *logits = traced(m, l, ROUTER, row, m.n_experts)
    cdef float *shares = traced(m, l, SHARES, row, m.n_experts)
    cdef float *gate_up = traced(m, l, EXPERT_GATE_UP, row, k * 2 * wide)
    cdef float *hidden = traced(m, l, EXPERT_HIDDEN, row, k * wide)
    cdef float *down = traced(m, l, EXPERT_DOWN, row, k * m.dim)
    if logits != NULL:
        kernels.matvec(logits, m.s.xb + row * m.dim, m.weights.layers[l].router, m.n_experts, m.dim)
    for i in range(k):
        slot = m.s.slots[row * k + i]
        if shares != NULL:
            shares[m.s.chosen[row * k + i]] = m.s.shares[row * k + i]
        if gate_up != NULL:
            memcpy(gate_up + i * 2 * wide, m.s.h + slot * 2 * wide, 2 * wide * sizeof(float))
        if hidden != NULL:
            memcpy(hidden + i * wide, m.s.hb + slot * wide, wide * sizeof(float))
        if down != NULL:
            memcpy(down + i * m.dim, m.s.xs + slot * m.dim, m.dim * sizeof(float))


# ----------------------------------------------------------------------------
# Run state

cdef void *place(char *memory, size_t *used, size_t n) noexcept:
    """Take n values of 4 bytes, 64-byte aligned, from `memory` behind `used` bytes; NULL if it is NULL."""
    cdef size_t start = used[0]
    used[0] = (start + max(n, 1) * 4 + 63) // 64 * 64
    return memory + start if memory != NULL else NULL


cdef size_t lay_out(Network *m, Py_ssize_t rows, char *memory) noexcept:
    """Place the buffers for passes of `rows` rows in `memory`, if not NULL; returns their size in bytes."""
    cdef RunState *s = &m.s
    cdef size_t used = 0
    cdef Py_ssize_t k = m.n_experts_per_token, hidden = max(m.hidden_dim, k * m.expert_hidden_dim)
    cdef Py_ssize_t widest = max(max(m.dim, m.q_dim), max(hidden, k * m.dim)), half = m.head_dim // 2
    s.x = <float *>place(memory, &used, rows * m.dim)
    s.xb = <float *>place(memory, &used, rows * max(m.dim, m.q_dim))
    s.qkv = <float *>place(memory, &used, rows * (m.q_dim + 2 * m.kv_dim))
    s.y = <float *>place(memory, &used, rows * m.dim)
    s.h = <float *>place(memory, &used, rows * 2 * hidden)
    s.hb = <float *>place(memory, &used, rows * hidden)
    s.scores = <float *>place(memory, &used, rows * m.n_experts)
    s.shares = <float *>place(memory, &used, rows * k)
    s.chosen = <int32_t *>place(memory, &used, rows * k)
    s.slots = <int32_t *>place(memory, &used, rows * k)
    s.choices = <int32_t *>place(memory, &used, rows * k)
    s.xs = <float *>place(memory, &used, rows * k * m.dim)
    s.groups = <Group *>place(memory, &used, m.n_experts * sizeof(Group) // 4)
    s.cosine = <float *>place(memory, &used, rows * half)
    s.sine = <float *>place(memory, &used, rows * half)
    s.xq.codes = <int8_t *>place(memory, &used, ceil_div(rows * widest, 4))
    s.xq.scales = <float *>place(memory, &used, rows * widest // m.group_size)
    s.xq.sums = <int32_t *>place(memory, &used, rows * widest // m.group_size)
    s.scratch = <float *>place(memory, &used, m.threads * ATTENTION_SCRATCH(m.head_dim))
    s.memory, s.capacity = memory, rows
    return used
