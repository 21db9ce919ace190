"""What every kernel's tests do: compare with an fp64 reference through autograd, run twice, check the operator.

On a machine without a CUDA device the Triton kernels run in Triton's interpreter on the CPU, in fp32 or fp16 (it has no
usable bf16); on one with a device the same tests run there. Outputs that a kernel forgets to write are NaN:
tests/kernels/conftest.py makes torch.empty fill its memory.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest difference relative to the largest magnitude. fp32: sums in another order; fp16: rounding of the result.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def _outputs(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def outputs_and_gradients(function: Callable, inputs: Sequence, seed: int = 97) -> dict[str, Tensor]:
    """Outputs of function(*inputs), and the gradients of the inputs that require one for random cotangents.

    Inputs that are not tensors are passed on. Integer outputs get no cotangent.
    """
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    outputs = _outputs(function(*leaves))
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    wanted = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad}
    differentiable = [y for y in outputs if y.requires_grad]
    if wanted:
        cotangents = [normal(*y.shape, seed=seed + i).to(y.dtype) for i, y in enumerate(differentiable)]
        gradients = torch.autograd.grad(differentiable, list(wanted.values()), cotangents)
        found |= {f"gradient {i}": g for i, g in zip(wanted, gradients, strict=True)}
    return found


def widened(inputs: Sequence) -> list:
    """The same inputs with floating-point tensors in fp64."""
    return [
        x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    ]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; NaN if anything found is NaN."""
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)).item()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every named tensor has the expected shape and a relative error within the tolerance (NaN is not)."""
    assert found.keys() == expected.keys()
    for name, one in found.items():
        assert one.shape == expected[name].shape, f"{name}: {tuple(one.shape)} != {tuple(expected[name].shape)}"
        error = relative_error(one, expected[name])
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def check_kernel(kernel: Callable, reference: Callable, inputs: Sequence, tolerance: float | None = None) -> None:
    """Forward and backward against the reference in fp64 on the same (rounded) inputs, and equal bits in two runs."""
    if tolerance is None:
        dtype = next(x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point())
        tolerance = TOLERANCE[dtype]
    found, again = (outputs_and_gradients(kernel, inputs) for _ in range(2))
    assert_close(found, outputs_and_gradients(reference, widened(inputs)), tolerance)
    for name, one in found.items():
        assert torch.equal(one, again[name]), f"{name}: two runs differ"


def check_threads(function: Callable, inputs: Sequence) -> None:
    """Outputs and gradients have the same bits in every run and for any number of CPU threads."""
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            runs.append(outputs_and_gradients(function, inputs))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(one, other[name]) for name, one in runs[0].items())
