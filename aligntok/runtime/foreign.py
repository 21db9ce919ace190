"""Importing other people's packages from inside a checkout of this project."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_our_kernels() -> Iterator[None]:
    """A context in which there is no package `kernels`.

    peft and diffusers import transformers, which looks for Hugging Face's `kernels`. Where Python was started in a
    checkout it would find the folder that is aligntok.kernels, and import every operator a second time.
    """
    known = sys.modules.get("kernels")
    if known is None:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # typeshed leaves it out: what Python takes for "cannot be imported"
    try:
        yield
    finally:
        if known is None:
            del sys.modules["kernels"]
