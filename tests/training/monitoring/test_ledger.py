"""The ledger of a step: what is recorded, how it is fused, what it costs; prices and bytes are worked out by hand."""

import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import tiny_config
from torch.nn import functional as F

from aligntok.config import (
    DiscriminatorConfig,
    GeneratorTrainingConfig,
    LightningDiTConfig,
    LossConfig,
    PerceptualConfig,
    SemanticConfig,
    StageConfig,
    TokenizerTrainingConfig,
    TrainingConfig,
)
from aligntok.kernels._triton import record_launches
from aligntok.training.monitoring import cost
from aligntok.training.monitoring.ledger import fusion, kinds, levers, pricing, sums, update, variants
from aligntok.training.monitoring.ledger.assumptions import GPUS, NAMES, Assumptions
from aligntok.training.monitoring.ledger.call import Call, Touch
from aligntok.training.monitoring.ledger.kinds import Kind
from aligntok.training.monitoring.ledger.pricing import COMPILED, EAGER, GRAPH, Machine
from aligntok.training.monitoring.ledger.record import Recorder, Step, record

H100 = GPUS["h100-sxm"]
LATENTS = (8, 16, 16)


def _generator() -> GeneratorTrainingConfig:
    model = LightningDiTConfig(size="custom", depth=2, width=128, heads=2, classes=5)
    return GeneratorTrainingConfig(model=model, training=TrainingConfig(precision="bf16"))


def _recorded(implementation: str, batch: int = 8) -> Step:
    build = partial(cost.build_generator, _generator(), LATENTS, batch, "none")
    return cost.count("cuda", build, lambda built: record(built, implementation, 90))


@pytest.fixture(scope="module")
def steps() -> tuple[Step, Step]:
    """The same step with the references and with our operators."""
    return _recorded("reference"), _recorded("auto")


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


def _calls(*work, weights=()) -> list[Call]:
    """What functions without arguments do on the meta device, recorded; views left out."""
    with cost.on_meta("cuda"), record_launches(90) as launches, Recorder(weights, launches) as recorder:
        results = [function() for function in work]
    del results
    return [call for call in recorder.calls if call.kind is not Kind.VIEW]


def _empty(*shape: int, dtype=torch.bfloat16, **options) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", **options)


# What is recorded


@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_flops_are_those_that_the_plan_counts(implementation, steps):
    step = steps[implementation == "auto"]
    counted = cost.generator_cost(_generator(), LATENTS, micro_batch=8)
    assert step.flops == counted.flops == sum(call.flops for call in step.calls)
    assert step.trained == counted.trained and step.micro_batch == 8


@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_a_stages_flops_too(implementation):
    config, stage = _stage2()
    build = partial(cost.build_stage, config, stage, 64, 4, looked_up=False, mode="none")
    step = cost.count("cuda", build, lambda built: record(built, implementation, 90))
    assert sum(call.flops for call in step.calls) == cost.tokenizer_cost(config, stage, 64, 4).flops
    assert {update.CLIP, update.ADAM, update.AVERAGE} <= {call.op for call in step.calls}
    assert sum(call.sync for call in step.calls) == 2  # two phases, one guard each
    found = {call.group for call in step.calls}
    assert {kinds.GROUP_NORM, kinds.CONVOLUTIONS, kinds.ENCODER, kinds.DISCRIMINATOR, kinds.ATTENTION} <= found


def test_every_launch_of_our_operators_is_in_the_ledger(steps):
    build = partial(cost.build_generator, _generator(), LATENTS, 8, "none")
    with record_launches(90) as launches:
        cost.count("cuda", build, cost.measure)
    own = [call for call in steps[1].calls if call.kind in kinds.OWN]
    assert sum(call.launches for call in own) == len(launches) > 10
    assert not any(call.kind in kinds.OWN for call in steps[0].calls)


