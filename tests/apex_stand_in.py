"""apex.optimizers.FusedAdam with apex's own signatures, in PyTorch: it does not take what torch's optimizers take.

As in NVIDIA apex's apex/optimizers/fused_adam.py: zero_grad has no argument, the step count is the group's, and step
refuses what its deprecated arguments were.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        if amsgrad or capturable or master_weights:
            raise RuntimeError("not in this stand-in")
        options = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, options | {"weight_decay": weight_decay})
        self.adam_w_mode, self.set_grad_none = int(adam_w_mode), set_grad_none

    def zero_grad(self) -> None:
        if not self.set_grad_none:
            super().zero_grad()
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None) -> None:
        if any(value is not None for value in (grads, output_params, scale, grad_norms)):
            raise RuntimeError("FusedAdam has been updated. Simply initialize it identically to torch.optim.Adam")
        assert closure is None and grad_scaler is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter).float()
                    state["exp_avg_sq"] = torch.zeros_like(parameter).float()
                state["exp_avg"].lerp_(parameter.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                size = group["lr"] / (1 - first ** group["step"])
                spread = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt_().add_(group["eps"])
                parameter.addcdiv_(state["exp_avg"], spread, value=-size)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if apex were there and ran on a CPU."""
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam = package.optimizers = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.setattr("aligntok.training.objective.apex_can_run", lambda device, training: True)
