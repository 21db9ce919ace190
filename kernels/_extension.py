"""Load the compiled extension `aligntok._C`, or say why not.

A library of operators that was compiled for another torch ends in undefined symbols or worse. The build
therefore leaves a report beside the library, `_C.<tag>.json`, and the library is touched only if the report
fits the torch that runs.
"""

import importlib
import json
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch

_PACKAGE = __package__.rpartition(".")[0]


def report_path() -> Path:
    """Where the build report for the running Python lies, whether or not it exists."""
    tag = sysconfig.get_config_var("EXT_SUFFIX").removesuffix(".so")
    return Path(sys.modules[_PACKAGE].__path__[0]) / f"_C{tag}.json"


@cache
def build_report() -> dict[str, Any] | None:
    """What the build wrote down (keys: built, reason, torch, compiler, flags, cuda), or None where nothing
    was built.
    """
    try:
        return json.loads(report_path().read_text())
    except (OSError, ValueError):
        return None


def _mismatch(report: dict[str, Any] | None) -> str | None:
    if report is None:
        version = ".".join(map(str, sys.version_info[:2]))
        return f"never built for Python {version} ({report_path().name} is missing): run `pip install -e .`"
    if not report["built"]:
        return f"not built: {report['reason']}"
    if report["torch"] != torch.__version__:
        return f"built for torch {report['torch']}, found {torch.__version__}: run `pip install -e .` again"
    return None


@cache
def unavailable() -> str | None:
    """Why the extension cannot be used, or None after it was loaded and its operators registered."""
    reason = _mismatch(build_report())
    if reason is None:
        try:
            importlib.import_module(f"{_PACKAGE}._C")
        except (ImportError, OSError) as error:
            reason = f"cannot be loaded ({error}): run `pip install -e .` again"
    return reason and f"aligntok._C: {reason}"


def cpu_refusal(device: torch.device) -> str | None:
    """Why the extension's operators for CPUs cannot run on a device, or None."""
    if device.type != "cpu":
        return f"the C++ implementation is for tensors on the CPU, not on {device.type!r}"
    return unavailable()


def build_info() -> dict[str, Any] | None:
    """What the loaded library says of itself (torch, cuda, cuda_architectures, compiler, flags, openmp), or
    None.
    """
    return None if unavailable() else importlib.import_module(f"{_PACKAGE}._C").build_info()