@pytest.mark.parametrize("op", ["adaln", "swiglu", "qknorm_attention", "group_norm_silu", "flow_loss"])
def test_our_operators_move_the_bytes_that_their_benchmarks_state(op):
    """Within 6 %; attention's backward pass 15 % less: what its one launch writes and reads again is counted once."""
    workload = importlib.import_module(f"benchmarks.bench_{op}").WORKLOADS[0]
    with record_launches(90) as launches:
        inputs = workload.make("meta", workload.dtype, **workload.shape)
        with Recorder([], launches) as recorder:
            outputs = workload.ours(*inputs, implementation="triton")
        forward = len(recorder.calls)
        results = [y for y in ([outputs] if isinstance(outputs, torch.Tensor) else outputs) if y.requires_grad]
        with recorder:
            torch.autograd.grad(results, [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad],
                                [torch.empty_like(y) for y in results])  # fmt: skip
    found = [sum(call.bytes for call in some) for some in (recorder.calls[:forward], recorder.calls[forward:])]
    for amount, stated in zip(found, workload.minimum(workload.dtype.itemsize, **workload.shape), strict=True):
        assert amount == pytest.approx(stated, rel=0.16 if op == "qknorm_attention" else 0.06)


def test_a_linear_layer_by_hand():
    x, weight, bias = _empty(512, 64), _empty(32, 64), _empty(32)
    [call] = _calls(lambda: F.linear(x, weight, bias))
    assert (call.op, call.kind, call.launches, call.dtype) == ("addmm", Kind.PRODUCT, 1, "bf16")
    assert call.flops == 2 * 512 * 64 * 32
    assert call.bytes == 2 * (512 * 64 + 32 * 64 + 32 + 512 * 32)


def test_a_pointwise_operator_reads_what_it_is_given_once():
    x = _empty(512, 64, dtype=torch.float32)
    [call] = _calls(lambda: x * x)
    assert (call.kind, call.flops, call.launches, call.bytes) == (Kind.POINTWISE, 0, 1, 2 * 4 * 512 * 64)
    [call] = _calls(lambda: x + _empty(512, 1, dtype=torch.float32).expand(512, 64))
    assert call.bytes == 4 * (2 * 512 * 64 + 512)
    assert _calls(lambda: x.reshape(64, 512).t()) == []


def test_sums_over_the_last_dimension_are_told_from_others():
    x = _empty(8, 16, 32)
    found = [call.kind for call in _calls(lambda: x.sum(-1), lambda: x.mean(-1, keepdim=True), lambda: x.sum((0, 1)))]
    assert found == [Kind.ROW, Kind.ROW, Kind.COLUMN]


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
    x, weight = (_empty(2, 16, 8, 8), _empty(16, 16, 3, 3))
    x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
    calls = _calls(lambda: F.conv2d(x, weight, padding=1).contiguous(memory_format=torch.channels_last))
    assert [call.op for call in calls] == ["convolution"]
    calls = _calls(lambda: F.conv2d(x, weight, _empty(16), padding=1))
    assert [call.op for call in calls] == ["convolution", "add_"]  # the bias is a pass of its own


# What is fused


def _fused(calls: list[Call], kept=()) -> list[Call]:
    return list(fusion.fuse(Step(tuple(calls), frozenset(kept), 0, 0, 1)).calls)


def test_a_chain_becomes_one_kernel_by_hand():
    a, b = _empty(64, 32, dtype=torch.float32), _empty(64, 32, dtype=torch.float32)
    weight = _empty(32, 32, dtype=torch.float32)
    before, chain, product = slice(0, 2), slice(0, 3), slice(3, 4)
    calls = _calls(lambda: ((a * b).relu() + b) @ weight)
    assert [call.op for call in calls][chain] == ["mul", "relu", "add"] and before
    fused, kept = _fused(calls)
    assert fused.launches == 1 and fused.op.startswith("3 fused") and kept == calls[product][0]
    assert fused.bytes == 3 * 4 * 64 * 32  # a and b in, the sum out
    assert sum(call.bytes for call in calls[chain]) == (3 + 2 + 3) * 4 * 64 * 32


def test_what_nobody_asks_for_is_not_computed():
    a = _empty(64, 32, dtype=torch.float32)
    assert _fused(_calls(lambda: a * 2)) == []


