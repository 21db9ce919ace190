"""The public names of `aligntok` and `aligntok.kernels`, read from the sources: nothing is imported."""

import ast
from functools import cache
from pathlib import Path

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
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    modules = {node: str(node.module).removeprefix("aligntok.kernels").removeprefix(".") for node in imports}
    return {alias.name: module for node, module in modules.items() if module for alias in node.names}


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
