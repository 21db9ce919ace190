"""Steps and operators recorded for the tests of the ledger, on the meta device."""

from functools import cache, partial

import torch

from aligntok.config import GeneratorTrainingConfig, LightningDiTConfig, TrainingConfig
from aligntok.kernels._triton import record_launches
from aligntok.training.monitoring import meta_device
from aligntok.training.monitoring.ledger.call import Call
from aligntok.training.monitoring.ledger.kinds import Kind
from aligntok.training.monitoring.ledger.record import Recorder, Step, record

LATENTS = (8, 16, 16)
BATCH = 8


def small_generator() -> GeneratorTrainingConfig:
    model = LightningDiTConfig(size="custom", depth=2, width=128, heads=2, classes=5)
    return GeneratorTrainingConfig(model=model, training=TrainingConfig(precision="bf16"))


@cache
def recorded_step(implementation: str) -> Step:
    """A step of the small generator."""
    build = partial(meta_device.build_generator, small_generator(), LATENTS, BATCH, "none")
    return meta_device.count("cuda", build, lambda built: record(built, implementation, 90))


def recorded_calls(*work) -> list[Call]:
    """What functions without arguments do on the meta device; views left out."""
    with meta_device.on_meta("cuda"), record_launches(90) as launches, Recorder([], launches) as recorder:
        results = [function() for function in work]
    del results
    return [call for call in recorder.calls if call.kind is not Kind.VIEW]


def recorded_passes(function, inputs) -> tuple[list[Call], set[int]]:
    """An operator's forward and backward pass, and the storages of its results and gradients."""
    with record_launches(90) as launches, Recorder([], launches) as recorder:
        outputs = function(*inputs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        results = [y for y in outputs if y.requires_grad]
        gradients = torch.autograd.grad(results, wanted, [torch.empty_like(y) for y in results])
    return recorder.calls, {recorder.number(x) for x in (*outputs, *gradients)}


def empty(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
