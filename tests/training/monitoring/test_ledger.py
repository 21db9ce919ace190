"""The ledger of a step: what is recorded and how it is fused; bytes and FLOPs are worked out by hand."""

import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import tiny_config
from ledger_steps import BATCH, LATENTS, empty, recorded_calls, recorded_passes, recorded_step, small_generator
from torch.nn import functional as F

from aligntok.config import (
    DiscriminatorConfig,
    LossConfig,
    PerceptualConfig,
    SemanticConfig,
    StageConfig,
    TokenizerTrainingConfig,
    TrainingConfig,
)
from aligntok.kernels._triton import record_launches
from aligntok.training.monitoring import cost, meta_device
from aligntok.training.monitoring.ledger import fusion, kinds, update
from aligntok.training.monitoring.ledger.call import Call, Touch
from aligntok.training.monitoring.ledger.kinds import Kind
from aligntok.training.monitoring.ledger.record import Step, record


@pytest.fixture(scope="module")
def steps() -> tuple[Step, Step]:
    """The same step with the references and with our operators."""
    return recorded_step("reference"), recorded_step("auto")


def _stage2() -> tuple[TokenizerTrainingConfig, StageConfig]:
    losses = LossConfig(perceptual=PerceptualConfig(kind="none"), discriminator=DiscriminatorConfig(8, 1))
    config = TokenizerTrainingConfig(model=tiny_config(), losses=losses, training=TrainingConfig(precision="bf16"))
    stage = StageConfig(
        ("encoder", "adapter", "decoder"),
        steps=1,
        semantic=SemanticConfig(weight=1.0),
        ema_decay=0.9,
        gradient_clip=1.0,
    )
    return config, stage


@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_flops_are_those_that_the_plan_counts(implementation, steps):
    step = steps[implementation == "auto"]
    counted = cost.generator_cost(small_generator(), LATENTS, micro_batch=BATCH)
    assert step.flops == counted.flops == sum(call.flops for call in step.calls)
    assert step.trained == counted.trained and step.micro_batch == BATCH


@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_a_stages_flops_too(implementation):
    config, stage = _stage2()
    build = partial(meta_device.build_stage, config, stage, 64, 4, looked_up=False, mode="none")
    step = meta_device.count("cuda", build, lambda built: record(built, implementation, 90))
    assert sum(call.flops for call in step.calls) == cost.tokenizer_cost(config, stage, 64, 4).flops
    assert {update.CLIP, update.ADAM, update.AVERAGE} <= {call.op for call in step.calls}
    assert sum(call.sync for call in step.calls) == 2  # two phases, one guard each
    found = {call.group for call in step.calls}
    assert {kinds.GROUP_NORM, kinds.CONVOLUTIONS, kinds.ENCODER, kinds.DISCRIMINATOR, kinds.ATTENTION} <= found


def test_every_launch_of_our_operators_is_in_the_ledger(steps):
    build = partial(meta_device.build_generator, small_generator(), LATENTS, BATCH, "none")
    with record_launches(90) as launches:
        meta_device.count("cuda", build, cost.measure)
    own = [call for call in steps[1].calls if call.kind in kinds.OWN]
    assert sum(call.launches for call in own) == len(launches) > 10
    assert not any(call.kind in kinds.OWN for call in steps[0].calls)


@pytest.mark.parametrize("op", ["adaln", "swiglu", "qknorm_attention", "group_norm_silu", "flow_loss"])
def test_our_operators_move_the_bytes_that_their_benchmarks_state(op):
    """Within 6 %; attention's backward pass 15 % less: what its one launch writes and reads again is counted once."""
    workload = importlib.import_module(f"benchmarks.bench_{op}").WORKLOADS[0]
    inputs = workload.make("meta", workload.dtype, **workload.shape)
    calls, _ = recorded_passes(partial(workload.ours, implementation="triton"), inputs)
    by_phase = ([call for call in calls if call.phase == phase] for phase in ("forward", "backward"))
    found = [sum(call.bytes for call in some) for some in by_phase]
    for amount, stated in zip(found, workload.plan(workload.dtype.itemsize, **workload.shape), strict=True):
        assert amount == pytest.approx(stated, rel=0.16 if op == "qknorm_attention" else 0.06)


