"""The dtypes that operators take, and the one message for all others."""

from collections.abc import Sequence

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dtype(name: str, dtype: torch.dtype, accepted: Sequence[torch.dtype] = DTYPES) -> None:
    """Raise ValueError, naming what is accepted for `name`, unless `dtype` is among it."""
    if dtype not in accepted:
        raise ValueError(f"{name}: expected dtype {', '.join(short(d) for d in accepted)}, got {dtype}")


def short(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
