"""Row tiles of `qknorm_attention` in parts: loads, the prologue and its adjoint, products and their steps.

What belongs together travels as one tuple, is put together in one line and taken apart in one line. Triton's tuples
have no names that torch.compile would carry along (docs/decisions.md), so these have theirs here:

    tile        (main [R, MAIN], tail [R, TAIL]), or (main,) without a tail: rows of a matrix [., D]
    head        (program, N, H): which (batch, head) of how many tokens and heads
    matrix      (base, stride): a matrix [N, D] in memory, `stride` elements from one row to the next
    prologue    (weight, eps, cos, sin, factor): what turns q or k into q' or k'. weight None: no norm; cos None: no
                rotation; factor: log2(e) / sqrt(D) for q, 1 for k
    sums        (o, top, total): online softmax over the keys so far, relative to the largest logit `top` of a row

`main` has the largest power of two of columns that fits in D, `tail` the rest, padded with zeros to a power of two of
at least 16, the least depth of a tensor-core instruction. Every product runs over all parts.

Below, q' and k' are prepared rows rope(rms_norm(.)); q' carries the softmax scale and log2(e), so that
p = exp2(q' k'^T - lse), where lse is the base-2 logarithm of the denominators. Rows past N are read as zeros, which
takes them out of every product; only the probabilities of keys past N are masked, since exp2(0 - lse) may overflow.
"""

from ._triton import tl, triton


