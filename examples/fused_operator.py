"""One fused operator in a model of your own: a transformer's feed-forward part with adaLN and SwiGLU.

    python examples/fused_operator.py

On a GPU the operators are Triton kernels, elsewhere C++ or PyTorch; torch.compile takes them into its graph.
"""

import torch
from torch import Tensor, nn

from aligntok.kernels import adaln, explain, swiglu, use_implementation


class FeedForward(nn.Module):
    """x [B, N, D] and a condition [B, D] -> what is to be added to x, by a gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(width))
        self.modulation = nn.Linear(width, 3 * width)
        self.into, self.out = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        _, y = adaln(x, scale, shift, None, None, self.norm)  # RMSNorm, scale and shift in one pass over x
        return gate[:, None] * self.out(swiglu(self.into(y)))


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    part = FeedForward(128).to(device)
    x, condition = torch.randn(4, 64, 128, device=device), torch.randn(4, 128, device=device)
    for op in ("adaln", "swiglu"):
        chosen = explain(op, device)
        print(f"{op} on {device}: {chosen.name}", *(f"({name}: {why})" for name, why in chosen.rejected.items()))
    ours = part(x, condition)
    with use_implementation("reference"):
        plain = part(x, condition)
    ours.sum().backward()
    print(f"largest difference from PyTorch's operators: {(ours - plain).abs().max():.1e}")


if __name__ == "__main__":
    main()
