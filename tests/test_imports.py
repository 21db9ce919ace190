"""Imports run one way: no circle among files, and between rooms only towards what a room may stand on.

Everything counts: imports inside functions and those under TYPE_CHECKING too. `aligntok` itself names its public
objects as strings, as models/tokenizer.py does with the tokenizers of folders; both import on use.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms of one line may import those of the lines above it, and the rooms of one line not each other.
ORDER = (
    ("aligntok.errors", "aligntok._cuda_toolkit", "aligntok._C"),
    ("aligntok.config", "aligntok.kernels"),
    ("aligntok.runtime",),
    ("aligntok.data",),
    ("aligntok.models", "aligntok.losses", "aligntok.diffusion", "aligntok.report"),
    ("aligntok.training",),
    ("aligntok.zoo",),
    ("aligntok.evaluation",),
    ("aligntok.study", "aligntok.diffusers"),
    ("aligntok.commands",),
    ("aligntok.cli",),
    ("aligntok.__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package and its file; kernels/ is aligntok.kernels."""
    found = {}
    for folder, prefix in (("aligntok", ""), ("kernels", "aligntok.")):
        for file in sorted((root / folder).rglob("*.py")):
            name = prefix + ".".join(file.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


def imports(name: str, file: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """(module of the package, line) of every import in a file."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            named = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, member in named:
            whole = f"{base}.{member}"
            if (target := whole if whole in known or whole == "aligntok._C" else base).split(".")[0] == "aligntok":
                yield target, node.lineno


def room(module: str) -> str:
    """The folder or file at the root of the package that a module belongs to."""
    return ".".join(module.split(".")[:2])


def violations(known: dict[str, Path]) -> list[str]:
    """`file:line` and what is wrong, for every import from a room that this one must not know."""
    found = []
    for name, file in known.items():
        if name == "aligntok":
            continue
        for target, line in imports(name, file, known):
            here, there = room(name), room(target)
            if there != here and not (there in LEVEL and LEVEL[there] < LEVEL[here]):
                found.append(f"{file}:{line}: {name} imports {target}, but {here} must not know {there}")
    return found


def circle(known: dict[str, Path]) -> list[str]:
    """Modules that import each other in a circle, [] where there is none."""
    arrows = {
        name: {target for target, _ in imports(name, file, known)} - {name, "aligntok"} for name, file in known.items()
    }
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_room_has_its_place_in_the_order():
    assert {room(name) for name in modules()} - {"aligntok"} <= LEVEL.keys()


def test_imports_run_towards_the_kernels():
    assert violations(modules()) == []


def test_no_circle():
    assert circle(modules()) == []


@pytest.mark.parametrize(
    ("importer", "line", "told"),
    [
        ("models/adapter.py", "from aligntok.training import loop", "aligntok.models must not know aligntok.training"),
        ("losses/semantic.py", "def f():\n    import aligntok.zoo.vae", "aligntok.losses must not know aligntok.zoo"),
        ("data/images.py", "import aligntok", "aligntok.data must not know aligntok"),
    ],
)
def test_an_upward_import_is_named_with_its_line(importer, line, told, tmp_path):
    for path in ("aligntok/training/loop.py", "aligntok/zoo/vae.py", "kernels/adaln.py", "aligntok/__init__.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    file = tmp_path / "aligntok" / importer
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{line}\n")
    [found] = violations(modules(tmp_path))
    assert found.startswith(f"{file}:{len(line.splitlines())}: ") and told in found


def test_a_circle_is_found(tmp_path):
    (tmp_path / "aligntok/runtime").mkdir(parents=True)
    (tmp_path / "aligntok/runtime/a.py").write_text("from aligntok.runtime import b")
    (tmp_path / "aligntok/runtime/b.py").write_text("def f():\n    from aligntok.runtime.a import x")
    assert set(circle(modules(tmp_path))) == {"aligntok.runtime.a", "aligntok.runtime.b"}
