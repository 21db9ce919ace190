"""For the API reference: the public names where a reader imports them from, and docstrings as Markdown."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parent.parent


def lazy_names() -> dict[str, str]:
    """Public names of `aligntok` and the modules that they are imported from on use."""
    tree = ast.parse((ROOT / "aligntok" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "_PUBLIC":
            return ast.literal_eval(node.value)
    raise LookupError("aligntok/__init__.py has no _PUBLIC")


@cache
def kernel_names() -> dict[str, str]:
    """Public names of `aligntok.kernels` and the modules of kernels/ that define them."""
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.name: node.module for node in imports for alias in node.names}


def operators() -> dict[str, list[str]]:
    """Every operator, a file of kernels/ without an underscore, and its public functions."""
    names = kernel_names()
    files = sorted((ROOT / "kernels").glob("[!_]*.py"))
    return {file.stem: [name for name, module in names.items() if module == file.stem] for file in files}


def identifier(name: str) -> str:
    """Where a public name of `aligntok.kernels` is documented: in its module."""
    return f"aligntok.kernels.{kernel_names()[name]}.{name}"


def private_modules() -> dict[str, list[str]]:
    """Modules of kernels/ that are no operators, and their public names."""
    found: dict[str, list[str]] = {}
    for name, module in kernel_names().items():
        if module.startswith("_"):
            found.setdefault(module, []).append(name)
    return found


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
