"""Find the CUDA toolkit and say whether the extension's CUDA part can be built.

setup.py (at build time, by file path, before the package exists) and `aligntok doctor` (at run time) ask the
same questions here. Standard library only.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# A100 and H100, the cards that the recipes are written for. TORCH_CUDA_ARCH_LIST replaces the pair.
DEFAULT_ARCHITECTURES = "8.0;9.0"
# Words that switch something on, as in flash-attention's setup (FORCE_BUILD=TRUE).
_TRUE = {"1", "true", "yes", "on"}


@dataclass(frozen=True)
class Toolkit:
    """A usable CUDA toolkit: its home folder, and the release of its nvcc such as "13.0"."""

    home: Path
    release: str


def switch(environment: Mapping[str, str], name: str) -> bool:
    """Whether an environment switch such as FORCE_BUILD is on."""
    return environment.get(name, "").strip().lower() in _TRUE


def architectures(environment: Mapping[str, str]) -> str:
    """The compute capabilities to compile for, in TORCH_CUDA_ARCH_LIST's own notation ("8.0;9.0")."""
    return environment.get("TORCH_CUDA_ARCH_LIST", "").strip() or DEFAULT_ARCHITECTURES


def _home_from_dryrun(nvcc: str) -> Path | None:
    """The TOP folder that nvcc itself names; right also where nvcc is a wrapper script in another folder."""
    try:
        answer = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^#\$ TOP=(.+)$", answer.stderr + answer.stdout, flags=re.MULTILINE)
    return Path(found.group(1).strip()).resolve() if found else None


def _release(nvcc: Path) -> str | None:
    try:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+\.\d+)", answer.stdout)
    return found.group(1) if found else None


def find_toolkit(environment: Mapping[str, str] = os.environ) -> tuple[Toolkit | None, str | None]:
    """The CUDA toolkit, or None and the reason.

    CUDA_HOME and CUDA_PATH are believed when they hold `bin/nvcc`. Otherwise the nvcc of PATH is asked where
    it lives: the folder above a wrapper script is not the toolkit, which is what torch's own guess takes it
    for.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(variable):
            home = Path(environment[variable])
            release = _release(home / "bin" / "nvcc")
            if release:
                return Toolkit(home, release), None
            return None, f"{variable}={home} holds no working bin/nvcc"
    nvcc = shutil.which("nvcc", path=environment.get("PATH"))
    candidates = [_home_from_dryrun(nvcc)] if nvcc else []
    for candidate in [*candidates, Path("/usr/local/cuda")]:
        release = _release(candidate / "bin" / "nvcc") if candidate else None
        if candidate and release:
            return Toolkit(candidate, release), None
    return None, "no CUDA toolkit: nvcc is not on PATH, and neither CUDA_HOME nor /usr/local/cuda has one"


def wheel_include_folders(package_folders: Sequence[str], release: str) -> list[str]:
    """Header folders that the CUDA wheels of PyPI bring; torch does not add them by itself.

    From CUDA 13 on all libraries share `nvidia/cu13`; before, each had its own folder.
    """
    found: list[Path] = []
    for package_folder in package_folders:
        nvidia = Path(package_folder) / "nvidia"
        shared = nvidia / f"cu{release.split('.')[0]}" / "include"
        single = sorted(path for path in nvidia.glob("*/include") if not re.fullmatch(r"cu\d+", path.parent.name))
        found += [shared] if shared.is_dir() else single
    return [str(path) for path in found]


def refusal(
    sources: Sequence[str],
    torch_cuda: str | None,
    toolkit: Toolkit | None,
    toolkit_reason: str | None,
    environment: Mapping[str, str] = os.environ,
) -> str | None:
    """Why the CUDA part is not built, or None when it is.

    `torch_cuda` is torch.version.cuda: None for a build of torch without CUDA.
    """
    if switch(environment, "SKIP_CUDA_BUILD"):
        return "SKIP_CUDA_BUILD is set"
    if not sources:
        return "this release has no CUDA sources"
    if torch_cuda is None:
        return "torch is built without CUDA"
    if toolkit is None:
        return toolkit_reason or "no CUDA toolkit"
    if toolkit.release.split(".")[0] != torch_cuda.split(".")[0]:
        return f"the toolkit in {toolkit.home} is CUDA {toolkit.release}, torch is built for CUDA {torch_cuda}"
    return None
