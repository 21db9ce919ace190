# ruff: noqa: RUF005 (Triton has no unpacking of tuples)
"""Triton kernels of `qknorm_attention`: one program for a whole (batch, head), and the long forms in several launches.

Tiles, the prologue and what a block adds to a result are in `_qknorm_attention_tiles`, as are the names.
"""

from ._qknorm_attention_tiles import (
    _attend,
    _head,
    _load,
    _prepare,
    _prepare_rows,
    _row_sum,
    _step_dkv,
    _step_dq,
    _store,
    _store_partial,
    _unprepare,
    _zeros,
)
from ._triton import tl, triton


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
    # Written out: of two calls of `_prepare_rows` the compiler makes one, with up to 30 registers more
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

    What the phases hand on (q', k', delta) goes through memory, and the program that wrote it reads it next: caches
    should serve that. A barrier lies between the phases.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    source = qkv + _head(program, stride_b, stride_h, H, ALIGN)
    target = prepared + program.to(tl.int64) * N * D
    for start in range(0, N, BLOCK):
        _prepare_rows(
            source + stride_3, stride_n, target, k_weight, cos, sin, start, N, eps, 1.0,
            D, MAIN, TAIL, NORM, ROPE, BLOCK,
        )  # fmt: skip
        _prepare_rows(
            source, stride_n, target + programs.to(tl.int64) * N * D, q_weight, cos, sin, start, N, eps, factor,
            D, MAIN, TAIL, NORM, ROPE, BLOCK,
        )  # fmt: skip
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
