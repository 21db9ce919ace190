"""For the API reference: the public names where a reader imports them from, and docstrings as Markdown."""

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))
from public_names import identifier, kernel_names, lazy_names, private_modules


class PublicNames(griffe.Extension):
    """`aligntok.kernels` is the folder kernels/, and `aligntok`'s names are imported on use: griffe sees neither."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Hang kernels/ below the package, and its lazy names into it."""
        if pkg.name != "aligntok":
            return
        kernels = loader.load("kernels", submodules=True)
        pkg.set_member("kernels", kernels)
        for name, module in lazy_names().items():
            pkg.set_member(name, griffe.Alias(name, f"{module}.{name}"))

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Docstrings are plain text: give names and papers their links."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Links for papers and for public names of the kernels; `a, b: ...` among arguments as two entries.

    What was done before stays as it is.
    """
    text = re.sub(r"(?<!\[)arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    text = re.sub(r"^(?! {4}).*\w\*\w.*$", lambda line: re.sub(r"(?<=\w)\*(?=\w)", r"\*", line[0]), text, flags=re.M)
    text = re.sub(r"^( {4}\w+: )>", r"\1\\>", text, flags=re.M)  # no quotation
    text = re.sub(r"^( {4})(\w+), (\w+): ", r"\1\2: see `\3`.\n\1\3: ", text, flags=re.M)
    targets = {name: identifier(name) for name in kernel_names()}
    targets |= {module: f"aligntok.kernels.{module}" for module in private_modules()}
    for name, target in targets.items():
        text = re.sub(f"(?<!\\[)`{name}`", f"[`{name}`][{target}]", text)
    return text
