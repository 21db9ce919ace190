"""Weights that come from outside: one reader for everything that training scripts and hubs wrap around a state dict.

    where    a file of safetensors or torch.save; a folder as hubs have it: whole, sharded with an index, or only in a
             variant such as fp16
    within   a state dict at the top, or under a key such as "state_dict", "model" or "ema", several deep
    names    without the prefixes of DistributedDataParallel, FSDP, torch.compile and checkpoint wrappers, wherever in a
             name they stand; `model_ema.NAME` (LDM's LitEma, whose names have no dots, and timm's) in place of NAME

Nothing that a file holds is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from aligntok.errors import UserError
from aligntok.runtime.weights import few, in_short, read_object

# Moving averages first: they are what a publication's numbers were taken with.
WRAPPERS = (
    "ema",
    "ema_state_dict",
    "model_ema",
    "params_ema",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "params",
    "net",
)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # in a folder, the first kind that is there
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|ema|non_ema)(?=\.)")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_IN_FRONT = re.compile(r"^(?:module\.)+")
_ANYWHERE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGE = re.compile(r"^model_ema\.(?:module\.)?")
_COUNTERS = {"n_averaged", "model_ema.decay", "model_ema.num_updates"}  # of averages, not weights


def read_published(path: str | Path, wrappers: Sequence[str] = WRAPPERS) -> dict[str, Tensor]:
    """Names and tensors of weights from outside; see the module's docstring.

    Args:
        path: a file, the index of a sharded one (.index.json), or a folder that holds one of them.
        wrappers: keys under which a state dict may lie, the preferred one first.

    Raises:
        UserError: nothing there, several things to choose from, a file that cannot be read safely, a shard that is
            missing, or no state dict.
    """
    file = weight_file(path)
    return plain_names(_read_shards(file) if file.name.endswith(".json") else _unwrapped(file, wrappers), file)


def weight_file(path: str | Path) -> Path:
    """The file of weights at `path`: itself, or the one of a folder that a hub's tools would read.

    Raises:
        UserError: nothing there, or several files in a folder between which nothing decides.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"there is no file {path}: give one of weights, .safetensors or of torch.save")
    indices = [file for file in path.glob("*.json") if ".index." in file.name]
    for suffix in _SUFFIXES:
        found = [file for file in path.glob(f"*{suffix}") if not _SHARD.search(file.name)]
        found += [file for file in indices if f"{suffix}.index." in _VARIANT.sub("", file.name)]
        found = [file for file in found if not _VARIANT.search(file.name)] or found
        if len(found) > 1:
            raise UserError(f"{path} holds several weights ({few(sorted(f.name for f in found))}): name one of them")
        if found:
            return found[0]
    raise UserError(f"{path} holds no weights: expected a file ending in {', '.join(_SUFFIXES)}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names."""
    try:
        names: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = sorted({str(shard) for shard in names.values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of sharded weights ({in_short(error)})") from error
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing or not shards:
        raise UserError(f"{len(missing)} of the {len(shards)} files that {index} names are missing: {few(missing)}")
    held: dict[str, Tensor] = {}
    for shard in shards:
        held |= _unwrapped(index.parent / shard, ())
    if absent := sorted(names.keys() - held.keys()):
        raise UserError(f"{index} names {len(absent)} tensors that its files do not hold: {few(absent)}")
    return held


def _unwrapped(file: Path, wrappers: Sequence[str]) -> dict[str, Tensor]:
    """The state dict of a file, from under as many wrappers as lie around it."""
    found: Any = read_object(file)
    while isinstance(found, Mapping) and not any(isinstance(value, Tensor) for value in found.values()):
        inside = next((found[key] for key in wrappers if isinstance(found.get(key), Mapping) and found[key]), None)
        if inside is None:
            break
        found = inside
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        places = ", ".join(wrappers)
        raise UserError(f"{file} holds no state dict (names to tensors) at its top{places and ' or under '}{places}")
    return dict(found)


def plain_names(state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """`state` under the names of the bare network, moving averages in the place of the weights they belong to.

    Raises:
        UserError: two tensors have the same name once the prefixes are gone.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        plain = _ANYWHERE.sub("", _IN_FRONT.sub("", _ANYWHERE.sub("", name)))
        if plain in found:
            raise UserError(f"{file} holds {plain} twice, once as {name}: it is not the state dict of one network")
        if plain not in _COUNTERS:
            found[plain] = value
    averages = {name: found.pop(name) for name in list(found) if name.startswith("model_ema.")}
    return _averaged(found, averages) if averages else found


def _averaged(state: dict[str, Tensor], averages: dict[str, Tensor]) -> dict[str, Tensor]:
    """Averages by the name of their weight; those that belong to none keep theirs, for the caller to complain of."""
    dotless: dict[str, str] = {}
    for name in state:
        for own in {name, name.removeprefix("model.")}:
            dotless.setdefault(own.replace(".", ""), name)
    result = dict(state)
    for name, value in averages.items():
        own = _AVERAGE.sub("", name)
        result[dotless.get(own.replace(".", ""), name if state else own)] = value
    return result