def test_a_linear_layer_by_hand():
    x, weight, bias = empty(512, 64), empty(32, 64), empty(32)
    [call] = recorded_calls(lambda: F.linear(x, weight, bias))
    assert (call.op, call.kind, call.launches, call.dtype) == ("addmm", Kind.PRODUCT, 1, "bf16")
    assert call.flops == 2 * 512 * 64 * 32
    assert call.bytes == 2 * (512 * 64 + 32 * 64 + 32 + 512 * 32)


def test_a_pointwise_operator_reads_what_it_is_given_once():
    x = empty(512, 64, dtype=torch.float32)
    [call] = recorded_calls(lambda: x * x)
    assert (call.kind, call.flops, call.launches, call.bytes) == (Kind.POINTWISE, 0, 1, 2 * 4 * 512 * 64)
    [call] = recorded_calls(lambda: x + empty(512, 1, dtype=torch.float32).expand(512, 64))
    assert call.bytes == 4 * (2 * 512 * 64 + 512)
    assert recorded_calls(lambda: x.reshape(64, 512).t()) == []


def test_sums_over_what_lies_together_are_told_from_others():
    x, long = empty(8, 16, 32), empty(4, 2 * kinds.LONGEST_ROW)
    last = empty(2, 8, 4, 4).to(memory_format=torch.channels_last)
    rows = recorded_calls(
        lambda: x.sum(-1), lambda: x.mean(-1, keepdim=True), lambda: x.sum((1, 2)), lambda: last.sum(1)
    )
    others = recorded_calls(lambda: x.sum((0, 1)), lambda: x.sum(), lambda: long.sum(-1), lambda: empty(2, 8, 4).sum(1))
    assert [call.kind for call in rows] == [Kind.ROW] * 4
    assert [call.kind for call in others] == [Kind.COLUMN] * 4


def test_groups_are_found_in_both_passes(steps):
    by_pass = {(call.group, call.phase) for call in steps[0].calls if call.launches}
    for group in (kinds.ADALN, kinds.ROPE, kinds.SWIGLU, kinds.ATTENTION, kinds.LINEAR_PRODUCTS, kinds.CASTS):
        assert {(group, "forward"), (group, "backward")} <= by_pass, group
    assert (kinds.BIASES, "backward") in by_pass
    products = [call for call in steps[1].calls if call.group == kinds.ATTENTION_PRODUCTS]
    assert len(products) == 2 * 6  # in each block qkv and output, each forward and twice backward
    unknown = sum(call.bytes for call in steps[0].calls if call.group == kinds.OTHER)
    assert unknown < 0.05 * sum(call.bytes for call in steps[0].calls)


def test_the_update_by_hand():
    weights = [torch.nn.Parameter(torch.empty(n)) for n in (100, 100_000)]
    average = update._on_lists(update.AVERAGE, weights, lists=2, read=2, written=1)
    assert average.bytes == 3 * 4 * 100_100 and average.launches == 1 and average.tensors == 4
    many = [torch.empty(10)] * 600
    assert update._on_lists(update.ADAM, many, lists=4, read=4, written=3).launches == 3  # 252 tensors in each


def test_the_update_of_a_step(steps):
    weights = steps[1].trained
    found = {call.op: call.bytes for call in steps[1].calls if call.kind is Kind.LIST}
    frozen = 4 * LATENTS[1] * LATENTS[2] * 128  # the table of positions is averaged too
    assert found == {
        update.NORM: weights,
        update.CLIP: 2 * weights,
        update.ADAM: 7 * weights,
        update.AVERAGE: 3 * (weights + frozen),
    }


def test_convolutions_keep_their_channels_last():
    x, weight = (empty(2, 16, 8, 8), empty(16, 16, 3, 3))
    x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
    calls = recorded_calls(lambda: F.conv2d(x, weight, padding=1).contiguous(memory_format=torch.channels_last))
    assert [call.op for call in calls] == ["convolution"]
    calls = recorded_calls(lambda: F.conv2d(x, weight, empty(16), padding=1))
    assert [call.op for call in calls] == ["convolution", "add_"]  # the bias is a pass of its own


def _fused(calls: list[Call], kept=()) -> list[Call]:
    return list(fusion.fuse(Step(tuple(calls), frozenset(kept), 0, 0, 1)).calls)


