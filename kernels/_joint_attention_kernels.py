# ruff: noqa: RUF005 (Triton has no unpacking of tuples)
"""Triton kernels of `joint_attention`: the long forms of `qknorm_attention`, over two matrices of rows, text and image.

A program owns a block of rows of one of the two, `_own` says of which. What belongs to a stream is chosen by that once,
and the loops run over the text's rows and then over the image's. Where both lie in one array, `image` is None and
begins behind the text's L rows. Arrays between the launches have the text's heads first, then the image's:

    prepared    k' and, in the backward pass, q': [1 or 2, B * H * (L + N), D]
    lse, delta  [B * H * (L + N)]
    dweight     a row for each block, [blocks, D]

L, N: tokens of text and image; TOGETHER: results of both lie in one array. Other names as in `qknorm_attention`.
"""

from ._qknorm_attention_blocks import _attend_all, _dkv_all, _dq_all, _dq_rows, _store_dkv, _store_dq
from ._qknorm_attention_tiles import (
    _dense,
    _kept,
    _load,
    _matrix,
    _no_keys,
    _packed,
    _prepare,
    _store,
    _store_attended,
    _zeros,
)
from ._triton import tl, triton


@triton.jit
def _own(L, N, BLOCK: tl.constexpr):
    """(whether of the text, (batch, head), the number of these, first row, row of dweight) of the program's block."""
    of_text, of_image = tl.cdiv(L, BLOCK), tl.cdiv(N, BLOCK)
    blocks = of_text + of_image
    program, block, programs = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.num_programs(0) // blocks
    is_text = block < of_text
    first = tl.where(is_text, block, block - of_text)
    row = first + tl.where(is_text, program * of_text, programs * of_text + program * of_image)
    return is_text, program, programs, first * BLOCK, row


@triton.jit
def _chosen(is_text, text, image):
    """Of two tuples of the same make, that of the text or that of the image.

    torch looks for what a kernel writes, and takes all that a call is given for written where one of its results is. So
    numbers, what is read and what is written are chosen by calls of their own; else the compiler would copy the inputs.
    """
    found = ()
    for i in tl.static_range(len(text)):
        found = found + (tl.where(is_text, text[i], image[i]),)  # type: ignore[assignment]  # unrolled
    return found


@triton.jit
def _image_of(text, image, rows):
    """Where the image begins: in its own array, or `rows` elements behind the text in the same one."""
    return text + rows if image is None else image


@triton.jit
def _held(L, N, TOGETHER: tl.constexpr):
    """Rows that the arrays of text and image hold for each of the batch."""
    return (L + N, L + N) if TOGETHER else (L, N)


@triton.jit
def _length(lengths, batch, L):
    """Text tokens that are looked at."""
    return L if lengths is None else tl.minimum(tl.load(lengths + batch).to(tl.int32), L)