@triton.jit
def _matrix(base, head, strides, ALIGN: tl.constexpr):
    """The matrix of a head in an array [B, N, H, D] with strides for its first three dimensions.

    ALIGN divides all of them, which the compiler has to know for 16-byte loads.
    """
    program, _, H = head
    stride_b, stride_n, stride_h = strides
    offset = (program // H).to(tl.int64) * stride_b + (program % H).to(tl.int64) * stride_h
    return base + tl.multiple_of(offset, [ALIGN]), stride_n


@triton.jit
def _packed(base, head, strides, ALIGN: tl.constexpr):
    """The matrices of q, k and v of a head in an array [B, N, 3, H, D] with strides for its first four dimensions."""
    stride_b, stride_n, stride_3, stride_h = strides
    q, stride = _matrix(base, head, (stride_b, stride_n, stride_h), ALIGN)
    return (q, stride), (q + stride_3, stride), (q + 2 * stride_3, stride)


@triton.jit
def _dense(base, head, D: tl.constexpr):
    """The matrix of a head in the dense array [B, H, N, D]."""
    program, N, _ = head
    return base + program.to(tl.int64) * N * D, D


@triton.jit
def _tail_column(MAIN: tl.constexpr, TAIL: tl.constexpr, BYTES: tl.constexpr):
    """Columns of the tail, to be moved in pieces of which every thread gets one where it gets 16 bytes of main's row.

    A thread then holds parts of the same rows of main and tail. With 16-byte pieces it would not, and whatever is the
    same for a row (its norm, its softmax denominator) would go through shared memory.
    """
    return tl.max_contiguous(tl.arange(0, TAIL), [16 // BYTES * TAIL // MAIN])[None, :]


@triton.jit
def _load(matrix, start, N, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr):
    """Rows start to start + ROWS of a matrix as a tile."""
    base, stride = matrix
    row = start + tl.arange(0, ROWS)[:, None]
    source = base + row.to(tl.int64) * stride
    if TAIL:
        column = _tail_column(MAIN, TAIL, base.dtype.element_ty.primitive_bitwidth // 8)
        tail = tl.load(source + MAIN + column, mask=(row < N) & (column < D - MAIN), other=0.0)
    column = tl.arange(0, MAIN)[None, :]
    main = tl.load(source + column, mask=(row < N) & (column < D), other=0.0)
    return (main, tail) if TAIL else (main,)


@triton.jit
def _store(matrix, start, N, tile, D: tl.constexpr):
    """Write the rows of a tile that lie below N."""
    base, stride = matrix
    MAIN: tl.constexpr = tile[0].shape[1]
    row = start + tl.arange(0, tile[0].shape[0])[:, None]
    target = base + row.to(tl.int64) * stride
    column = tl.arange(0, MAIN)[None, :]
    tl.store(target + column, tile[0].to(base.dtype.element_ty), mask=(row < N) & (column < D))
    if len(tile) == 2:
        column = _tail_column(MAIN, tile[1].shape[1], base.dtype.element_ty.primitive_bitwidth // 8)
        inside = (row < N) & (column < D - MAIN)
        tl.store(target + MAIN + column, tile[1].to(base.dtype.element_ty), mask=inside)


@triton.jit
def _vector(base, like, D: tl.constexpr):
    """A vector [D] as an fp32 row in the parts of the tile `like`."""
    MAIN: tl.constexpr = like[0].shape[1]
    if len(like) == 2:
        column = tl.arange(0, like[1].shape[1])[None, :]
        tail = tl.load(base + MAIN + column, mask=column < D - MAIN, other=0.0).to(tl.float32)
    column = tl.arange(0, MAIN)[None, :]
    main = tl.load(base + column, mask=column < D, other=0.0).to(tl.float32)
    return (main, tail) if len(like) == 2 else (main,)


@triton.jit
def _store_vector(target, vector, D: tl.constexpr):
    """Write the parts of a vector [D]; nothing for ()."""
    if len(vector) > 0:
        column = tl.arange(0, vector[0].shape[0])
        tl.store(target + column, vector[0], mask=column < D)
    if len(vector) == 2:
        MAIN: tl.constexpr = vector[0].shape[0]
        column = tl.arange(0, vector[1].shape[0])
        tl.store(target + MAIN + column, vector[1], mask=column < D - MAIN)


@triton.jit
def _zeros(like):
    """A tile of fp32 zeros in the shape of another."""
    main = tl.zeros(like[0].shape, tl.float32)
    return (main, tl.zeros(like[1].shape, tl.float32)) if len(like) == 2 else (main,)


@triton.jit
def _kept(tile, start, N):
    """A tile of rows from `start` on, with zeros from row N on."""
    inside = start + tl.arange(0, tile[0].shape[0])[:, None] < N
    main = tl.where(inside, tile[0], 0.0)
    return (main, tl.where(inside, tile[1], 0.0)) if len(tile) == 2 else (main,)


@triton.jit
def _cast(rows, like):
    """A tile in the number type of another."""
    main = rows[0].to(like[0].dtype)
    return (main, rows[1].to(like[0].dtype)) if len(rows) == 2 else (main,)


@triton.jit
def _scaled(tile, factor):
    """tile * factor in fp32, for a number or a column [R, 1]."""
    main = tile[0].to(tl.float32) * factor
    return (main, tile[1].to(tl.float32) * factor) if len(tile) == 2 else (main,)


@triton.jit
def _times(a, b):
    return (a[0] * b[0], a[1] * b[1]) if len(a) == 2 else (a[0] * b[0],)


@triton.jit
def _minus(a, b):
    return (a[0] - b[0], a[1] - b[1]) if len(a) == 2 else (a[0] - b[0],)


@triton.jit
def _column_sums(tile):
    """The sums [C] over the rows of each part."""
    main = tl.sum(tile[0], axis=0)
    return (main, tl.sum(tile[1], axis=0)) if len(tile) == 2 else (main,)


@triton.jit
def _row_sums(a, b):
    """sum over all parts of a * b in fp32, [R, 1]."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), axis=1)
    if len(a) == 2:
        total += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), axis=1)
    return total[:, None]


@triton.jit
def _transposed(tile):
    """The transposed parts [C, R] of a tile."""
    main = tl.trans(tile[0])
    return (main, tl.trans(tile[1])) if len(tile) == 2 else (main,)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """a b for a tile a and a transposed one b, over the columns of all parts of a."""
    total = tl.zeros([a[0].shape[0], b[0].shape[1]], tl.float32)
    if len(a) == 2:
        total = tl.dot(a[1], b[1], total, input_precision=PRECISION)
    return tl.dot(a[0], b[0], total, input_precision=PRECISION)


@triton.jit
def _accumulate(total, a, b, PRECISION: tl.constexpr):
    """total + a b for a matrix a and tiles total and b."""
    main = tl.dot(a, b[0], total[0], input_precision=PRECISION)
    return (main, tl.dot(a, b[1], total[1], input_precision=PRECISION)) if len(b) == 2 else (main,)


@triton.jit
def _turn(
    x, cos, sin, start, N,
    D: tl.constexpr, FIRST: tl.constexpr, PIECE: tl.constexpr, ROPE: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """Rotate neighbouring columns of x [R, C] by the angles of their pairs, backwards for SIGN = -1.

    FIRST: the pair that belongs to column 0. ROPE: columns of the tables for each pair. The two channels of a pair sit
    in one thread, so that nothing moves between threads.
    """
    row = start + tl.arange(0, x.shape[0])[:, None]
    pair = FIRST + tl.max_contiguous(tl.arange(0, x.shape[1] // 2), [PIECE])[None, :]
    offset = row * (D // 2 * ROPE) + pair * ROPE
    inside = (row < N) & (pair < D // 2)
    c = tl.load(cos + offset, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + offset, mask=inside, other=0.0).to(tl.float32) * SIGN
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (x.shape[0], x.shape[1]))


@triton.jit
def _turned(tile, cos, sin, start, N, D: tl.constexpr, ROPE: tl.constexpr, SIGN: tl.constexpr):
    """The rows of a tile, rotated: see `_turn`."""
    MAIN: tl.constexpr = tile[0].shape[1]
    if len(tile) == 2:
        tail = _turn(tile[1], cos, sin, start, N, D, MAIN // 2, 4 * tile[1].shape[1] // MAIN, ROPE, SIGN)
    main = _turn(tile[0], cos, sin, start, N, D, 0, 4, ROPE, SIGN)
    return (main, tail) if len(tile) == 2 else (main,)


@triton.jit
def _prepare(tile, start, N, prologue, D: tl.constexpr, ROPE: tl.constexpr):
    """factor * rope(rms_norm(rows) * weight), rounded to the rows' type.

    The branch skips rows that are all padding. It is there for the compiler: it keeps the choice of layouts for the
    rotation apart from that for the products, without which half of the tile would change threads, and for sm_80 the
    products' operands would be laid out for 8-bit numbers (Triton takes the join of pairs for an unpacking).
    """
    weight, eps, cos, sin, factor = prologue
    rows = _scaled(tile, factor)
    if weight is not None:
        norm = tl.rsqrt(_row_sums(tile, tile) / D + eps)
        rows = _times(_scaled(rows, norm), _vector(weight, tile, D))
    if cos is not None:
        if start < N:
            rows = _turned(rows, cos, sin, start, N, D, ROPE, 1)
    return _cast(rows, tile)


@triton.jit
def _unprepare(gradient, tile, start, N, prologue, scale, D: tl.constexpr, ROPE: tl.constexpr):
    """scale * gradient of prepared rows -> that of the rows as read (`tile`), and the weight's, summed over the rows.

    () for the latter where there is no weight. `scale` stands in for the prologue's factor.
    """
    weight, eps, cos, sin, _ = prologue
    rows = _scaled(gradient, scale)
    if cos is not None:
        rows = _turned(rows, cos, sin, start, N, D, ROPE, -1)
    dweight = ()
    if weight is not None:
        norm = tl.rsqrt(_row_sums(tile, tile) / D + eps)
        normed = _scaled(tile, norm)
        dweight = _column_sums(_times(rows, normed))
        rows = _times(rows, _vector(weight, tile, D))
        mean = _row_sums(rows, normed) / D
        rows = _scaled(_minus(rows, _scaled(normed, mean)), norm)
    return rows, dweight


@triton.jit
def _no_keys(q):
    """The sums of the online softmax of the queries q before any key."""
    o = _zeros(q)
    return o, tl.full([q[0].shape[0]], float("-inf"), tl.float32), tl.zeros([q[0].shape[0]], tl.float32)


@triton.jit
def _attend(sums, q, k, v, start, N, PRECISION: tl.constexpr, EVEN: tl.constexpr):
    """The sums of the online softmax with the block of keys at `start`; k is transposed."""
    o, top, total = sums
    s = _product(q, k, PRECISION)
    if not EVEN:
        s = tl.where(start + tl.arange(0, k[0].shape[1])[None, :] < N, s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, axis=1))
    shrink = tl.exp2(top - higher)
    p = tl.exp2(s - higher[:, None])
    o = _scaled(o, shrink[:, None])
    return _accumulate(o, p.to(v[0].dtype), v, PRECISION), higher, total * shrink + tl.sum(p, axis=1)


@triton.jit
def _store_attended(sums, out, lse, head, start, D: tl.constexpr):
    """Write the results of a head's block of queries at `start`, whose sums are complete, into the matrix `out`."""
    o, top, total = sums
    program, N, _ = head
    _store(out, start, N, _scaled(o, (1 / total)[:, None]), D)
    row = start + tl.arange(0, o[0].shape[0])
    tl.store(lse + program.to(tl.int64) * N + row, top + tl.log2(total), mask=row < N)


@triton.jit
def _step_dq(dq, q, k, v, do, log, delta, start, N, PRECISION: tl.constexpr, EVEN: tl.constexpr):
    """dq' of a block of queries plus what a block of keys adds to it, without the scale."""
    s = _product(q, _transposed(k), PRECISION)
    dp = _product(do, _transposed(v), PRECISION)
    ds = tl.exp2(s - log) * (dp - delta)
    if not EVEN:
        ds = tl.where(start + tl.arange(0, k[0].shape[0])[None, :] < N, ds, 0.0)
    return _accumulate(dq, ds.to(v[0].dtype), k, PRECISION)


@triton.jit
def _step_dkv(dk, dv, k, v, q, do, log, delta, PRECISION: tl.constexpr):
    """dk' and dv of a block of keys plus what a block of queries adds to them, dk' without the scale.

    The scores come out transposed, [keys, queries], as the left operands that they are next.
    """
    p = tl.exp2(_product(k, _transposed(q), PRECISION) - log)
    dv = _accumulate(dv, p.to(v[0].dtype), do, PRECISION)
    dp = _product(v, _transposed(do), PRECISION)
    return _accumulate(dk, (p * (dp - delta)).to(v[0].dtype), q, PRECISION), dv