def test_a_sum_over_rows_stays_alone_and_makes_its_input_again():
    a, b = _empty(64, 32, dtype=torch.float32), _empty(1, 32, dtype=torch.float32)
    product = _empty(32, 32, dtype=torch.float32)
    calls = _calls(lambda: (a * b).sum(0) @ product)
    assert [call.kind for call in _fused(calls)] == [Kind.COLUMN, Kind.PRODUCT]
    assert _fused(calls)[0].bytes == 4 * (64 * 32 + 32 + 32)  # a, b and the sum: the product is nowhere written


def test_the_backward_pass_computes_again_what_is_cheaper_so():
    x = _empty(64, 32, dtype=torch.float32)
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
    with record_launches(90) as launches:
        recorder = Recorder([], launches)
        inputs = workload.make("meta", torch.bfloat16, **shape)
        with recorder:
            outputs = workload.reference(*inputs)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
            results = [y for y in outputs if y.requires_grad]
            gradients = torch.autograd.grad(results, wanted, [torch.empty_like(y) for y in results])
        fused = _fused(recorder.calls, {recorder.number(x) for x in (*outputs, *gradients)})
    found = (sum(call.bytes for call in fused if call.phase == name) / 1e6 for name in ("forward", "backward"))
    assert list(found) == [pytest.approx(megabytes, rel=0.1) for megabytes in counted]


def test_norms_of_two_passes_are_two_calls():
    x, weight = _empty(2, 8, 4, 4), _empty(8)
    sums_, applied = _calls(lambda: F.group_norm(x, 2, weight, weight))
    assert (sums_.kind, applied.kind) == (Kind.COLUMN, Kind.POINTWISE)
    assert applied.bytes - sums_.bytes == 2 * 2 * 8 * 16  # and the result


def test_fusing_leaves_products_and_updates_alone(steps):
    for step in steps:
        fused = fusion.fuse(step)
        assert sum(call.flops for call in fused.calls) == step.flops
        assert sum(call.bytes for call in fused.calls) < sum(call.bytes for call in step.calls)
        same = [call for call in step.calls if call.kind in (Kind.PRODUCT, Kind.LIST, *kinds.OWN)]
        assert [call for call in fused.calls if call.kind in (Kind.PRODUCT, Kind.LIST, *kinds.OWN)] == same


# What it costs


def test_prices_by_hand():
    machine, assumed = Machine(H100, Assumptions()), Assumptions()
    product = Call("mm", "", "forward", kinds.LINEAR_PRODUCTS, Kind.PRODUCT, flops=2 * 8192**3)
    price = machine.price(product)
    assert price.device == pytest.approx(2 * 8192**3 / (989e12 * assumed.product_share)) and price.bound == "compute"
    assert price.host == pytest.approx(assumed.operator_us * 1e-6)
    stream = Call("mul", "", "forward", kinds.OTHER, Kind.POINTWISE, (Touch(0, 0, 10**9),), (Touch(1, 0, 10**9),))
    price = machine.price(stream)
    assert price.device == pytest.approx(2e9 / (3.35e12 * assumed.bandwidth_share)) and price.bound == "memory"
    small = replace(stream, reads=(), writes=(), launches=2)
    assert machine.price(small) == pricing.Price(2 * assumed.kernel_us * 1e-6, "launch", price.host)
    assert Machine(H100, assumed, GRAPH).price(small).host == 0
    assert Machine(H100, assumed, COMPILED).price(small).host == pytest.approx(2 * assumed.compiled_us * 1e-6)
    view = Call("view", "", "forward", kinds.OTHER, Kind.VIEW, launches=0)
    assert machine.price(view) == pricing.Price(0.0, "-", assumed.view_us * 1e-6)


def test_fp32_products_take_tf32_unless_the_run_is_in_fp32():
    product = Call("mm", "", "forward", kinds.LINEAR_PRODUCTS, Kind.PRODUCT, flops=10**12, dtype="fp32")
    seconds = {p: Machine(H100, Assumptions(), precision=p).price(product).device for p in ("bf16", "tf32", "fp32")}
    assert seconds["bf16"] == seconds["tf32"]
    assert seconds["fp32"] / seconds["tf32"] == pytest.approx(495 / 67)


