"""Where the weights of published scorers come from: a path, or a name on the hub with a revision; and what they are.

No package that is installed by pip alone carries weights of CLIP, HPSv2, PickScore or ImageReward.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from aligntok.errors import UserError
from aligntok.runtime.files import digest
from aligntok.runtime.published import weight_file
from aligntok.runtime.weights import in_short

T = TypeVar("T")
_FILES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}  # no hub name ends like that
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+|[\w.-]+)(?:@(?P<revision>[\w.-]+))?")


@dataclass(frozen=True)
class Place:
    """Weights as they were given: a path that exists, or a hub name and the revision that was asked for."""

    name: str
    revision: str | None
    local: bool


def place_of(option: str, given: str) -> Place:
    """A path, OWNER/NAME or OWNER/NAME@REVISION.

    Raises:
        UserError: neither; `option` is named in the message.
    """
    path = Path(given).expanduser()
    if path.exists():
        return Place(str(path), None, True)
    found = _HUB.fullmatch(given)
    if found is None or given.startswith((".", "-")) or Path(given).suffix in _FILES:
        raise UserError(f"--{option} {given}: there is no such file or folder, and a hub name is OWNER/NAME[@REVISION]")
    return Place(found["name"], found["revision"], False)


def hub_file(option: str, place: Place, name: str) -> tuple[Path, str, str]:
    """The file at `place`, on the hub by its `name` there; its SHA-256; and what to print of it."""
    if place.local:
        file = weight_file(place.name) if Path(place.name).is_dir() else Path(place.name)
        known = digest(file)
        return file, known, f"{file.name}, sha256 {known[:16]}"

    def fetch() -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(place.name, name, revision=place.revision))

    file = asked_of_hub(option, place, fetch)
    known = digest(file)
    return file, known, f"{place.name}@{file.parent.name[:12]}, {name}, sha256 {known[:16]}"


def from_pretrained(option: str, place: Place, kind: str) -> Any:
    """An object of transformers' class `kind` at `place`.

    Raises:
        UserError: transformers is absent, or the place does not hold what the class asks for.
    """

    def load() -> Any:
        import transformers

        more = {"local_files_only": True} if place.local else {"revision": place.revision}
        return getattr(transformers, kind).from_pretrained(place.name, **more)

    return asked_of_hub(option, place, load)


def told_pretrained(place: Place, model: Any) -> str:
    """What to print of a model that `from_pretrained` made: the hub's commit, or the hash of the local weights."""
    if not place.local:
        commit = getattr(model.config, "_commit_hash", None) or place.revision or "unknown revision"
        return f"{place.name}@{commit[:12]}"
    file = weight_file(place.name)
    shards = [file]
    if file.name.endswith(".json"):
        shards = sorted({file.parent / name for name in json.loads(file.read_text())["weight_map"].values()})
    joined = digest(file) if len(shards) == 1 else hashlib.sha256("".join(map(digest, shards)).encode()).hexdigest()
    return f"{Path(place.name).resolve().name}, sha256 {joined[:16]}"


def asked_of_hub(option: str, place: Place, load: Callable[[], T]) -> T:
    """What `load` gives; whatever it raises becomes one line with the option's name."""
    try:
        return load()
    except ImportError as error:
        raise UserError(
            f"--{option} needs a package that is absent ({error}): pip install 'aligntok[t2i-metrics]'"
        ) from error
    except Exception as error:  # network, hub and libraries each raise their own
        where = "holds no such model" if place.local else "could not be had from the hub"
        raise UserError(
            f"--{option}: {place.name} {where} ({in_short(error)}): give a folder or file that holds it"
        ) from error