def test_a_chain_becomes_one_kernel_by_hand():
    a, b = empty(64, 32, dtype=torch.float32), empty(64, 32, dtype=torch.float32)
    weight = empty(32, 32, dtype=torch.float32)
    chain, product = slice(0, 3), 3
    calls = recorded_calls(lambda: ((a * b).relu() + b) @ weight)
    assert [call.op for call in calls][chain] == ["mul", "relu", "add"]
    fused, kept = _fused(calls)
    assert fused.launches == 1 and fused.op.startswith("3 fused") and kept == calls[product]
    assert fused.bytes == 3 * 4 * 64 * 32  # a and b in, the sum out
    assert sum(call.bytes for call in calls[chain]) == (3 + 2 + 3) * 4 * 64 * 32


def test_what_nobody_asks_for_is_not_computed():
    a = empty(64, 32, dtype=torch.float32)
    assert _fused(recorded_calls(lambda: a * 2)) == []


def test_a_sum_over_rows_stays_alone_and_makes_its_input_again():
    a, b = empty(64, 32, dtype=torch.float32), empty(1, 32, dtype=torch.float32)
    product = empty(32, 32, dtype=torch.float32)
    calls = recorded_calls(lambda: (a * b).sum(0) @ product)
    assert [call.kind for call in _fused(calls)] == [Kind.COLUMN, Kind.PRODUCT]
    assert _fused(calls)[0].bytes == 4 * (64 * 32 + 32 + 32)  # a, b and the sum: the product is nowhere written


def test_the_backward_pass_computes_again_what_is_cheaper_so():
    x = empty(64, 32, dtype=torch.float32)
    touch, out = Touch(0, 0, 4 * 64 * 32), Touch(1, 0, 4 * 64 * 32)
    forward = Call("exp", "", "forward", kinds.OTHER, Kind.POINTWISE, (touch,), (out,))
    backward = Call("mul", "", "backward", kinds.OTHER, Kind.POINTWISE, (out,), (Touch(2, 0, out.bytes),))
    [again] = _fused([forward, backward], kept=[2])
    assert again.reads == (touch,) and x.numel() * 4 == touch.bytes
    small = replace(forward, op="sum", kind=Kind.ROW, writes=(Touch(1, 0, 256),))
    kept, reader = _fused([small, replace(backward, reads=(Touch(1, 0, 256),))], kept=[2])
    assert kept.writes == (Touch(1, 0, 256),) == reader.reads  # 256 bytes are written and read, not 8192 read again


# Forward and backward MB that Inductor's scheduler counts, from benchmarks/results/hardware_report.md (2026)
INDUCTOR = {
    "adaln": ({"B": 256, "N": 256, "D": 768}, (608, 1419)),
    "swiglu": ({"M": 65536, "H": 2048}, (805, 1342)),
    "group_norm_silu": ({"B": 8, "C": 512, "side": 64, "groups": 32}, (101, 370)),
}


@pytest.mark.parametrize("op", INDUCTOR)
def test_the_rule_moves_the_bytes_that_inductor_counts(op):
    shape, counted = INDUCTOR[op]
    workload = importlib.import_module(f"benchmarks.bench_{op}").WORKLOADS[0]
    fused = _fused(*recorded_passes(workload.reference, workload.make("meta", torch.bfloat16, **shape)))
    found = (sum(call.bytes for call in fused if call.phase == name) / 1e6 for name in ("forward", "backward"))
    assert list(found) == [pytest.approx(megabytes, rel=0.1) for megabytes in counted]


def test_norms_of_two_passes_are_tworecorded_calls():
    x, weight = empty(2, 8, 4, 4), empty(8)
    sums_, applied = recorded_calls(lambda: F.group_norm(x, 2, weight, weight))
    assert (sums_.kind, applied.kind) == (Kind.COLUMN, Kind.POINTWISE)
    assert applied.bytes - sums_.bytes == 2 * 2 * 8 * 16  # and the result


def test_fusing_leaves_products_and_updates_alone(steps):
    for step in steps:
        fused = fusion.fuse(step)
        assert sum(call.flops for call in fused.calls) == step.flops
        assert sum(call.bytes for call in fused.calls) < sum(call.bytes for call in step.calls)
        same = [call for call in step.calls if call.kind in (Kind.PRODUCT, Kind.LIST, *kinds.OWN)]
        assert [call for call in fused.calls if call.kind in (Kind.PRODUCT, Kind.LIST, *kinds.OWN)] == same