def test_attention_is_charged_what_it_executes():
    qkv = _empty(2, 16, 3, 2, 72)
    assert kinds.attention_work(torch.ops.aligntok.qknorm_attention_triton.default, [qkv]) == pytest.approx(80 / 72)
    q = _empty(2, 2, 16, 72)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    assert kinds.attention_work(backward, [q, q]) == pytest.approx(1.25 * 96 / 72)


def test_host_and_device_are_two_queues():
    assumed = replace(Assumptions(), operator_us=10.0, kernel_us=1.0)
    machine = Machine(H100, assumed)
    short = Call("mul", "", "forward", kinds.OTHER, Kind.POINTWISE)
    assert pricing.step_seconds(machine, [short] * 5) == pytest.approx(50e-6)  # the host is slower
    long = replace(short, launches=100)
    assert pricing.step_seconds(machine, [long] * 5) == pytest.approx(500e-6)  # it runs ahead
    # Behind the wait the device has nothing to do until the host has launched again
    waits = [long, replace(short, sync=True), *[short] * 3]
    assert pricing.step_seconds(machine, waits) == pytest.approx(100e-6 + 1e-6 + 30e-6 + 10e-6)


def test_communication_by_hand():
    setting = variants.Setting(H100, Assumptions(), gpus=8)
    rate = 450e9 * setting.assumed.link_share
    assert variants.sent(8, setting) == 2 * 8 * 7 / 8
    assert variants.sent(8, replace(setting, sharded=True)) == 3 * 8 * 7 / 8
    assert variants.communication(10**9, replace(setting, gpus=1), backward=1.0) == 0
    assert variants.communication(10**9, setting, backward=1.0) == pytest.approx(2 * 25e6 / rate)
    assert variants.communication(10**9, setting, backward=1e-3) == pytest.approx(1.75e9 / rate - 1e-3)


def test_micro_batches_repeat_both_passes_and_add_up_gradients(steps):
    one, four = (
        variants.priced("", steps[1], variants.Setting(H100, Assumptions(), accumulate=n), EAGER) for n in (1, 4)
    )
    assert sum(call.flops for call in four.calls) == 4 * steps[1].flops
    assert sum(call.op == update.ADAM for call in four.calls) == 1
    added = [call for call in four.calls if call.op == "add to gradients"]
    assert len(added) == 3 and added[0].bytes == 3 * steps[1].trained
    assert one.seconds < four.seconds < 4.1 * one.seconds


def test_variants_are_ordered_sensibly(steps):
    found = {one.name: one for one in variants.variants(*steps, variants.Setting(H100, Assumptions()))}
    assert list(found) == [
        variants.REFERENCE,
        variants.COMPILED_REFERENCE,
        variants.FUSED,
        variants.FUSED_COMPILED,
        variants.GRAPHS,
        variants.FP8,
    ]
    seconds = {name: one.seconds for name, one in found.items()}
    assert seconds[variants.COMPILED_REFERENCE] < seconds[variants.REFERENCE]
    assert (
        seconds[variants.FP8] <= seconds[variants.GRAPHS] <= seconds[variants.FUSED_COMPILED] <= seconds[variants.FUSED]
    )
    assert seconds[variants.FUSED] < seconds[variants.REFERENCE]
    for one in found.values():
        assert one.seconds >= one.device - 1e-12
    assert found[variants.GRAPHS].host == 0
    assert found[variants.FUSED].seconds == pytest.approx(found[variants.FUSED].host, rel=0.3)  # a small model