@triton.jit
def _joint_prepare_kernel(
    text, image, text_q, text_k, image_q, image_k, cos, sin, prepared,
    L, N, H, text_b, text_n, text_3, text_h, image_b, image_n, image_3, image_h, eps, factor,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First launch: k' and, for the second row of programs, q' of all heads."""
    is_text, program, programs, first, _ = _own(L, N, BLOCK)
    image = _image_of(text, image, L * text_n)
    text_strides, image_strides = (text_b, text_n, text_3, text_h), (image_b, image_n, image_3, image_h)
    before, rows, b, n, part, h = _chosen(is_text, (0, L) + text_strides, (L, N) + image_strides)
    qkv, q_weight, k_weight = _chosen(is_text, (text, text_q, text_k), (image, image_q, image_k))
    head = (program, rows, H)
    cos += before * (D // 2)
    sin += before * (D // 2)
    prepared += (programs * before).to(tl.int64) * D
    q_rows, k_rows, _ = _packed(qkv, head, (b, n, part, h), ALIGN)
    if tl.program_id(1) == 0:
        k = _load(k_rows, first, rows, D, MAIN, TAIL, BLOCK)
        k = _prepare(k, first, rows, (k_weight, eps, cos, sin, 1.0), D, 1)
        _store(_dense(prepared, head, D), first, rows, k, D)
    else:
        q = _load(q_rows, first, rows, D, MAIN, TAIL, BLOCK)
        q = _prepare(q, first, rows, (q_weight, eps, cos, sin, factor), D, 1)
        prepared += programs.to(tl.int64) * (L + N) * D
        _store(_dense(prepared, head, D), first, rows, q, D)


@triton.jit
def _joint_forward_kernel(
    text, image, prepared, text_q, image_q, cos, sin, lengths, text_out, image_out, lse,
    L, N, H, text_b, text_n, text_3, text_h, image_b, image_n, image_3, image_h, eps, factor,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    TOGETHER: tl.constexpr, EVEN_L: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head) and block of queries; online softmax over the text's keys, then the image's."""
    is_text, program, programs, first, _ = _own(L, N, BLOCK_Q)
    image, image_out = _image_of(text, image, L * text_n), _image_of(text_out, image_out, L * H * D)
    text_strides, image_strides = (text_b, text_n, text_3, text_h), (image_b, image_n, image_3, image_h)
    text_held, image_held = _held(L, N, TOGETHER)
    before, rows, held, b, n, part, h = _chosen(
        is_text, (0, L, text_held) + text_strides, (L, N, image_held) + image_strides
    )  # fmt: skip
    qkv, q_weight = _chosen(is_text, (text, text_q), (image, image_q))
    out = tl.where(is_text, text_out, image_out)
    head, text_head, image_head = (program, rows, H), (program, L, H), (program, N, H)
    q_rows, _, _ = _packed(qkv, head, (b, n, part, h), ALIGN)
    q = _load(q_rows, first, rows, D, MAIN, TAIL, BLOCK_Q)
    prologue = (q_weight, eps, cos + before * (D // 2), sin + before * (D // 2), factor)
    q = _prepare(q, first, rows, prologue, D, 1)
    _, _, v_rows = _packed(text, text_head, text_strides, ALIGN)
    keys, length = _dense(prepared, text_head, D), _length(lengths, program // H, L)
    sums = _attend_all(_no_keys(q), q, keys, v_rows, length, D, MAIN, TAIL, PRECISION, EVEN_L, BLOCK_K)
    _, _, v_rows = _packed(image, image_head, image_strides, ALIGN)
    keys = _dense(prepared + (programs * L).to(tl.int64) * D, image_head, D)
    sums = _attend_all(sums, q, keys, v_rows, N, D, MAIN, TAIL, PRECISION, EVEN_N, BLOCK_K)
    _store_attended(sums, _matrix(out, head, (held * H * D, H * D, D), 8), lse + programs * before, head, first, D)


@triton.jit
def _joint_dq_kernel(
    text, image, prepared, text_q, image_q, cos, sin, lengths, text_out, image_out, lse, text_dout, image_dout,
    text_dqkv, image_dqkv, delta, dweight,
    L, N, H, text_b, text_n, text_3, text_h, image_b, image_n, image_3, image_h,
    text_dout_b, text_dout_n, image_dout_b, image_dout_n, eps, factor, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    TOGETHER: tl.constexpr, EVEN_L: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head) and block of queries: dq, and delta for dk and dv."""
    is_text, program, programs, first, block = _own(L, N, BLOCK_Q)
    image, image_dout = _image_of(text, image, L * text_n), _image_of(text_dout, image_dout, L * text_dout_n)
    image_out, image_dqkv = _image_of(text_out, image_out, L * H * D), _image_of(text_dqkv, image_dqkv, 3 * L * H * D)
    text_strides, image_strides = (text_b, text_n, text_3, text_h), (image_b, image_n, image_3, image_h)
    text_held, image_held = _held(L, N, TOGETHER)
    before, rows, held, dout_b, dout_n, b, n, part, h = _chosen(
        is_text,
        (0, L, text_held, text_dout_b, text_dout_n) + text_strides,
        (L, N, image_held, image_dout_b, image_dout_n) + image_strides,
    )
    qkv, q_weight, out, dout = _chosen(
        is_text, (text, text_q, text_out, text_dout), (image, image_q, image_out, image_dout)
    )
    dqkv = tl.where(is_text, text_dqkv, image_dqkv)
    head, text_head, image_head = (program, rows, H), (program, L, H), (program, N, H)
    lse += programs * before
    delta += programs * before
    prologue = (q_weight, eps, cos + before * (D // 2), sin + before * (D // 2), factor)
    inputs, strides = (qkv, out, lse, dout), ((b, n, part, h), (dout_b, dout_n, D))
    own = _dq_rows(first, head, held, inputs, strides, delta, prologue, D, MAIN, TAIL, 1, ALIGN, BLOCK_Q)
    _, _, v_rows = _packed(text, text_head, text_strides, ALIGN)
    keys, length = _dense(prepared, text_head, D), _length(lengths, program // H, L)
    dq = _dq_all(_zeros(own[0]), own, keys, v_rows, length, D, MAIN, TAIL, PRECISION, EVEN_L, BLOCK_K)
    _, _, v_rows = _packed(image, image_head, image_strides, ALIGN)
    keys = _dense(prepared + (programs * L).to(tl.int64) * D, image_head, D)
    dq = _dq_all(dq, own, keys, v_rows, N, D, MAIN, TAIL, PRECISION, EVEN_N, BLOCK_K)
    q_rows, _, _ = _packed(qkv, head, (b, n, part, h), ALIGN)
    _store_dq(dq, first, block, head, held, q_rows, dqkv, dweight, prologue, scale, D, MAIN, TAIL, 1, BLOCK_Q)


@triton.jit
def _joint_dkv_kernel(
    text, image, prepared, text_k, image_k, cos, sin, lengths, lse, text_dout, image_dout,
    text_dqkv, image_dqkv, delta, dweight,
    L, N, H, text_b, text_n, text_3, text_h, image_b, image_n, image_3, image_h,
    text_dout_b, text_dout_n, image_dout_b, image_dout_n, eps, factor, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    TOGETHER: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head) and block of keys: dk and dv, zeros where nobody looks."""
    is_text, program, programs, first, block = _own(L, N, BLOCK_K)
    image, image_dout = _image_of(text, image, L * text_n), _image_of(text_dout, image_dout, L * text_dout_n)
    image_dqkv = _image_of(text_dqkv, image_dqkv, 3 * L * H * D)
    text_strides, image_strides = (text_b, text_n, text_3, text_h), (image_b, image_n, image_3, image_h)
    text_held, image_held = _held(L, N, TOGETHER)
    length = _length(lengths, program // H, L)
    before, rows, held, b, n, part, h = _chosen(
        is_text, (0, L, text_held) + text_strides, (L, N, image_held) + image_strides
    )  # fmt: skip
    end, qkv, k_weight = _chosen(is_text, (length, text, text_k), (N, image, image_k))
    dqkv = tl.where(is_text, text_dqkv, image_dqkv)
    head, text_head, image_head = (program, rows, H), (program, L, H), (program, N, H)
    prologue = (k_weight, eps, cos + before * (D // 2), sin + before * (D // 2), 1.0)
    _, k_rows, v_rows = _packed(qkv, head, (b, n, part, h), ALIGN)
    k = _load(k_rows, first, end, D, MAIN, TAIL, BLOCK_K)
    k = _prepare(k, first, rows, prologue, D, 1)
    v = _load(v_rows, first, end, D, MAIN, TAIL, BLOCK_K)
    text_end, image_end = L, N
    if lengths is not None:  # a block that nobody looks at has no queries
        text_end, image_end = tl.where(first < end, L, 0), tl.where(first < end, N, 0)
    prepared += programs.to(tl.int64) * (L + N) * D
    queries = _dense(prepared, text_head, D)
    do_rows = _matrix(text_dout, text_head, (text_dout_b, text_dout_n, D), ALIGN)
    sums = _dkv_all(
        (_zeros(k), _zeros(v)), k, v, queries, do_rows, text_head, text_end, lse, delta,
        D, MAIN, TAIL, PRECISION, BLOCK_Q,
    )  # fmt: skip
    do_rows = _matrix(image_dout, image_head, (image_dout_b, image_dout_n, D), ALIGN)
    queries = _dense(prepared + (programs * L).to(tl.int64) * D, image_head, D)
    lse += programs * L
    delta += programs * L
    dk, dv = _dkv_all(
        sums, k, v, queries, do_rows, image_head, image_end, lse, delta, D, MAIN, TAIL, PRECISION, BLOCK_Q
    )  # fmt: skip
    if lengths is not None:
        dk, dv = _kept(dk, first, end), _kept(dv, first, end)
    sums, scale = (dk, dv), scale / factor
    _store_dkv(sums, first, block, head, held, k_rows, dqkv, dweight, prologue, scale, D, MAIN, TAIL, 1, BLOCK_K)
