# ruff: noqa: RUF005 (Triton has no unpacking of tuples)
"""Triton kernels of `qknorm_attention`: one program for a whole (batch, head), and the long forms in several launches.

They are launched by keyword, and hand what they were given to the tiles in the groups that `_qknorm_attention_tiles`
names. D, MAIN, TAIL: the width of a head and of its parts; ROPE: columns of the tables for each pair of channels; ALIGN
divides the strides of qkv and dout; EVEN: the keys fill their blocks.
"""

from ._qknorm_attention_blocks import _attend_all, _dkv_all, _dq_all, _dq_rows, _store_dkv, _store_dq
from ._qknorm_attention_tiles import (
    _attend,
    _dense,
    _load,
    _matrix,
    _no_keys,
    _packed,
    _prepare,
    _store,
    _store_attended,
    _transposed,
    _zeros,
)
from ._triton import tl, triton


@triton.jit
def _short_forward_kernel(
    qkv, q_weight, k_weight, cos, sin, out, lse,
    N, H, stride_b, stride_n, stride_3, stride_h, eps, factor,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head), N <= BLOCKS * BLOCK_K: k' and v are prepared once and stay on the chip."""
    head = (tl.program_id(0), N, H)
    q_rows, k_rows, v_rows = _packed(qkv, head, (stride_b, stride_n, stride_3, stride_h), ALIGN)
    k_all, v_all = (), ()
    for i in tl.static_range(BLOCKS):
        k = _load(k_rows, i * BLOCK_K, N, D, MAIN, TAIL, BLOCK_K)
        k = _prepare(k, i * BLOCK_K, N, (k_weight, eps, cos, sin, 1.0), D, ROPE)
        v = _load(v_rows, i * BLOCK_K, N, D, MAIN, TAIL, BLOCK_K)
        k_all, v_all = k_all + (_transposed(k),), v_all + (v,)  # type: ignore[assignment]  # unrolled: each time another tuple
    for start in range(0, N, BLOCK_Q):
        q = _load(q_rows, start, N, D, MAIN, TAIL, BLOCK_Q)
        q = _prepare(q, start, N, (q_weight, eps, cos, sin, factor), D, ROPE)
        sums = _no_keys(q)
        for i in tl.static_range(BLOCKS):
            sums = _attend(sums, q, k_all[i], v_all[i], i * BLOCK_K, N, PRECISION, EVEN)
        _store_attended(sums, _matrix(out, head, (N * H * D, H * D, D), 8), lse, head, start, D)


