"""`gan_loss`: discriminator and generator losses against eager PyTorch and torch.compile.

    python -m benchmarks.bench_gan_loss [--phase forward|backward|both|all] [--threads N] [--csv FILE] [--plot FILE]

The baseline is the reference of `kernels/gan_loss.py` run eagerly: loss, gradient and statistics, which is
what a training step needs. "eager, loss only" leaves the statistics out, to show how much of the gain is due
to them. "D lecam" is the hinge with the LeCam term. The sizes: a few logits, one image, the discriminator's
real output at batch 32 (32x1x30x30), and up to 4 M logits.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aligntok.kernels import gan_loss
from benchmarks.harness import Case, Parts, Provider, arguments, compare
from benchmarks.machine import DEVICE

SHAPES = ((1, 1, 1, 1), (1, 1, 30, 30), (32, 1, 30, 30), (256, 1, 30, 30), (32, 1, 128, 256), (4_000_000,))
# Relative to the largest magnitude. fp32: sums of 4 M terms in another order. bf16: the gradient is rounded
# to 8 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


LECAM_MEANS, LECAM_WEIGHT = (0.4, -0.4), 0.3

# One compiled graph per shape and kind; torch.compile gives up after 8 by default.
_GRAPHS = 5 * len(SHAPES)


Losses = Callable[..., Sequence[Tensor]]


def _discriminator_loss_only(real: Tensor, fake: Tensor, kind: str) -> tuple[Tensor]:
    if kind == "hinge":
        return (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()),)
    return (0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean()),)


def _generator_loss_only(fake: Tensor, kind: str) -> tuple[Tensor]:
    return (-fake.mean() if kind == "hinge" else F.softplus(-fake).mean(),)


def providers(part: str, kind: str) -> list[Provider]:
    """The columns of one table: eager reference, eager loss alone, the compiled reference, and the C++
    operator.
    """
    parts: dict[str, tuple[Losses, Losses, Losses]] = {
        "discriminator": (
            gan_loss.discriminator_loss_reference,
            _discriminator_loss_only,
            gan_loss.discriminator_loss,
        ),
        "generator": (gan_loss.generator_loss_reference, _generator_loss_only, gan_loss.generator_loss),
    }
    reference, loss_only, public = parts[part]
    compiled = torch.compile(reference, fullgraph=True, dynamic=False)

    def with_kind(function: Losses, **options: str) -> Losses:
        return lambda *logits: function(*logits, kind, **options)

    return [
        Provider("eager", with_kind(reference)),
        Provider("eager, loss only", with_kind(loss_only)),
        Provider("torch.compile", with_kind(compiled)),
        Provider("ours", with_kind(public, implementation="cpp")),
    ]


def lecam_providers() -> list[Provider]:
    """The columns of the discriminator's hinge loss with the LeCam term."""
    means = torch.tensor(LECAM_MEANS, device=DEVICE)
    reference = gan_loss.discriminator_loss_reference
    compiled = torch.compile(reference, fullgraph=True, dynamic=False)
    lecam: dict[str, Any] = {"lecam_means": means, "lecam_weight": LECAM_WEIGHT}
    return [
        Provider("eager", lambda real, fake: reference(real, fake, "hinge", **lecam)),
        Provider("torch.compile", lambda real, fake: compiled(real, fake, "hinge", **lecam)),
        Provider("ours", lambda real, fake: gan_loss.discriminator_loss(real, fake, implementation="cpp", **lecam)),
    ]


def case(part: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """Normal logits around the hinge's corner, the same for every run."""
    generator = torch.Generator().manual_seed(0)
    sides = 2 if part == "discriminator" else 1
    logits = [torch.randn(shape, generator=generator).mul(1.5).to(DEVICE, dtype).requires_grad_() for _ in range(sides)]
    label = f"{part[0].upper()} {kind} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
    return Case(label, tuple(logits), TOLERANCE[dtype])


def comparisons(dtype: torch.dtype = torch.bfloat16) -> Parts:
    """Providers and cases of every table."""
    parts = [
        (providers(part, kind), [case(part, kind, shape, dtype) for shape in SHAPES])
        for part in ("discriminator", "generator")
        for kind in gan_loss.KINDS
    ]
    return [*parts, (lecam_providers(), [case("discriminator", "lecam", shape, dtype) for shape in SHAPES])]


def main() -> int:
    """Print the tables; exit status 1 if some result was wrong."""
    parser = arguments(__doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the logits")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = _GRAPHS
    return compare(comparisons(getattr(torch, options.dtype)), "ours", options)


if __name__ == "__main__":
    sys.exit(main())
