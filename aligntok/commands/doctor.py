"""What is installed, what was compiled, what would run here, and for everything that is missing: why.

`report()` is the list, `print_report()` the same for a person. Nothing that is broken in the environment
stops it: the error of a failed import is the reason that gets printed.
"""

import importlib
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from aligntok import _cuda_toolkit as cuda_toolkit
from aligntok.runtime.machine import devices, first_line

if TYPE_CHECKING:
    pass

# Import names that differ from the distribution's name by more than a dash.
_MODULES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "nvidia-dali-cuda120": "nvidia.dali",
    "nvidia-dali-cuda130": "nvidia.dali",
}
_APEX_HINT = "optional; build it from NVIDIA's repository (the package of this name on PyPI is another project)"
# Environment variables that change what is built or selected; docs/environment.md explains each.
_VARIABLES = (
    "ALIGNTOK_KERNELS",
    "ATEN_CPU_CAPABILITY",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "FORCE_BUILD",
    "MAX_JOBS",
    "OMP_NUM_THREADS",
    "SKIP_CUDA_BUILD",
    "TORCH_CUDA_ARCH_LIST",
    "TRITON_INTERPRET",
)


class Row(NamedTuple):
    """One finding: its section, what it is about, what was found, and the reason or the remedy."""

    section: str
    name: str
    value: str
    note: str


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # any failure of a foreign import is a finding, not our crash
        return first_line(error)
    return None


def _system() -> Iterator[Row]:
    section = "System"
    yield Row(section, "aligntok", _version("aligntok") or "not installed", "")
    yield Row(section, "Python", platform.python_version(), sys.executable)
    yield Row(section, "platform", platform.platform(), "")
    for name in _VARIABLES:
        if name in os.environ:
            yield Row(section, name, os.environ[name], "environment variable; see docs/environment.md")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> Iterator[tuple[str, str, str | None]]:
    """Distribution, version range and extra (None for a dependency) of everything that aligntok names."""
    for line in metadata.requires("aligntok") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        parts = re.match(r"([\w.-]+)(\[.*?\])?(.*)", requirement.strip())
        assert parts is not None  # a requirement begins with a name
        name, _, versions = parts.groups()
        yield name, versions.strip(), extra.group(1) if extra else None


def _packages() -> Iterator[Row]:
    section = "Packages"
    try:
        requirements = list(_requirements())
    except metadata.PackageNotFoundError:
        yield Row(section, "aligntok", "not installed", "run `pip install -e .` in its folder")
        return
    for name, versions, extra in [*requirements, ("apex", "", "apex")]:
        if extra == "dev":
            continue
        version = _version(name)
        if version is None and extra is None:
            yield Row(section, name, "absent", f"required: pip install '{name}{versions}'")
        elif version is None:
            hint = _APEX_HINT if name == "apex" else f"optional: pip install 'aligntok[{extra}]'"
            yield Row(section, name, "absent", hint)
        else:
            error = _import_error(_MODULES.get(name.lower(), name.replace("-", "_")))
            yield Row(section, name, version, f"does not import: {error}" if error else "")


def _devices() -> Iterator[Row]:
    for name, value, note in devices():
        yield Row("Devices", name, value, note)


def _toolkit() -> Iterator[Row]:
    section = "CUDA toolkit"
    toolkit, reason = cuda_toolkit.find_toolkit()
    if toolkit is None:
        yield Row(section, "nvcc", "absent", reason or "")
        return
    yield Row(section, "nvcc", toolkit.release, str(toolkit.home))
    yield Row(section, "architectures", cuda_toolkit.architectures(os.environ), "what a build would compile for")


def _extension() -> Iterator[Row]:
    from aligntok.kernels import _extension as extension

    section = "Extension"
    info, report = extension.build_info(), extension.build_report() or {}
    if info is None:
        yield Row(section, "aligntok._C", "not used", extension.unavailable() or "")
    else:
        openmp = "OpenMP" if info["openmp"] else "one thread: compiled without OpenMP"
        yield Row(section, "aligntok._C", f"built for torch {report['torch']}", openmp)
        yield Row(section, "compiler", info["compiler"], info["flags"])
    cuda = report.get("cuda")
    if cuda and cuda["built"]:
        yield Row(section, "CUDA part", "built", " ".join(cuda["architectures"]))
    elif cuda:
        yield Row(section, "CUDA part", f"not built ({cuda['reason']})", "")


def _operators() -> Iterator[Row]:
    import torch

    from aligntok import kernels

    section = "Operators"
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for op in kernels.operators():
            found = kernels.explain(op, device)
            reasons = "; ".join(f"not {name}: {reason}" for name, reason in found.rejected.items())
            origin = "" if found.requested == "auto" else f"{found.requested} was requested"
            note = "; ".join(part for part in (origin, reasons) if part)
            yield Row(section, f"{op} on {device}", found.name or "none: calls raise", note)


def _attention() -> Iterator[Row]:
    import torch

    from aligntok.models.attention import BACKENDS, FUSED_TOKENS, choose, refusal

    section = "Attention"
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        case = device, torch.bfloat16, 64  # a typical head
        for tokens in (FUSED_TOKENS, 4 * FUSED_TOKENS):
            chosen = choose("auto", *case, tokens)
            yield Row(section, f"auto on {device}, {tokens} tokens", chosen, "model.attention chooses another")
        for backend in BACKENDS[1:]:
            reason = refusal(backend, *case)
            yield Row(section, f"{backend} on {device}", "unavailable" if reason else "available", reason or "")


def _loader() -> Iterator[Row]:
    from aligntok.data.dali_graph import refusal

    section, reason = "Image loader", refusal()
    yield Row(section, "DALI", "unavailable" if reason else "available", reason or "auto takes it where most are JPEG")
    yield Row(section, "torchvision", "available", "data.loader chooses")


_SECTIONS: tuple[tuple[str, Callable[[], Iterator[Row]]], ...] = (
    ("System", _system),
    ("Packages", _packages),
    ("Devices", _devices),
    ("CUDA toolkit", _toolkit),
    ("Extension", _extension),
    ("Operators", _operators),
    ("Attention", _attention),
    ("Image loader", _loader),
)


def report() -> list[Row]:
    """Examine the environment; takes some seconds, because every package is really imported.

    Returns:
        Rows (section, name, value, note) in the order in which they are printed. A section that cannot be
        examined, for example because torch does not import, is one row whose note is the error.
    """
    rows: list[Row] = []
    for section, examine in _SECTIONS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                rows.extend(examine())
            except Exception as error:  # a broken environment is what this command is for
                rows.append(Row(section, "not examined", "", first_line(error)))
    return rows


def print_report() -> None:
    """Print `report()` as one table per section."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    with console.status("importing every package once"):
        rows = report()
    for section, _ in _SECTIONS:
        found = [row for row in rows if row.section == section]
        if not found:
            continue
        table = Table(
            title=section,
            title_justify="left",
            title_style="bold",
            show_header=False,
            box=None,
            pad_edge=False,
        )
        table.add_column(min_width=22, no_wrap=True)
        table.add_column(min_width=16)
        table.add_column(style="dim", overflow="fold")
        for row in found:
            table.add_row(Text(row.name), Text(row.value), Text(row.note))
        console.print(table)
        console.print()