@triton.jit
def _prepare_kernel(
    qkv, q_weight, k_weight, cos, sin, prepared,
    N, H, stride_b, stride_n, stride_3, stride_h, eps, factor,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Long form, first launch: prepared [1 or 2, B, H, N, D] = k' and, in the backward pass, q' of all heads."""
    blocks = tl.cdiv(N, BLOCK)
    program, programs = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    head, start = (program, N, H), tl.program_id(0) % blocks * BLOCK
    q_rows, k_rows, _ = _packed(qkv, head, (stride_b, stride_n, stride_3, stride_h), ALIGN)
    if tl.program_id(1) == 0:
        k = _load(k_rows, start, N, D, MAIN, TAIL, BLOCK)
        k = _prepare(k, start, N, (k_weight, eps, cos, sin, 1.0), D, ROPE)
        _store(_dense(prepared, head, D), start, N, k, D)
    else:
        q = _load(q_rows, start, N, D, MAIN, TAIL, BLOCK)
        q = _prepare(q, start, N, (q_weight, eps, cos, sin, factor), D, ROPE)
        _store(_dense(prepared, (programs + program, N, H), D), start, N, q, D)


@triton.jit
def _long_forward_kernel(
    qkv, prepared, q_weight, cos, sin, out, lse,
    N, H, stride_b, stride_n, stride_3, stride_h, eps, factor,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head) and block of queries; online softmax over blocks of prepared keys."""
    blocks = tl.cdiv(N, BLOCK_Q)
    head, first = (tl.program_id(0) // blocks, N, H), tl.program_id(0) % blocks * BLOCK_Q
    q_rows, _, v_rows = _packed(qkv, head, (stride_b, stride_n, stride_3, stride_h), ALIGN)
    k_rows = _dense(prepared, head, D)
    q = _load(q_rows, first, N, D, MAIN, TAIL, BLOCK_Q)
    q = _prepare(q, first, N, (q_weight, eps, cos, sin, factor), D, ROPE)
    sums = _attend_all(_no_keys(q), q, k_rows, v_rows, N, D, MAIN, TAIL, PRECISION, EVEN, BLOCK_K)
    _store_attended(sums, _matrix(out, head, (N * H * D, H * D, D), 8), lse, head, first, D)


@triton.jit
def _dq_block(
    first, block, head, inputs, strides, outputs, prologue, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq of the block of queries at `first` of a head, and delta = rowsum(out * dout) for `_dkv_block`.

    `block` is the row of dweight [.., D] that takes the block's share of the weight's gradient.
    """
    _, N, _ = head
    qkv, keys, out, lse, dout = inputs
    qkv_strides, _ = strides
    dqkv, delta, dweight = outputs
    rows = _dq_rows(
        first, head, N, (qkv, out, lse, dout), strides, delta, prologue, D, MAIN, TAIL, ROPE, ALIGN, BLOCK_Q
    )  # fmt: skip
    dq = _zeros(rows[0])
    _, _, v_rows = _packed(qkv, head, qkv_strides, ALIGN)  # not with q's above: up to four registers less
    dq = _dq_all(dq, rows, keys, v_rows, N, D, MAIN, TAIL, PRECISION, EVEN, BLOCK_K)
    q_rows, _, _ = _packed(qkv, head, qkv_strides, ALIGN)
    _store_dq(dq, first, block, head, N, q_rows, dqkv, dweight, prologue, scale, D, MAIN, TAIL, ROPE, BLOCK_Q)


@triton.jit
def _dkv_block(
    first, block, head, inputs, strides, outputs, prologue, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv of the block of keys at `first` of a head, over blocks of queries; `block` as in `_dq_block`."""
    _, N, _ = head
    qkv, queries, lse, dout, delta = inputs
    qkv_strides, dout_strides = strides
    dqkv, dweight = outputs
    _, k_rows, v_rows = _packed(qkv, head, qkv_strides, ALIGN)
    do_rows = _matrix(dout, head, dout_strides, ALIGN)
    k = _load(k_rows, first, N, D, MAIN, TAIL, BLOCK_K)
    k = _prepare(k, first, N, prologue, D, ROPE)
    v = _load(v_rows, first, N, D, MAIN, TAIL, BLOCK_K)
    sums = _zeros(k), _zeros(v)
    sums = _dkv_all(sums, k, v, queries, do_rows, head, N, lse, delta, D, MAIN, TAIL, PRECISION, BLOCK_Q)
    _store_dkv(sums, first, block, head, N, k_rows, dqkv, dweight, prologue, scale, D, MAIN, TAIL, ROPE, BLOCK_K)


@triton.jit
def _dq_kernel(
    qkv, prepared, q_weight, cos, sin, out, lse, dout, dqkv, delta, dweight,
    N, H, stride_b, stride_n, stride_3, stride_h, dout_b, dout_n, eps, factor, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Long form: one program per (batch, head) and block of queries."""
    blocks = tl.cdiv(N, BLOCK_Q)
    block, program = tl.program_id(0), tl.program_id(0) // blocks
    head = (program, N, H)
    inputs, outputs = (qkv, _dense(prepared, head, D), out, lse, dout), (dqkv, delta, dweight)
    strides = ((stride_b, stride_n, stride_3, stride_h), (dout_b, dout_n, D))
    prologue = (q_weight, eps, cos, sin, factor)
    _dq_block(
        block % blocks * BLOCK_Q, block, head, inputs, strides, outputs, prologue, scale,
        D, MAIN, TAIL, ROPE, ALIGN, PRECISION, EVEN, BLOCK_Q, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _dkv_kernel(
    qkv, prepared, k_weight, cos, sin, lse, dout, dqkv, delta, dweight,
    N, H, stride_b, stride_n, stride_3, stride_h, dout_b, dout_n, eps, factor, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Long form: one program per (batch, head) and block of keys."""
    blocks = tl.cdiv(N, BLOCK_K)
    block, program, programs = tl.program_id(0), tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    head, queries = (program, N, H), _dense(prepared, (programs + program, N, H), D)
    inputs, outputs = (qkv, queries, lse, dout, delta), (dqkv, dweight)
    strides = ((stride_b, stride_n, stride_3, stride_h), (dout_b, dout_n, D))
    prologue = (k_weight, eps, cos, sin, 1.0)
    _dkv_block(
        block % blocks * BLOCK_K, block, head, inputs, strides, outputs, prologue, scale / factor,
        D, MAIN, TAIL, ROPE, ALIGN, PRECISION, BLOCK_Q, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _short_backward_kernel(
    qkv, q_weight, k_weight, cos, sin, prepared, out, lse, dout, dqkv, delta, dq_weight, dk_weight,
    N, H, stride_b, stride_n, stride_3, stride_h, dout_b, dout_n, eps, factor, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
    DQ_Q: tl.constexpr, DQ_K: tl.constexpr, DKV_Q: tl.constexpr, DKV_K: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head): q' and k', then dq, then dk and dv.

    What the phases hand on (q', k', delta) goes through memory, and the program that wrote it reads it next: caches
    should serve that. A barrier lies between the phases.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    head = (program, N, H)
    strides = ((stride_b, stride_n, stride_3, stride_h), (dout_b, dout_n, D))
    q_prologue, k_prologue = (q_weight, eps, cos, sin, factor), (k_weight, eps, cos, sin, 1.0)
    q_rows, k_rows, _ = _packed(qkv, head, strides[0], ALIGN)
    keys, queries = _dense(prepared, head, D), _dense(prepared, (programs + program, N, H), D)
    for start in range(0, N, BLOCK):
        k = _load(k_rows, start, N, D, MAIN, TAIL, BLOCK)
        _store(keys, start, N, _prepare(k, start, N, k_prologue, D, ROPE), D)
        q = _load(q_rows, start, N, D, MAIN, TAIL, BLOCK)
        _store(queries, start, N, _prepare(q, start, N, q_prologue, D, ROPE), D)
    tl.debug_barrier()
    inputs, outputs = (qkv, keys, out, lse, dout), (dqkv, delta, dq_weight)
    for start in range(0, N, DQ_Q):
        block = program * tl.cdiv(N, DQ_Q) + start // DQ_Q
        _dq_block(
            start, block, head, inputs, strides, outputs, q_prologue, scale,
            D, MAIN, TAIL, ROPE, ALIGN, PRECISION, EVEN, BLOCK_Q=DQ_Q, BLOCK_K=DQ_K,
        )  # fmt: skip
    tl.debug_barrier()
    k_inputs, k_outputs = (qkv, queries, lse, dout, delta), (dqkv, dk_weight)
    for start in range(0, N, DKV_K):
        block = program * tl.cdiv(N, DKV_K) + start // DKV_K
        _dkv_block(
            start, block, head, k_inputs, strides, k_outputs, k_prologue, scale / factor,
            D, MAIN, TAIL, ROPE, ALIGN, PRECISION, BLOCK_Q=DKV_Q, BLOCK_K=DKV_K,
        )  # fmt: skip
