"""Imports diffusers before the tests do, with the checkout's own root off the import path.

`python -m pytest` puts it there, and the folder `kernels` then passes for the package of that name, whose version
transformers (which diffusers imports) asks for.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != ROOT])
    import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
