"""How transformer blocks run in training: recomputed in the backward pass, compiled one by one.

    full        a block keeps its inputs only and runs a second time in the backward pass
    selective   it also keeps what matrix products and attention gave; norms, modulation and activations run again

Either gives the gradients of "none" to the bit. Compilation takes every block as one graph, or fails with the reason;
blocks of one kind share their graphs, however many there are. Where batches come in several shapes, every shape has
graphs of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from aligntok.errors import UserError

MODES = ("none", "selective", "full")
# PyTorch's limits, behind which a block would not be compiled any more: here for each shape
_GRAPHS = {"recompile_limit": 8, "accumulated_recompile_limit": 256}
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear")  # a linear layer by any path through the dispatcher
_ATTENTION = ("attention", "attn")  # in the names of PyTorch's, flash-attn's, xformers' and our own operators


def prepare(blocks: Iterable[nn.Module], checkpointing: str, compile: bool, shapes: int = 1) -> None:
    """Let the blocks run as `training.checkpointing` and `training.compile` say, in place, until `restore`.

    Args:
        shapes: in how many of them batches come.

    Raises:
        UserError: an unknown mode.
    """
    if checkpointing not in MODES:
        raise UserError(f"training.checkpointing is {checkpointing!r}, expected one of {', '.join(MODES)}")
    if compile:
        # What a part before this one has compiled counts against the limit of graphs, and is not needed any more
        torch.compiler.reset()
        for name, allowed in _GRAPHS.items():
            limit = max(getattr(torch._dynamo.config, name), allowed * shapes)
            setattr(torch._dynamo.config, name, limit)
    for block in blocks:
        forward = block.forward
        if checkpointing != "none":
            forward = _recomputed(forward, selective=checkpointing == "selective")
        if compile:
            # Never for sizes that vary: which graph a step runs would depend on what other sizes came before
            forward = torch.compile(forward, fullgraph=True, dynamic=False)
        if forward is not block.forward:
            block.forward = forward


def restore(blocks: Iterable[nn.Module]) -> None:
    """Undo `prepare`: blocks that are copied must not run their originals."""
    for block in blocks:
        vars(block).pop("forward", None)


def _recomputed(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def run(*arguments: Any, **named: Any) -> Any:
        return checkpoint(forward, *arguments, **options, **named)

    return run


def _policy(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    name = operator.name() if isinstance(operator, torch._ops.OpOverload) else str(operator)
    kept = name.split(".")[0] in _PRODUCTS or any(word in name for word in _ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
