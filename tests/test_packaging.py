"""The build: which torch it uses, what it does without a compiler, how it finds CUDA, and what gets
installed.
"""

import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from aligntok import _cuda_toolkit as toolkit

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def backend():
    """The in-tree build backend as a module."""
    spec = importlib.util.spec_from_file_location("aligntok_build", ROOT / "build_backend" / "aligntok_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_probe_sees_torch_behind_an_isolation(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    has_torch, folders = backend.target_environment()
    assert has_torch and str(Path(torch.__file__).parent.parent) in folders and str(tmp_path) not in folders


def test_torch_is_a_build_requirement_only_where_there_is_none(backend, monkeypatch):
    hooks = (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable)
    for name in ("wheel", "editable"):
        monkeypatch.setattr(backend.build_meta, f"get_requires_for_build_{name}", lambda settings: [])
    monkeypatch.setattr(backend, "target_environment", lambda: (True, []))
    assert [hook() for hook in hooks] == [[], []]
    monkeypatch.setattr(backend, "target_environment", lambda: (False, []))
    assert [hook() for hook in hooks] == [[backend.TORCH_REQUIREMENT]] * 2


def test_the_build_sees_the_targets_torch_behind_its_own_packages(backend, monkeypatch):
    monkeypatch.setattr(sys, "path", ["/build"])
    monkeypatch.setattr(backend, "target_environment", lambda: (True, ["/target", "/build"]))
    backend._expose_target_torch()
    assert sys.path == ["/build", "/target"]
    monkeypatch.setattr(backend, "target_environment", lambda: (False, ["/other"]))
    backend._expose_target_torch()
    assert "/other" not in sys.path


@pytest.mark.parametrize(
    ("version", "requirement"),
    [
        ("2.13.0+cpu", "torch==2.13.0"),
        ("2.8.0", "torch==2.8.0"),
        ("2.7.1", "torch>=2.8"),
        ("1.13.0", "torch>=2.8"),
    ],
)
def test_the_package_requires_the_torch_it_was_built_with(backend, monkeypatch, version, requirement):
    monkeypatch.setattr(backend.metadata, "version", lambda name: version)
    assert backend.runtime_torch_requirement() == requirement


def test_without_torch_the_package_requires_the_range(backend, monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(backend.metadata, "version", absent)
    assert backend.runtime_torch_requirement() == backend.TORCH_REQUIREMENT


def _build(folder, **environment):
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def test_without_a_compiler_the_build_goes_on_and_says_why(tmp_path):
    found = _build(tmp_path, CXX="no-such-compiler", FORCE_BUILD="")
    assert found.returncode == 0, found.stderr
    assert "WITHOUT its C++ extension" in found.stderr and "apt-get install g++" in found.stderr
    [report] = (tmp_path / "aligntok").glob("_C.*.json")
    assert json.loads(report.read_text())["built"] is False
    assert "no-such-compiler" in json.loads(report.read_text())["reason"]


def test_force_build_makes_it_an_error(tmp_path):
    found = _build(tmp_path, CXX="no-such-compiler", FORCE_BUILD="TRUE")
    assert found.returncode != 0 and "FORCE_BUILD is set" in found.stderr


def _script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _fake_toolkit(folder, release="13.0"):
    """A folder whose bin/nvcc answers like nvcc."""
    _script(
        folder / "bin" / "nvcc",
        f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.88";; '
        f'*) echo "#\\$ TOP={folder}/bin/.." >&2;; esac',
    )
    return folder


def test_the_toolkit_is_found_behind_a_wrapper_script(tmp_path):
    home = _fake_toolkit(tmp_path / "cuda-13.0")
    wrapper = _script(tmp_path / "usr" / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    path = f"{wrapper.parent}:{os.environ['PATH']}"
    assert toolkit.find_toolkit({"PATH": path}) == (toolkit.Toolkit(home, "13.0"), None)


def test_cuda_home_is_believed_or_refused_by_name(tmp_path):
    home = _fake_toolkit(tmp_path / "twelve", "12.8")
    assert toolkit.find_toolkit({"CUDA_HOME": str(home)})[0] == toolkit.Toolkit(home, "12.8")
    found, reason = toolkit.find_toolkit({"CUDA_PATH": str(tmp_path / "gone"), "PATH": ""})
    assert found is None and reason == f"CUDA_PATH={tmp_path / 'gone'} holds no working bin/nvcc"


THIRTEEN = toolkit.Toolkit(Path("/cuda"), "13.0")


@pytest.mark.parametrize(
    ("sources", "torch_cuda", "found", "environment", "reason"),
    [
        (["a.cu"], "13.0", THIRTEEN, {}, None),
        (["a.cu"], "13.2", THIRTEEN, {"SKIP_CUDA_BUILD": "0"}, None),
        ([], "13.0", THIRTEEN, {}, "this release has no CUDA sources"),
        (["a.cu"], "13.0", THIRTEEN, {"SKIP_CUDA_BUILD": "TRUE"}, "SKIP_CUDA_BUILD is set"),
        (["a.cu"], None, THIRTEEN, {}, "torch is built without CUDA"),
        (["a.cu"], "13.0", None, {}, "nowhere"),
        (["a.cu"], "12.8", THIRTEEN, {}, "the toolkit in /cuda is CUDA 13.0, torch is built for CUDA 12.8"),
    ],
)
def test_the_cuda_part_is_built_or_refused_with_a_reason(sources, torch_cuda, found, environment, reason):
    assert toolkit.refusal(sources, torch_cuda, found, "nowhere", environment) == reason


def test_architectures():
    assert toolkit.architectures({}) == "8.0;9.0"
    assert toolkit.architectures({"TORCH_CUDA_ARCH_LIST": "9.0a"}) == "9.0a"


def test_headers_of_the_cuda_wheels(tmp_path):
    for name in ("cu13", "cudnn", "nccl", "cublas", "cuda_runtime"):
        (tmp_path / "nvidia" / name / "include").mkdir(parents=True)
    folders = [str(tmp_path), str(tmp_path / "none")]
    assert toolkit.wheel_include_folders(folders, "13.0") == [str(tmp_path / "nvidia" / "cu13" / "include")]
    of_twelve = [Path(folder).parent.name for folder in toolkit.wheel_include_folders(folders, "12.8")]
    assert of_twelve == ["cublas", "cuda_runtime", "cudnn", "nccl"]


def test_top_level_folders_are_installed_inside_the_package():
    import aligntok.kernels

    assert "discriminator_loss" in dir(aligntok.kernels)
    assert {path.name for path in resources.files("aligntok.configs").iterdir()} >= {"quickstart.yaml"}


def test_what_is_installed_beside_the_modules(tmp_path):
    steps = ("egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path)
    command = [sys.executable, "setup.py", "-q", *steps]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = ("py.typed", "report/page.css", "configs/quickstart.yaml", "kernels/adaln.py", "data/*.tar")
    assert [name for name in expected if not list((tmp_path / "aligntok").glob(name))] == []


def test_constraints_satisfy_every_range():
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
        if "==" in line and not line.startswith("#")
    )
    checked = 0
    for line in metadata.requires("aligntok"):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": "dev"}):
            version = pinned[requirement.name.lower().replace("_", "-")]
            # The requirement on torch is that of the build; its range is in the backend.
            assert requirement.name == "torch" or requirement.specifier.contains(version), (line, version)
            checked += 1
    assert checked >= 20


def test_every_environment_variable_is_documented():
    documented = (ROOT / "docs" / "environment.md").read_text()
    sources = [*ROOT.glob("aligntok/**/*.py"), *ROOT.glob("kernels/*.py"), ROOT / "setup.py"]
    used = {name for path in sources for name in re.findall(r"\bALIGNTOK_[A-Z]+\b", path.read_text())}
    # Macros of the compiler's command line.
    used -= {"ALIGNTOK_COMPILER", "ALIGNTOK_FLAGS"}
    assert "ALIGNTOK_KERNELS" in used
    assert not {name for name in used if name not in documented}


def test_the_kernels_folder_by_its_bare_name_is_the_same_package():
    """In the root of a checkout transformers finds the folder when it looks for a package `kernels` of others."""
    code = (
        "import kernels, aligntok.kernels; assert kernels.adaln is aligntok.kernels.adaln;"
        "from transformers.modeling_utils import PreTrainedModel;"
        "from transformers.utils.import_utils import is_kernels_available; assert not is_kernels_available()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
