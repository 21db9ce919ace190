"""The ledger of a step: what it costs, in which variant, and what a lever saves; seconds are worked out by hand."""

from dataclasses import replace

import pytest
import torch
from ledger_steps import BATCH, LATENTS, empty, recorded_calls, recorded_step
from torch.nn import functional as F

from aligntok.training.monitoring.ledger import kinds, levers, pricing, sums, update, variants
from aligntok.training.monitoring.ledger.assumptions import GPUS, NAMES, Assumptions
from aligntok.training.monitoring.ledger.call import Call, Touch
from aligntok.training.monitoring.ledger.kinds import Kind
from aligntok.training.monitoring.ledger.pricing import COMPILED, EAGER, GRAPH, Machine
from aligntok.training.monitoring.ledger.record import Step

H100 = GPUS["h100-sxm"]


@pytest.fixture(scope="module")
def steps() -> tuple[Step, Step]:
    """The same step with the references and with our operators."""
    return recorded_step("reference"), recorded_step("auto")


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
    qkv = empty(2, 16, 3, 2, 72)
    assert kinds.attention_work(torch.ops.aligntok.qknorm_attention_triton.default, [qkv]) == pytest.approx(80 / 72)
    joint, dout = torch.ops.aligntok.joint_attention_triton_backward.default, empty(2, 16, 144)
    assert kinds.attention_work(joint, [dout, dout, qkv, qkv]) == pytest.approx(7 / 4 * 80 / 72)
    q = empty(2, 2, 16, 72)
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
    x, weight, narrow = empty(32768, 4096), empty(4096, 4096), empty(15, 4096)
    large, odd = recorded_calls(lambda: F.linear(x, weight), lambda: F.linear(x, narrow))
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
    packed = 2 * BATCH * LATENTS[1] * LATENTS[2] * 2 * int(2 / 3 * 4 * 128)  # [8, 256, 2H] in bf16
    assert saved("SwiGLU in the epilogue of its product") == 2 * packed
    after = [sum(call.bytes for call in change(now)) for change in levers.CHANGES.values()]
    assert sum(call.bytes for call in levers._together(now)) < min(after)


def test_sums_are_those_of_therecorded_calls(steps):
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
