"""Blocks of queries and of keys of the attention kernels: what is read before a loop, the loop, what is written behind.

A loop runs over one matrix of keys, or of queries: `joint_attention` has two of them, one behind the other. Arguments
travel in the groups that `_qknorm_attention_tiles` names, and these:

    inputs      where a block's rows are read from, addresses that `_matrix` and `_packed` take
    held        tokens for each of the batch in the arrays of results, which are dense: N, or more where others' lie too
    rows        (q', dout, lse, delta) of a block of queries
    sums        in the loops over queries: (dk', dv) of a block of keys, without the scale
"""

from ._qknorm_attention_tiles import (
    _attend,
    _load,
    _matrix,
    _packed,
    _prepare,
    _row_sums,
    _step_dkv,
    _step_dq,
    _store,
    _store_vector,
    _transposed,
    _unprepare,
)
from ._triton import tl, triton


@triton.jit
def _attend_all(
    sums, q, keys, values, N,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums of the online softmax with N keys more: matrices of prepared keys and of values."""
    for start in range(0, N, BLOCK_K):
        k = _load(keys, start, N, D, MAIN, TAIL, BLOCK_K)
        v = _load(values, start, N, D, MAIN, TAIL, BLOCK_K)
        sums = _attend(sums, q, _transposed(k), v, start, N, PRECISION, EVEN)
    return sums


@triton.jit
def _dq_rows(
    first, head, held, inputs, strides, delta, prologue,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """q', dout, lse and delta = rowsum(out * dout) of the block of queries at `first`; dk and dv need delta next."""
    program, N, H = head
    qkv, out, lse, dout = inputs
    qkv_strides, dout_strides = strides
    q_rows, _, _ = _packed(qkv, head, qkv_strides, ALIGN)
    q = _load(q_rows, first, N, D, MAIN, TAIL, BLOCK_Q)
    q = _prepare(q, first, N, prologue, D, ROPE)
    do = _load(_matrix(dout, head, dout_strides, ALIGN), first, N, D, MAIN, TAIL, BLOCK_Q)
    o = _load(_matrix(out, head, (held * H * D, H * D, D), 8), first, N, D, MAIN, TAIL, BLOCK_Q)
    row = first + tl.arange(0, BLOCK_Q)[:, None]
    per_row = program.to(tl.int64) * N + row
    log = tl.load(lse + per_row, mask=row < N, other=0.0)
    own_delta = _row_sums(o, do)
    tl.store(delta + per_row, own_delta, mask=row < N)
    return q, do, log, own_delta


@triton.jit
def _dq_all(
    dq, rows, keys, values, N,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq' of a block of queries plus what N keys add to it, without the scale."""
    q, do, log, delta = rows
    for start in range(0, N, BLOCK_K):
        k = _load(keys, start, N, D, MAIN, TAIL, BLOCK_K)
        v = _load(values, start, N, D, MAIN, TAIL, BLOCK_K)
        dq = _step_dq(dq, q, k, v, do, log, delta, start, N, PRECISION, EVEN)
    return dq


@triton.jit
def _store_dq(
    dq, first, block, head, held, q_rows, dqkv, dweight, prologue, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Write dq and, into row `block` of dweight [., D], the block's share of the weight's gradient."""
    _, N, H = head
    q = _load(q_rows, first, N, D, MAIN, TAIL, BLOCK_Q)
    dq, share = _unprepare(dq, q, first, N, prologue, scale, D, ROPE)
    dq_rows, _, _ = _packed(dqkv, head, (3 * held * H * D, 3 * H * D, H * D, D), 8)
    _store(dq_rows, first, N, dq, D)
    _store_vector(dweight + block.to(tl.int64) * D, share, D)


@triton.jit
def _dkv_all(
    sums, k, v, queries, do_rows, head, end, lse, delta,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """dk' and dv of a block of keys plus what the queries of a head add to them, those before `end` of its N."""
    program, N, _ = head
    dk, dv = sums
    for start in range(0, end, BLOCK_Q):
        q = _load(queries, start, N, D, MAIN, TAIL, BLOCK_Q)
        do = _load(do_rows, start, N, D, MAIN, TAIL, BLOCK_Q)
        row = start + tl.arange(0, BLOCK_Q)[None, :]
        per_row = program.to(tl.int64) * N + row
        log = tl.load(lse + per_row, mask=row < N, other=0.0)
        own_delta = tl.load(delta + per_row, mask=row < N, other=0.0)
        dk, dv = _step_dkv(dk, dv, k, v, q, do, log, own_delta, PRECISION)
    return dk, dv


@triton.jit
def _store_dkv(
    sums, first, block, head, held, k_rows, dqkv, dweight, prologue, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write dk and dv; `block` and `dweight` as in `_store_dq`."""
    _, N, H = head
    dk, dv = sums
    _, dk_rows, dv_rows = _packed(dqkv, head, (3 * held * H * D, 3 * H * D, H * D, D), 8)
    _store(dv_rows, first, N, dv, D)
    k = _load(k_rows, first, N, D, MAIN, TAIL, BLOCK_K)
    dk, share = _unprepare(dk, k, first, N, prologue, scale, D, ROPE)
    _store(dk_rows, first, N, dk, D)
    _store_vector(dweight + block.to(tl.int64) * D, share, D)
