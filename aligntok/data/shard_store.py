"""Caches on disk that are made shard by shard, once, by any number of processes, and survive being killed.

    cache.json             what it is made from (an Origin), and once complete its shards with rows, bytes and SHA-256
    STEM-00000.safetensors a shard
    STEM-00000.json        its record; cache.json is put together from these

A shard whose record and checksum are right is never made again; one that is missing, truncated or damaged is, and is
named. Process r of n makes the shards r, r + n, ...; none waits for another before the end. Every file is written
atomically, a shard before its record: one without a record counts for nothing. The latent cache
(aligntok.data.latent_format) and the text cache (aligntok.data.text_format) are such.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from aligntok.errors import UserError
from aligntok.runtime.files import digest, remove_unfinished, write_bytes
from aligntok.runtime.world import World

MANIFEST = "cache.json"
Record = dict[str, Any]
Progress = Callable[[int, int], None]
Say = Callable[[str], None]
Kind = TypeVar("Kind", bound="ShardedOrigin")


@dataclass(frozen=True)
class Layout:
    """One kind of cache: what its manifest calls itself, and how the names of its files begin."""

    format: str
    version: int
    stem: str
    kept: tuple[str, ...] = ("file", "rows", "bytes", "sha256")  # of a shard's record in cache.json

    def shard_file(self, number: int) -> str:
        return f"{self.stem}-{number:05d}.safetensors"

    def record_file(self, number: int) -> str:
        return f"{self.stem}-{number:05d}.json"

    def read_manifest(self, folder: Path) -> Record | None:
        """cache.json, or None where there is none.

        Raises:
            UserError: it cannot be read, or is something else.
        """
        file = folder / MANIFEST
        try:
            manifest = json.loads(file.read_text())
            if (manifest["format"], manifest["version"]) == (self.format, self.version):
                return manifest
            found = f"format {manifest['format']!r} version {manifest['version']!r}"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            found = f"nothing that can be read ({type(error).__name__}: {error})"
        raise UserError(
            f"{file} has {found}, expected {self.format!r} version {self.version}: give another folder, or remove this "
            "one"
        )


class ShardedOrigin:
    """Everything that decides what is in a cache: a frozen dataclass, in the folder before anything else is.

    Attributes:
        shard_size: rows of a shard, before unreadable ones are left out.
    """

    shard_size: int
    TOLD: tuple[str, ...] = ()  # fields that are for people and decide nothing

    @property
    def row_count(self) -> int:
        """Rows of all shards, before unreadable ones are left out."""
        raise NotImplementedError

    @property
    def shards(self) -> int:
        return -(-self.row_count // self.shard_size)

    def numbers(self, shard: int) -> range:
        """Numbers of the rows that a shard is made of."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.row_count))

    def fingerprint(self) -> str:
        """Short hash of all of it."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def check(self: Kind, wanted: Kind, folder: Path) -> None:
        """Refuse to mix caches.

        Raises:
            UserError: `wanted` would put other numbers into `folder`.
        """
        known = (field.name for field in fields(self) if field.name not in self.TOLD)  # type: ignore[arg-type]
        names = [name for name in known if getattr(self, name) != getattr(wanted, name)]
        if names:
            what = self.told_apart(wanted, names)
            raise UserError(f"{folder} has a cache that was made {what}: give another --output, or remove that folder")

    def told_apart(self: Kind, wanted: Kind, names: list[str]) -> str:
        """How a cache differs from a wanted one in the fields `names`, after "a cache that was made"."""
        return "with " + ", ".join(f"{n} {getattr(self, n)} (given {getattr(wanted, n)})" for n in names)


def origin_from(cls: type[Kind], manifest: Record) -> Kind:
    return cls(**{field.name: manifest[field.name] for field in fields(cls)})  # type: ignore[arg-type]


def shard_problem(folder: Path, record: Record) -> str | None:
    """What is wrong with a shard at first sight, None where nothing is; its contents are not read."""
    try:
        size = (folder / record["file"]).stat().st_size
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if size == record["bytes"] else f"has {size} bytes, expected {record['bytes']}"


@dataclass
class ShardStore:
    """The folder of one cache, for writing."""

    folder: Path
    layout: Layout
    origin: ShardedOrigin
    say: Say

    def claim(self) -> None:
        """Leave `origin` in the folder, or find it there.

        Raises:
            UserError: the folder has a cache with another origin.
        """
        manifest = self.layout.read_manifest(self.folder)
        if manifest is None:
            write_bytes(self.folder / MANIFEST, self._manifest(complete=False))
        else:
            found = origin_from(type(self.origin), manifest)
            found.check(self.origin, self.folder)
            self.origin = found  # what is for people stays as it was told first: the records of shards hash it too

    def missing(self, world: World, progress: Progress) -> tuple[list[int], int, int]:
        """The shards of this process that are not there, or not sound; rows done and all rows of this process."""
        own = range(world.rank, self.origin.shards, world.size)
        total, done = sum(len(self.origin.numbers(shard)) for shard in own), 0
        progress(done, total)
        missing = []
        for shard in own:
            if self._is_sound(shard):
                done += len(self.origin.numbers(shard))
                progress(done, total)
            else:
                missing.append(shard)
        return missing, done, total

    def save(self, shard: int, tensors: dict[str, Tensor], rows: int, **contents: Any) -> None:
        """Write a shard, then its record with `contents` in it."""
        from safetensors.torch import save

        data = save(tensors)
        write_bytes(self.folder / self.layout.shard_file(shard), data)
        record = {
            "origin": self.origin.fingerprint(),
            "file": self.layout.shard_file(shard),
            "rows": rows,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            **contents,
        }
        write_bytes(self.folder / self.layout.record_file(shard), json.dumps(record).encode())

    def finish(self, summarise: Callable[[list[Record]], Record]) -> Record:
        """Put cache.json together from the records of all shards; returns it.

        Args:
            summarise: what cache.json says besides, from the records.

        Raises:
            UserError: a shard has vanished in the meantime.
        """
        files = [self.folder / self.layout.record_file(number) for number in range(self.origin.shards)]
        records = [json.loads(file.read_text()) for file in files]
        problems = [f"{r['file']} {problem}" for r in records if (problem := shard_problem(self.folder, r))]
        if problems:
            raise UserError(f"{self.folder}: {problems[0]}; give the same command again to make it anew")
        summary = summarise(records)
        shards = [{key: record[key] for key in self.layout.kept} for record in records]
        document = self._manifest(complete=True, **summary, shards=shards)
        write_bytes(self.folder / MANIFEST, document)
        remove_unfinished(self.folder, lambda name: name == MANIFEST or name.startswith(f"{self.layout.stem}-"))
        return json.loads(document)

    def _is_sound(self, shard: int) -> bool:
        """Whether a shard is finished and has the checksum that its record says; a damaged one is named."""
        try:
            record = json.loads((self.folder / self.layout.record_file(shard)).read_text())
            problem = shard_problem(self.folder, record)
            if record["origin"] != self.origin.fingerprint():
                problem = "is a shard of another cache"
            elif problem is None and digest(self.folder / record["file"]) != record["sha256"]:
                problem = "differs from its checksum"
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"has a record that cannot be read ({type(error).__name__}: {error})"
        if problem is not None:
            self.say(f"{self.layout.shard_file(shard)} {problem}; it is made anew")
        return problem is None

    def _manifest(self, complete: bool, **contents: Any) -> bytes:
        about = {"format": self.layout.format, "version": self.layout.version, "complete": complete}
        return json.dumps({**about, **asdict(self.origin), **contents}, indent=1).encode()  # type: ignore[call-overload]
