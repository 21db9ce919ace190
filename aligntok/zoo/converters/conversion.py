"""Published checkpoints into our modules, with every tensor of the file accounted for.

A converter says for each of our names which of theirs it is made of (several are concatenated on the first axis: q,
k, v into a packed qkv) and which of theirs it leaves out and why. Anything else - a key missing, left over or
misshapen - is one error. Files are read without executing anything that they hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from aligntok.errors import UserError
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.runtime.weights import faults, few

STATISTICS = {"latent_mean", "latent_std"}  # published files of a tokenizer do not hold them
Sources = Callable[[str], Sequence[str]]  # our name -> theirs; empty for what the file does not hold
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28, 2048: 16}  # width -> heads of the published networks


@dataclass
class Report:
    """What a conversion did."""

    what: str
    converted: int  # tensors of the file that are in the result
    ignored: dict[str, int]  # reason -> tensors of the file that are not
    notes: list[str]

    def __str__(self) -> str:
        lines = [f"{self.what}: converted {self.converted} tensors"]
        lines += [f"  left out {count}: {reason}" for reason, count in self.ignored.items()]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def described(tokenizer: StoredTokenizer) -> str:
    """A converted tokenizer in one line: parameters of its parts, latents, and what generators know it by."""
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in tokenizer.named_children()}
    parts = ", ".join(f"{name} {size / 1e6:.2f} M" for name, size in sizes.items() if size)
    known = (
        f"fingerprint {tokenizer.fingerprint()}"
        if tokenizer.has_statistics
        else "no latent statistics: run aligntok statistics before training a generator on it"
    )
    return f"{parts}; {tokenizer.latent_channels} channels at f{tokenizer.downsample}; {known}"


def renamed(rules: list[tuple[str, str]], name: str) -> str:
    """`name` after every substitution (pattern, replacement), in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def fill(
    module: nn.Module, state: dict[str, Tensor], sources: Sources, ignored: dict[str, str], path: Path, what: str
) -> Report:
    """Load `state`, in the published layout, into `module`.

    Args:
        sources: which published tensors each of the module's is made of.
        ignored: pattern of published names -> why they are left out.

    Raises:
        UserError: names the first missing, unexpected and misshapen tensors, in the published layout.
    """
    own = module.state_dict()
    plan = {name: theirs for name in own if (theirs := sources(name))}
    wanted = {theirs for names in plan.values() for theirs in names}
    skipped: dict[str, int] = {}
    unexpected = []
    for name in state:
        if name not in wanted:
            reason = next((why for pattern, why in ignored.items() if re.match(pattern, name)), None)
            if reason is None:
                unexpected.append(name)
            else:
                skipped[reason] = skipped.get(reason, 0) + 1
    missing = sorted(wanted - state.keys())
    misshapen, filled = [], {}
    for name, theirs in plan.items():
        expected = [own[name].shape[0] // len(theirs), *own[name].shape[1:]] if len(theirs) > 1 else own[name].shape
        held = [part for part in theirs if part in state]
        wrong = [part for part in held if list(state[part].shape) != list(expected)]
        misshapen += [f"{part} {list(state[part].shape)} instead of {list(expected)}" for part in wrong]
        if held == list(theirs) and not wrong:
            value = state[theirs[0]] if len(theirs) == 1 else torch.cat([state[part] for part in theirs])
            filled[name] = value.to(own[name].dtype)
    if told := faults(missing, unexpected, misshapen):
        raise UserError(f"{path} is not a {what} of the published layout: {told}")
    module.load_state_dict(own | filled)
    return Report(what, len(wanted), skipped, [])


def require(state: dict[str, Tensor], name: str, path: Path, what: str) -> Tensor:
    """A tensor of the file; UserError where it is missing."""
    if name not in state:
        raise UserError(f"{path} is not a {what} of the published layout: {name} is missing (has {few(list(state))})")
    return state[name]


def require_shape(state: dict[str, Tensor], name: str, path: Path, what: str, axes: int) -> torch.Size:
    """Shape of a tensor that sizes are read from; UserError where it is missing, empty or has not so many axes."""
    shape = require(state, name, path, what).shape
    if len(shape) != axes or 0 in shape:
        raise UserError(
            f"{path} is not a {what} of the published layout: {name} is {list(shape)}, expected {axes} axes"
        )
    return shape


def count(state: dict[str, Tensor], pattern: str) -> int:
    """One more than the largest number that `pattern`'s group matches in the names, 0 where it matches none."""
    return max((int(found[1]) + 1 for name in state if (found := re.match(pattern, name))), default=0)


def heads_of(width: int, path: Path) -> int:
    """Attention heads of a published width, which no tensor tells."""
    if width not in HEADS:
        raise UserError(f"{path} is {width} wide, expected one of the published widths {', '.join(map(str, HEADS))}")
    return HEADS[width]


def side_of(tokens: int, path: Path) -> int:
    """Side of a square grid of tokens."""
    side = round(tokens**0.5)
    if side * side != tokens:
        raise UserError(f"{path} has positions for {tokens} tokens, expected a square grid")
    return side
