"""How many pictures a set was found to have, how many are used, and what became of the others: counted and named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

# What Pillow reads without plugins of others, by the ends of its names
EXTENSIONS = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2",
    ".ppm", ".pgm", ".pbm", ".tga",
}  # fmt: skip
SHRUNK = 0.1  # share of a set that is missing from which on it is a warning
_TOOLS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "__pycache__", "system volume information"}
_SHOWN = 3  # names for each reason


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is nobody's picture: hidden, or made by a tool."""
    return name.startswith(".") or name.lower() in _TOOLS


def unreadable(count: int, total: int) -> str:
    """How many of a set's pictures cannot be read, as a line for the user; a warning where they are many."""
    warning = "WARNING: " if count >= SHRUNK * total else ""
    return f"{warning}{count:,} of {total:,} images cannot be read and are left out"


@dataclass
class Found:
    """What is left out of a set, by reason: how many pictures, and the first names."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, name: str, count: int = 1) -> None:
        """A picture, or `count` pictures in a folder of that name, will not be used."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        shown = self.examples.setdefault(reason, [])
        if len(shown) < _SHOWN:
            shown.append(name)

    def add(self, other: Found, prefix: str = "") -> None:
        """Take in what is left out of a part of the set, whose names begin with `prefix`."""
        for reason, names in other.examples.items():
            self.leave_out(reason, prefix + names[0], other.counts[reason])
            for name in names[1:]:
                self.leave_out(reason, prefix + name, 0)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def lines(self, name: str, used: int, taken: int) -> Iterator[str]:
        """For the user: what was found, and each reason for leaving something out; a set that shrank is a warning.

        Args:
            name: of the set.
            used: pictures that can be used...
            taken: ...and how many of them a limit on their number takes.
        """
        missing = self.total
        warning = "WARNING: " if missing and missing >= SHRUNK * (used + missing) else ""
        left = f", {missing:,} left out" if missing else ""
        chosen = f", {taken:,} of them taken (the limit on images)" if taken < used else ""
        yield f"{warning}images: {name}: {used + missing:,} found, {used:,} used{left}{chosen}"
        yield from self.reasons()

    def reasons(self) -> Iterator[str]:
        """Each reason with its number and the first names."""
        for reason, count in self.counts.items():
            names = self.examples[reason]
            more = ", ..." if count > len(names) else ""
            yield f"  {f'{count:,} ' if count else ''}{reason}: {', '.join(names)}{more}"
