"""LoRA on the encoder, the ablation of AlignTok's section 1.8: W + (alpha / r) B A, with W frozen and alpha = r.

`add` wraps every linear layer of the blocks (attention and MLP) through peft and leaves A and B as the only trainable
weights; `merge` puts W + B A back in their place. What is saved is a plain encoder: nobody needs peft to load it.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Protocol, TypeGuard

from torch import nn

from aligntok.errors import UserError
from aligntok.models.encoder import Encoder


def add(encoder: Encoder, rank: int) -> None:
    """Wrap the linear layers of the encoder's blocks in place; the output does not change, since B starts at 0.

    Raises:
        UserError: peft is missing, or the rank is not positive.
    """
    peft = require_peft(rank)
    linears = [name for name, module in encoder.blocks.named_modules() if isinstance(module, nn.Linear)]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=linears)
    peft.inject_adapter_in_model(config, encoder.blocks)


def require_peft(rank: int) -> ModuleType:
    """peft, or UserError: it is missing, or the rank is not positive."""
    if rank < 1:
        raise UserError(f"encoder.lora_rank is {rank}, expected a positive number, e.g. 16, or null for no LoRA")
    try:
        return import_module("peft")
    except ImportError as error:
        raise UserError(
            f"encoder.lora_rank is {rank}, but peft cannot be imported ({error}): pip install 'aligntok[peft]'"
        ) from error


def train_only_lora(encoder: nn.Module) -> None:
    """Freeze everything but the LoRA weights, in an encoder that has them; leave another as it is."""
    if not _wrapped(encoder):
        return
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merge(encoder: nn.Module) -> None:
    """Replace every wrapped layer by a plain one with W + B A; does nothing to an encoder without LoRA."""
    for name, layer in _wrapped(encoder):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, layer.get_base_layer())


class _Wrapped(Protocol):
    """What `merge` needs of peft's layers."""

    def merge(self) -> None: ...

    def get_base_layer(self) -> nn.Module: ...


def _is_wrapped(layer: nn.Module) -> TypeGuard[_Wrapped]:
    return hasattr(layer, "lora_A")


def _wrapped(module: nn.Module) -> list[tuple[str, _Wrapped]]:
    return [(name, layer) for name, layer in module.named_modules() if _is_wrapped(layer)]
