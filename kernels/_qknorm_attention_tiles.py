"""Row tiles of `qknorm_attention` in two parts: loads, the prologue and its adjoint, products and their steps.

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
def _prepare_rows(
    source, stride, target, weight, cos, sin, start, N, eps, factor,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows start to start + BLOCK of q or k, prepared, into the dense matrix [N, D] at `target`."""
    tile = _load(source, stride, start, N, D, MAIN, TAIL, BLOCK)
    tile = _prepare(tile, weight, cos, sin, start, N, eps, factor, D, MAIN, TAIL, NORM, ROPE)
    _store(target, D, start, N, tile, D, MAIN, TAIL, BLOCK)
