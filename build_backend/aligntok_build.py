"""PEP 517 backend: setuptools, built against the torch that the target environment already has.

An isolated build sees none of the packages of the environment that it installs into. A C++ extension of torch
has to be compiled against the release it will be loaded with, so this backend

- looks for torch in the environment of the running interpreter, outside the isolation;
- asks for torch as a build requirement only where there is none (or one too old);
- otherwise puts that environment's package folders at the end of `sys.path`, behind the build's own packages;
- and tells setup.py which release was compiled against, so that the installed package requires just that one.
  Without it pip would be free to exchange torch after the build, for example for the release that the newest
  torchvision wants.
"""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from typing import Any

from setuptools import build_meta

# The oldest release that `make matrix` tries: it comes with Triton 3.4, the first with triton.knobs.
TORCH_MINIMUM = (2, 8)
TORCH_REQUIREMENT = "torch>=" + ".".join(map(str, TORCH_MINIMUM))

# Runs in a fresh interpreter without the isolation's variables, hence sees what the user's own `python` sees.
_PROBE = """
import json, sys
from importlib import metadata
try:
    version = metadata.version("torch")
except metadata.PackageNotFoundError:
    version = None
path = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
print(json.dumps({"torch": version, "path": path}))
"""
_ISOLATION_VARIABLES = ("PYTHONPATH", "PYTHONNOUSERSITE")


def _is_recent(version: str | None) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return found is not None and tuple(map(int, found.groups())) >= TORCH_MINIMUM


def target_environment() -> tuple[bool, list[str]]:
    """Whether the target environment has a usable torch, and its package folders."""
    environment = {k: v for k, v in os.environ.items() if k not in _ISOLATION_VARIABLES}
    answer = subprocess.run(
        [sys.executable, "-c", _PROBE],
        env=environment,
        cwd=os.path.dirname(os.path.abspath(__file__)),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(answer.stdout.strip().splitlines()[-1])
    return _is_recent(found["torch"]), found["path"]


def runtime_torch_requirement() -> str:
    """The package's requirement on torch: the release that this build sees, else the range."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return TORCH_REQUIREMENT
    public = version.partition("+")[0]  # 2.13.0+cpu and 2.13.0 are one release to a requirement
    return f"torch=={public}" if _is_recent(public) else TORCH_REQUIREMENT


def _torch_requirement() -> list[str]:
    return [] if target_environment()[0] else [TORCH_REQUIREMENT]


def _expose_target_torch() -> None:
    has_torch, folders = target_environment()
    if has_torch:
        sys.path.extend(folder for folder in folders if folder not in sys.path)


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Build requirements of a wheel: setuptools' own, and torch where the target has none."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Build requirements of an editable install: as for a wheel."""
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Build requirements of a source archive: nothing is compiled, so torch is not needed."""
    return build_meta.get_requires_for_build_sdist(config_settings)


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Build a wheel against the target's torch."""
    _expose_target_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Build an editable install against the target's torch."""
    _expose_target_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    """Metadata of a wheel, with the requirement on the target's torch."""
    _expose_target_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    """Metadata of an editable install, with the requirement on the target's torch."""
    _expose_target_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


build_sdist = build_meta.build_sdist
