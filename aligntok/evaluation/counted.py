"""Distances whose name says of how many pictures they are: FID of 6,000 is larger than that of 30,000 of one generator.

gFID-6K              6,000 pictures against 6,000 real ones, or against moments of a number that the file hides
gFID-6K-vs-40504     the same pictures against 40,504 real ones
"""

from __future__ import annotations

import re
from dataclasses import replace

from aligntok.errors import UserError
from aligntok.evaluation.tokenizer import Measured

_BIASED = re.compile(r"gFID|gFD-|sFID|sFD-")


def count_of(text: str) -> int:
    """6000 of "6K" or "6000".

    Raises:
        UserError: neither a number nor one of thousands.
    """
    found = re.fullmatch(r"([1-9]\d*)(K?)", text.strip().upper())
    if found is None:
        raise UserError(f"--fid_count is {text!r}, expected a number of pictures like 6K, 30K or 29696")
    return int(found[1]) * (1000 if found[2] else 1)


def called(count: int) -> str:
    """ "6K" of 6000; other numbers as they are."""
    return f"{count // 1000}K" if count and count % 1000 == 0 else str(count)


def check_count(wanted: str | None, count: int, what: str, remedy: str) -> None:
    """UserError unless there are as many as the name says; None = any number.

    Args:
        wanted: --fid_count.
        count: how many there are.
        what: of what, and where.
        remedy: what to do.
    """
    if wanted is not None and count != count_of(wanted):
        raise UserError(
            f"--fid_count {wanted} names {count_of(wanted)} pictures, and there are {count} {what}: {remedy}"
        )


def with_counts(found: dict[str, Measured], count: int, reference: int | None) -> dict[str, Measured]:
    """Numbers under names with the count of pictures, where the count decides what they are.

    Args:
        found: tables of numbers.
        count: generated pictures.
        reference: real ones; None = a file of moments, which does not say.
    """
    end = called(count) + ("" if reference in (None, count) else f"-vs-{called(reference or 0)}")

    def name(metric: str) -> str:
        return f"{metric}-{end}" if _BIASED.match(metric) else metric

    return {
        title: replace(
            measured,
            values={name(key): value for key, value in measured.values.items()},
            left_out={name(key): reason for key, reason in measured.left_out.items()},
        )
        for title, measured in found.items()
    }