def test_fp8_where_the_gpu_has_it_and_where_it_pays(steps):
    on_a100 = variants.variants(*steps, variants.Setting(GPUS["a100-80gb"], Assumptions()))
    assert variants.FP8 not in {one.name for one in on_a100}
    x, weight, narrow = _empty(32768, 4096), _empty(4096, 4096), _empty(15, 4096)
    large, odd = _calls(lambda: F.linear(x, weight), lambda: F.linear(x, narrow))
    step = Step((large, odd), frozenset(), 0, 0, 1)
    machine = Machine(H100, Assumptions())
    *casts, product, unchanged = variants.in_fp8(step, machine).calls
    assert unchanged == odd and product.dtype == "fp8" and product.flops == large.flops
    assert [call.bytes for call in casts] == [3 * 4096 * 4096, 3 * 32768 * 4096]  # two bytes read, one written
    assert variants.in_fp8(step, replace(machine, assumed=replace(Assumptions(), fp8_share=0.1))) == step


def test_levers_are_sorted_and_each_saves_something(steps):
    setting = variants.Setting(H100, Assumptions(), gpus=8)
    found = levers.levers(variants.variants(*steps, setting), steps[1], setting)
    saved = [lever.saved for lever in found]
    assert saved == sorted(saved, reverse=True) and min(saved) > 0
    assert [lever.name for lever in found if lever.taken] == ["our operators in place of the PyTorch references"]
    assert any("CUDA graph" in lever.name for lever in found)


def test_each_lever_changes_what_it_names(steps):
    now = steps[1].calls
    weights = steps[1].trained

    def saved(name: str) -> int:
        return sum(call.bytes for call in now) - sum(call.bytes for call in levers.CHANGES[name](now))

    def bytes_of(group: str, phase: str) -> int:
        return sum(call.bytes for call in now if call.group == group and call.phase == phase)

    assert saved("bias gradients in the pass that makes their input") == bytes_of(kinds.BIASES, "backward")
    assert saved("bf16 copies of the weights, written by Adam") == bytes_of(kinds.CASTS, "forward") - weights // 2
    # Norm and Adam read half of the gradients' bytes, the clip reads and writes half
    casts = bytes_of(kinds.CASTS, "backward")
    assert saved("gradients kept in bf16") == casts + 4 * weights // 2
    average = next(call for call in now if call.op == update.AVERAGE)
    assert saved("clip and moving average inside Adam's pass") == 2 * weights + average.bytes // 3
    assert 0 < saved("residual stream in bf16") < bytes_of(kinds.ADALN, "forward") + bytes_of(kinds.ADALN, "backward")
    packed = 2 * 8 * 256 * 2 * int(2 / 3 * 4 * 128)  # [8, 256, 2H] in bf16
    assert saved("SwiGLU in the epilogue of its product") == 2 * packed
    after = [sum(call.bytes for call in change(now)) for change in levers.CHANGES.values()]
    assert sum(call.bytes for call in levers._together(now)) < min(after)


def test_sums_are_those_of_the_calls(steps):
    one = variants.priced("", steps[1], variants.Setting(H100, Assumptions()), EAGER)
    for some in (sums.lines(one), list(sums.groups(one).values())):
        assert sum(line.device for line in some) == pytest.approx(one.device)
        assert sum(line.launches for line in some) == sum(call.launches for call in one.calls)
        assert sum(line.flops for line in some) == steps[1].flops
    assert sum(sums.bounds(one).values()) == pytest.approx(one.device)
    times = [line.device for line in sums.lines(one)]
    assert times == sorted(times, reverse=True)


def test_every_assumption_has_a_source_and_can_be_measured():
    rows = Assumptions().rows()
    assert [row["name"] for row in rows] == list(NAMES) and all(row["source"] and row["unit"] for row in rows)
    known = Assumptions().with_measured({"kernel_us": 2.0}, {"adaln": 0.5}, "measured there")
    told = {row["name"]: (row["value"], row["source"]) for row in known.rows()}
    assert told["kernel_us"] == (2.0, "measured there") and told["adaln"] == (0.5, "measured there")
    assert told["view_us"][1] == Assumptions().rows()[list(NAMES).index("view_us")]["source"]
    call = Call("adaln_triton", "", "forward", kinds.ADALN, Kind.OWN, (Touch(0, 0, 10**9),))
    twice = Machine(H100, known).price(call).device / Machine(H100, Assumptions()).price(call).device
    assert twice == pytest.approx(2)
