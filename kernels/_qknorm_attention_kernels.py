# ruff: noqa: RUF005 (Triton has no unpacking of tuples)
"""Triton kernels of `qknorm_attention`: row tiles in two parts, the prologue and its adjoint, short and long forms.

A tile of rows [R, D] is a pair (main, tail): `main` has the largest power of two of columns that fits in D, `tail` the
rest, padded with zeros to a power of two of at least 16, the least depth of a tensor-core instruction. With TAIL == 0
there is no tail, and the second member is a name for the first that nothing uses. Every product runs over both parts.

Below, q' and k' are prepared rows rope(rms_norm(.)); q' carries the softmax scale and log2(e), so that
p = exp2(q' k'^T - lse), where lse is the base-2 logarithm of the denominators. Rows past N are read as zeros, which
takes them out of every product; only the probabilities of keys past N are masked, since exp2(0 - lse) may overflow.
"""

from ._triton import tl, triton


@triton.jit
def _head(program, stride_batch, stride_head, H, ALIGN: tl.constexpr):
    """Offset of a (batch, head); ALIGN divides every stride, which the compiler has to know for 16-byte loads."""
    offset = (program // H).to(tl.int64) * stride_batch + (program % H).to(tl.int64) * stride_head
    return tl.multiple_of(offset, [ALIGN])


@triton.jit
def _tail_column(MAIN: tl.constexpr, TAIL: tl.constexpr, BYTES: tl.constexpr):
    """Columns of the tail, to be moved in pieces of which every thread gets one where it gets 16 bytes of main's row.

    A thread then holds parts of the same rows of main and tail. With 16-byte pieces it would not, and whatever is the
    same for a row (its norm, its softmax denominator) would go through shared memory.
    """
    return tl.max_contiguous(tl.arange(0, TAIL), [16 // BYTES * TAIL // MAIN])[None, :]


@triton.jit
def _load(base, stride, start, N, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr):
    """Rows start to start + ROWS of a matrix [N, D] as (main, tail)."""
    row = start + tl.arange(0, ROWS)[:, None]
    source = base + row.to(tl.int64) * stride
    if TAIL:
        column = _tail_column(MAIN, TAIL, base.dtype.element_ty.primitive_bitwidth // 8)
        tail = tl.load(source + MAIN + column, mask=(row < N) & (column < D - MAIN), other=0.0)
    column = tl.arange(0, MAIN)[None, :]
    main = tl.load(source + column, mask=(row < N) & (column < D), other=0.0)
    return main, tail if TAIL else main


@triton.jit
def _store(base, stride, start, N, tile, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr):
    """Write the rows of a tile that lie below N."""
    row = start + tl.arange(0, ROWS)[:, None]
    target = base + row.to(tl.int64) * stride
    column = tl.arange(0, MAIN)[None, :]
    tl.store(target + column, tile[0].to(base.dtype.element_ty), mask=(row < N) & (column < D))
    if TAIL:
        column = _tail_column(MAIN, TAIL, base.dtype.element_ty.primitive_bitwidth // 8)
        inside = (row < N) & (column < D - MAIN)
        tl.store(target + MAIN + column, tile[1].to(base.dtype.element_ty), mask=inside)


@triton.jit
def _vector(base, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """A vector [D] as fp32 rows (main [1, MAIN], tail [1, TAIL])."""
    if TAIL:
        column = tl.arange(0, TAIL)[None, :]
        tail = tl.load(base + MAIN + column, mask=column < D - MAIN, other=0.0).to(tl.float32)
    column = tl.arange(0, MAIN)[None, :]
    main = tl.load(base + column, mask=column < D, other=0.0).to(tl.float32)
    return main, tail if TAIL else main


@triton.jit
def _product(a, b, total, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over the columns of both parts."""
    if TAIL:
        total = tl.dot(a[1], tl.trans(b[1]), total, input_precision=PRECISION)
    return tl.dot(a[0], tl.trans(b[0]), total, input_precision=PRECISION)


@triton.jit
def _accumulate(total, a, b, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b for a matrix a and a pair b."""
    main = tl.dot(a, b[0], total[0], input_precision=PRECISION)
    tail = total[1]
    if TAIL:
        tail = tl.dot(a, b[1], total[1], input_precision=PRECISION)
    return main, tail


@triton.jit
def _zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    main = tl.zeros([ROWS, MAIN], tl.float32)
    tail = main
    if TAIL:
        tail = tl.zeros([ROWS, TAIL], tl.float32)
    return main, tail


@triton.jit
def _row_sum(a, b, TAIL: tl.constexpr):
    """sum over both parts of a * b in fp32, [R, 1]."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), axis=1)
    if TAIL:
        total += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), axis=1)
    return total[:, None]


@triton.jit
def _turn(
    x, cos, sin, start, N, FIRST: tl.constexpr, PAIRS: tl.constexpr, PIECE: tl.constexpr, ROPE: tl.constexpr,
    SIGN: tl.constexpr,
):  # fmt: skip
    """Rotate neighbouring columns of x [R, C] by the angles of their pairs, backwards for SIGN = -1.

    FIRST: the pair that belongs to column 0. ROPE: columns of the tables for each pair. The two channels of a pair sit
    in one thread, so that nothing moves between threads.
    """
    row = start + tl.arange(0, x.shape[0])[:, None]
    pair = FIRST + tl.max_contiguous(tl.arange(0, x.shape[1] // 2), [PIECE])[None, :]
    offset = row * (PAIRS * ROPE) + pair * ROPE
    inside = (row < N) & (pair < PAIRS)
    c = tl.load(cos + offset, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + offset, mask=inside, other=0.0).to(tl.float32) * SIGN
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (x.shape[0], x.shape[1]))


@triton.jit
def _prepare(
    tile, weight, cos, sin, start, N, eps, factor,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """factor * rope(rms_norm(rows) * weight), rounded to the rows' type.

    The branch skips rows that are all padding. It is there for the compiler: it keeps the choice of layouts for the
    rotation apart from that for the products, without which half of the tile would change threads, and for sm_80 the
    products' operands would be laid out for 8-bit numbers (Triton takes the join of pairs for an unpacking).
    """
    main, tail = tile[0].to(tl.float32) * factor, tile[1].to(tl.float32) * factor
    if NORM:
        scale = tl.rsqrt(_row_sum(tile, tile, TAIL) / D + eps)
        w = _vector(weight, D, MAIN, TAIL)
        main, tail = main * scale * w[0], tail * scale * w[1]
    if ROPE:
        if start < N:
            if TAIL:
                tail = _turn(tail, cos, sin, start, N, MAIN // 2, D // 2, 4 * TAIL // MAIN, ROPE, 1)
            main = _turn(main, cos, sin, start, N, 0, D // 2, 4, ROPE, 1)
    return main.to(tile[0].dtype), tail.to(tile[0].dtype)


@triton.jit
def _unprepare(
    gradient, tile, weight, cos, sin, start, N, eps, factor,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """factor * gradient of prepared rows -> that of the rows as read (`tile`), and the weight's summed over rows."""
    main, tail = gradient[0] * factor, gradient[1] * factor
    if ROPE:
        if TAIL:
            tail = _turn(tail, cos, sin, start, N, MAIN // 2, D // 2, 4 * TAIL // MAIN, ROPE, -1)
        main = _turn(main, cos, sin, start, N, 0, D // 2, 4, ROPE, -1)
    dweight = (tl.zeros([MAIN], tl.float32), tl.zeros([TAIL if TAIL else MAIN], tl.float32))
    if NORM:
        scale = tl.rsqrt(_row_sum(tile, tile, TAIL) / D + eps)
        normed = (tile[0].to(tl.float32) * scale, tile[1].to(tl.float32) * scale)
        dweight = (tl.sum(main * normed[0], axis=0), tl.sum(tail * normed[1], axis=0))
        w = _vector(weight, D, MAIN, TAIL)
        main, tail = main * w[0], tail * w[1]
        mean = _row_sum((main, tail), normed, TAIL) / D
        main, tail = (main - normed[0] * mean) * scale, (tail - normed[1] * mean) * scale
    return (main, tail), dweight


@triton.jit
def _attend(
    o, top, total, q, k, v, start, N,
    TAIL: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax: (o, top, total) are its sums so far, relative to the maximum `top`."""
    s = _product(q, k, tl.zeros([BLOCK_Q, BLOCK_K], tl.float32), TAIL, PRECISION)
    if not EVEN:
        s = tl.where(start + tl.arange(0, BLOCK_K)[None, :] < N, s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, axis=1))
    shrink = tl.exp2(top - higher)
    p = tl.exp2(s - higher[:, None])
    o = (o[0] * shrink[:, None], o[1] * shrink[:, None])
    return _accumulate(o, p.to(v[0].dtype), v, TAIL, PRECISION), higher, total * shrink + tl.sum(p, axis=1)


@triton.jit
def _step_dq(
    dq, q, k, v, do, log, delta, start, N,
    TAIL: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq' of a block of queries plus what a block of keys adds to it, without the scale."""
    s = _product(q, k, tl.zeros([BLOCK_Q, BLOCK_K], tl.float32), TAIL, PRECISION)
    dp = _product(do, v, tl.zeros([BLOCK_Q, BLOCK_K], tl.float32), TAIL, PRECISION)
    ds = tl.exp2(s - log) * (dp - delta)
    if not EVEN:
        ds = tl.where(start + tl.arange(0, BLOCK_K)[None, :] < N, ds, 0.0)
    return _accumulate(dq, ds.to(v[0].dtype), k, TAIL, PRECISION)


@triton.jit
def _step_dkv(
    dk, dv, k, v, q, do, log, delta,
    TAIL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """dk' and dv of a block of keys plus what a block of queries adds to them, dk' without the scale.

    The scores come out transposed, [keys, queries], as the left operands that they are next.
    """
    p = tl.exp2(_product(k, q, tl.zeros([BLOCK_K, BLOCK_Q], tl.float32), TAIL, PRECISION) - log)
    dv = _accumulate(dv, p.to(v[0].dtype), do, TAIL, PRECISION)
    dp = _product(v, do, tl.zeros([BLOCK_K, BLOCK_Q], tl.float32), TAIL, PRECISION)
    return _accumulate(dk, (p * (dp - delta)).to(v[0].dtype), q, TAIL, PRECISION), dv


@triton.jit
def _store_partial(partial, program, dweight, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Row `program` of the partial sums [programs, D] of a weight's gradient."""
    target = partial + program.to(tl.int64) * D
    column = tl.arange(0, MAIN)
    tl.store(target + column, dweight[0], mask=column < D)
    if TAIL:
        column = tl.arange(0, TAIL)
        tl.store(target + MAIN + column, dweight[1], mask=column < D - MAIN)


@triton.jit
def _short_forward_kernel(
    qkv, q_weight, k_weight, cos, sin, out, lse,
    N, H, stride_b, stride_n, stride_3, stride_h, eps, factor,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head), N <= BLOCKS * BLOCK_K: k' and v are prepared once and stay on the chip."""
    program = tl.program_id(0)
    source = qkv + _head(program, stride_b, stride_h, H, ALIGN)
    target = out + _head(program, N * H * D, D, H, 8)
    k_all, v_all = (), ()
    for i in tl.static_range(BLOCKS):
        k = _load(source + stride_3, stride_n, i * BLOCK_K, N, D, MAIN, TAIL, BLOCK_K)
        k = _prepare(k, k_weight, cos, sin, i * BLOCK_K, N, eps, 1.0, D, MAIN, TAIL, NORM, ROPE)
        v = _load(source + 2 * stride_3, stride_n, i * BLOCK_K, N, D, MAIN, TAIL, BLOCK_K)
        k_all, v_all = k_all + (k,), v_all + (v,)
    for start in range(0, N, BLOCK_Q):
        q = _load(source, stride_n, start, N, D, MAIN, TAIL, BLOCK_Q)
        q = _prepare(q, q_weight, cos, sin, start, N, eps, factor, D, MAIN, TAIL, NORM, ROPE)
        top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        o = _zeros(BLOCK_Q, MAIN, TAIL)
        for i in tl.static_range(BLOCKS):
            o, top, total = _attend(
                o, top, total, q, k_all[i], v_all[i], i * BLOCK_K, N, TAIL, PRECISION, EVEN, BLOCK_Q, BLOCK_K
            )
        share = (1 / total)[:, None]
        o = (o[0] * share, o[1] * share)
        _store(target, H * D, start, N, o, D, MAIN, TAIL, BLOCK_Q)
        row = start + tl.arange(0, BLOCK_Q)
        tl.store(lse + program.to(tl.int64) * N + row, top + tl.log2(total), mask=row < N)


@triton.jit
def _prepare_kernel(
    qkv, q_weight, k_weight, cos, sin, prepared,
    N, H, stride_b, stride_n, stride_3, stride_h, eps, factor,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Long form, first launch: prepared [1 or 2, B, H, N, D] = k' and, in the backward pass, q' of all heads."""
    program = tl.program_id(0) // tl.cdiv(N, BLOCK)
    start = tl.program_id(0) % tl.cdiv(N, BLOCK) * BLOCK
    source = qkv + _head(program, stride_b, stride_h, H, ALIGN)
    target = prepared + program.to(tl.int64) * N * D
    if tl.program_id(1) == 0:
        k = _load(source + stride_3, stride_n, start, N, D, MAIN, TAIL, BLOCK)
        k = _prepare(k, k_weight, cos, sin, start, N, eps, 1.0, D, MAIN, TAIL, NORM, ROPE)
        _store(target, D, start, N, k, D, MAIN, TAIL, BLOCK)
    else:
        q = _load(source, stride_n, start, N, D, MAIN, TAIL, BLOCK)
        q = _prepare(q, q_weight, cos, sin, start, N, eps, factor, D, MAIN, TAIL, NORM, ROPE)
        target += tl.num_programs(0) // tl.cdiv(N, BLOCK) * N.to(tl.int64) * D
        _store(target, D, start, N, q, D, MAIN, TAIL, BLOCK)


@triton.jit
def _long_forward_kernel(
    qkv, prepared, q_weight, cos, sin, out, lse,
    N, H, stride_b, stride_n, stride_3, stride_h, eps, factor,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head) and block of queries; online softmax over blocks of prepared keys."""
    program = tl.program_id(0) // tl.cdiv(N, BLOCK_Q)
    first = tl.program_id(0) % tl.cdiv(N, BLOCK_Q) * BLOCK_Q
    source = qkv + _head(program, stride_b, stride_h, H, ALIGN)
    keys = prepared + program.to(tl.int64) * N * D
    q = _load(source, stride_n, first, N, D, MAIN, TAIL, BLOCK_Q)
    q = _prepare(q, q_weight, cos, sin, first, N, eps, factor, D, MAIN, TAIL, NORM, ROPE)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    o = _zeros(BLOCK_Q, MAIN, TAIL)
    for start in range(0, N, BLOCK_K):
        k = _load(keys, D, start, N, D, MAIN, TAIL, BLOCK_K)
        v = _load(source + 2 * stride_3, stride_n, start, N, D, MAIN, TAIL, BLOCK_K)
        o, top, total = _attend(o, top, total, q, k, v, start, N, TAIL, PRECISION, EVEN, BLOCK_Q, BLOCK_K)
    share = (1 / total)[:, None]
    o = (o[0] * share, o[1] * share)
    _store(out + _head(program, N * H * D, D, H, 8), H * D, first, N, o, D, MAIN, TAIL, BLOCK_Q)
    row = first + tl.arange(0, BLOCK_Q)
    tl.store(lse + program.to(tl.int64) * N + row, top + tl.log2(total), mask=row < N)


@triton.jit
def _dq_block(
    program, first, partial, qkv, prepared, q_weight, cos, sin, out, lse, dout, dqkv, delta, dweight,
    N, H, stride_b, stride_n, stride_3, stride_h, dout_b, dout_n, eps, factor, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq of the block of queries at `first` of a (batch, head), and delta = rowsum(out * dout) for `_dkv_block`.

    `partial` is the row of dweight [.., D] that takes the block's share of the weight's gradient.
    """
    source = qkv + _head(program, stride_b, stride_h, H, ALIGN)
    keys = prepared + program.to(tl.int64) * N * D
    q = _load(source, stride_n, first, N, D, MAIN, TAIL, BLOCK_Q)
    q = _prepare(q, q_weight, cos, sin, first, N, eps, factor, D, MAIN, TAIL, NORM, ROPE)
    do = _load(dout + _head(program, dout_b, D, H, ALIGN), dout_n, first, N, D, MAIN, TAIL, BLOCK_Q)
    o = _load(out + _head(program, N * H * D, D, H, 8), H * D, first, N, D, MAIN, TAIL, BLOCK_Q)
    row = first + tl.arange(0, BLOCK_Q)[:, None]
    per_row = program.to(tl.int64) * N + row
    log = tl.load(lse + per_row, mask=row < N, other=0.0)
    sums = _row_sum(o, do, TAIL)
    tl.store(delta + per_row, sums, mask=row < N)
    dq = _zeros(BLOCK_Q, MAIN, TAIL)
    for start in range(0, N, BLOCK_K):
        k = _load(keys, D, start, N, D, MAIN, TAIL, BLOCK_K)
        v = _load(source + 2 * stride_3, stride_n, start, N, D, MAIN, TAIL, BLOCK_K)
        dq = _step_dq(dq, q, k, v, do, log, sums, start, N, TAIL, PRECISION, EVEN, BLOCK_Q, BLOCK_K)
    q = _load(source, stride_n, first, N, D, MAIN, TAIL, BLOCK_Q)
    dq, dweight_block = _unprepare(dq, q, q_weight, cos, sin, first, N, eps, scale, D, MAIN, TAIL, NORM, ROPE)
    _store(dqkv + _head(program, 3 * N * H * D, D, H, 8), 3 * H * D, first, N, dq, D, MAIN, TAIL, BLOCK_Q)
    if NORM:
        _store_partial(dweight, partial, dweight_block, D, MAIN, TAIL)


@triton.jit
def _dkv_block(
    program, programs, first, partial, qkv, prepared, k_weight, cos, sin, lse, dout, dqkv, delta, dweight,
    N, H, stride_b, stride_n, stride_3, stride_h, dout_b, dout_n, eps, factor, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv of the block of keys at `first` of one of `programs` (batch, head)s, over blocks of queries."""
    source = qkv + _head(program, stride_b, stride_h, H, ALIGN)
    upstream = dout + _head(program, dout_b, D, H, ALIGN)
    queries = prepared + (programs + program).to(tl.int64) * N * D
    k = _load(source + stride_3, stride_n, first, N, D, MAIN, TAIL, BLOCK_K)
    k = _prepare(k, k_weight, cos, sin, first, N, eps, 1.0, D, MAIN, TAIL, NORM, ROPE)
    v = _load(source + 2 * stride_3, stride_n, first, N, D, MAIN, TAIL, BLOCK_K)
    dk, dv = _zeros(BLOCK_K, MAIN, TAIL), _zeros(BLOCK_K, MAIN, TAIL)
    for start in range(0, N, BLOCK_Q):
        q = _load(queries, D, start, N, D, MAIN, TAIL, BLOCK_Q)
        do = _load(upstream, dout_n, start, N, D, MAIN, TAIL, BLOCK_Q)
        row = start + tl.arange(0, BLOCK_Q)[None, :]
        per_row = program.to(tl.int64) * N + row
        log = tl.load(lse + per_row, mask=row < N, other=0.0)
        sums = tl.load(delta + per_row, mask=row < N, other=0.0)
        dk, dv = _step_dkv(dk, dv, k, v, q, do, log, sums, TAIL, PRECISION, BLOCK_K, BLOCK_Q)
    target = dqkv + _head(program, 3 * N * H * D, D, H, 8)
    _store(target + 2 * H * D, 3 * H * D, first, N, dv, D, MAIN, TAIL, BLOCK_K)
    k = _load(source + stride_3, stride_n, first, N, D, MAIN, TAIL, BLOCK_K)
    dk, dweight_block = _unprepare(dk, k, k_weight, cos, sin, first, N, eps, scale / factor, D, MAIN, TAIL, NORM, ROPE)
    _store(target + H * D, 3 * H * D, first, N, dk, D, MAIN, TAIL, BLOCK_K)
    if NORM:
        _store_partial(dweight, partial, dweight_block, D, MAIN, TAIL)


@triton.jit
def _dq_kernel(
    qkv, prepared, q_weight, cos, sin, out, lse, dout, dqkv, delta, dweight,
    N, H, stride_b, stride_n, stride_3, stride_h, dout_b, dout_n, eps, factor, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Long form: one program per (batch, head) and block of queries."""
    blocks = tl.cdiv(N, BLOCK_Q)
    _dq_block(
        tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_Q, tl.program_id(0),
        qkv, prepared, q_weight, cos, sin, out, lse, dout, dqkv, delta, dweight,
        N, H, stride_b, stride_n, stride_3, stride_h, dout_b, dout_n, eps, factor, scale,
        D, MAIN, TAIL, NORM, ROPE, ALIGN, PRECISION, EVEN, BLOCK_Q, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _dkv_kernel(
    qkv, prepared, k_weight, cos, sin, lse, dout, dqkv, delta, dweight,
    N, H, stride_b, stride_n, stride_3, stride_h, dout_b, dout_n, eps, factor, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Long form: one program per (batch, head) and block of keys."""
    blocks = tl.cdiv(N, BLOCK_K)
    _dkv_block(
        tl.program_id(0) // blocks, tl.num_programs(0) // blocks, tl.program_id(0) % blocks * BLOCK_K, tl.program_id(0),
        qkv, prepared, k_weight, cos, sin, lse, dout, dqkv, delta, dweight,
        N, H, stride_b, stride_n, stride_3, stride_h, dout_b, dout_n, eps, factor, scale,
        D, MAIN, TAIL, NORM, ROPE, ALIGN, PRECISION, BLOCK_Q, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _short_backward_kernel(
    qkv, q_weight, k_weight, cos, sin, prepared, out, lse, dout, dqkv, delta, dq_weight, dk_weight,
    N, H, stride_b, stride_n, stride_3, stride_h, dout_b, dout_n, eps, factor, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
    DQ_Q: tl.constexpr, DQ_K: tl.constexpr, DKV_Q: tl.constexpr, DKV_K: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head): q' and k', then dq, then dk and dv.

    What the phases hand on (q', k', delta) goes through memory, but no further than the multiprocessor's caches: the
    program that wrote it reads it next. A barrier lies between them.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    source = qkv + _head(program, stride_b, stride_h, H, ALIGN)
    target = prepared + program.to(tl.int64) * N * D
    for start in range(0, N, BLOCK):
        k = _load(source + stride_3, stride_n, start, N, D, MAIN, TAIL, BLOCK)
        k = _prepare(k, k_weight, cos, sin, start, N, eps, 1.0, D, MAIN, TAIL, NORM, ROPE)
        _store(target, D, start, N, k, D, MAIN, TAIL, BLOCK)
        q = _load(source, stride_n, start, N, D, MAIN, TAIL, BLOCK)
        q = _prepare(q, q_weight, cos, sin, start, N, eps, factor, D, MAIN, TAIL, NORM, ROPE)
        _store(target + programs.to(tl.int64) * N * D, D, start, N, q, D, MAIN, TAIL, BLOCK)
    tl.debug_barrier()
    for start in range(0, N, DQ_Q):
        _dq_block(
            program, start, program * tl.cdiv(N, DQ_Q) + start // DQ_Q,
            qkv, prepared, q_weight, cos, sin, out, lse, dout, dqkv, delta, dq_weight,
            N, H, stride_b, stride_n, stride_3, stride_h, dout_b, dout_n, eps, factor, scale,
            D, MAIN, TAIL, NORM, ROPE, ALIGN, PRECISION, EVEN, DQ_Q, DQ_K,
        )  # fmt: skip
    tl.debug_barrier()
    for start in range(0, N, DKV_K):
        _dkv_block(
            program, programs, start, program * tl.cdiv(N, DKV_K) + start // DKV_K,
            qkv, prepared, k_weight, cos, sin, lse, dout, dqkv, delta, dk_weight,
            N, H, stride_b, stride_n, stride_3, stride_h, dout_b, dout_n, eps, factor, scale,
            D, MAIN, TAIL, NORM, ROPE, ALIGN, PRECISION, DKV_Q, DKV_K,
        )  # fmt: skip
