"""Build `aligntok._C` and map the top-level folders `kernels/` and `configs/` into the package.

Metadata and extras are in pyproject.toml, the ranges of the dependencies here. A part of the extension that
cannot be built is left out with a warning and a written reason (`aligntok doctor` shows it), and installation
goes on: every op has a PyTorch reference. With FORCE_BUILD=TRUE it is an error instead. MAX_JOBS,
SKIP_CUDA_BUILD and TORCH_CUDA_ARCH_LIST are in docs/environment.md.
"""

import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))  # already there in a PEP 517 build
from aligntok_build import runtime_torch_requirement  # noqa: E402

_spec = importlib.util.spec_from_file_location("_cuda_toolkit", ROOT / "aligntok" / "_cuda_toolkit.py")
assert _spec is not None and _spec.loader is not None
cuda_toolkit = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = cuda_toolkit
_spec.loader.exec_module(cuda_toolkit)

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension as BuildExt

    TORCH_ERROR: str | None = None
except (ImportError, OSError) as error:  # OSError: a shared library of torch does not load
    from setuptools.command.build_ext import build_ext as BuildExt  # type: ignore[assignment]  # what both have is used

    TORCH_ERROR = f"torch cannot be imported by the build ({error})"

DEPENDENCIES = [
    runtime_torch_requirement(),
    "torchvision>=0.23",
    "triton>=3.4; sys_platform == 'linux'",
    "timm>=1.0.15",
    "lpips>=0.1.4",
    "safetensors>=0.4.5",
    "numpy>=1.26",
    "pillow>=10.0",
    "rich>=13.0",
    "jsonargparse[signatures]>=4.35",
    "torchmetrics>=1.4",
    "matplotlib>=3.8",
    "tensorboard>=2.16",
    "huggingface_hub>=0.25",
    "onnx>=1.16",
    "pyyaml>=6.0",
]

CPP_SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))
# Named NAME_cuda.cu: torch's build would write the objects of NAME.cpp and NAME.cu to one file.
CUDA_SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cu"))
HEADERS = sorted(str(p.relative_to(ROOT)) for pattern in ("*.h", "*.cuh") for p in (ROOT / "csrc").glob(pattern))
# -fopenmp: at::parallel_for is a plain loop without it. -fno-trapping-math: comparisons become vector masks;
# results are the same. Neither -march=native nor -ffast-math: the sources choose the instruction set at run
# time, and NaN stays NaN.
CXX_FLAGS = [
    "-O3",
    "-fopenmp",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
]
NVCC_FLAGS = ["-O3", "-Xcompiler=-fvisibility=hidden"]


def compiler_refusal() -> str | None:
    """Why no C++ source can be compiled here, or None."""
    if TORCH_ERROR:
        return TORCH_ERROR
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler!r} is not on PATH); on Debian or Ubuntu: apt-get install g++"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"Python's headers are missing ({header}); on Debian or Ubuntu: apt-get install python3-dev"
    return None


def compiler_version() -> str:
    """First line of the compiler's --version."""
    command = [*os.environ.get("CXX", "c++").split(), "--version"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.partition("\n")[0].strip() or command[0]


def prepare(extension: Extension, cuda_failure: str | None = None) -> dict:
    """Give the extension torch's folders, flags and, if possible, the CUDA sources; return what to report.

    `cuda_failure` says why the CUDA part, already tried, is to be left out.
    """
    toolkit, toolkit_reason = cuda_toolkit.find_toolkit()
    cuda_reason = cuda_failure or cuda_toolkit.refusal(CUDA_SOURCES, torch.version.cuda, toolkit, toolkit_reason)
    architectures = [] if cuda_reason else re.split(r"[;\s]+", cuda_toolkit.architectures(os.environ))
    macros = {
        "ALIGNTOK_COMPILER": compiler_version(),
        "ALIGNTOK_FLAGS": " ".join(CXX_FLAGS),
        "ALIGNTOK_CUDA_ARCHS": ";".join(architectures),
    }
    flags = CXX_FLAGS + [f'-D{name}="{value}"' for name, value in macros.items()]
    if cuda_reason is None:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures)
        cpp_extension.CUDA_HOME = str(toolkit.home)
        template = cpp_extension.CUDAExtension(
            extension.name,
            CPP_SOURCES + CUDA_SOURCES,
            extra_compile_args={"cxx": [*flags, "-DALIGNTOK_WITH_CUDA"], "nvcc": NVCC_FLAGS},
            extra_link_args=["-fopenmp"],
        )
        folders = [sysconfig.get_path("purelib"), *site.getsitepackages(), *sys.path]
        unique = [f for f in dict.fromkeys(folders) if f]
        template.include_dirs += cuda_toolkit.wheel_include_folders(unique, torch.version.cuda)
    else:
        template = cpp_extension.CppExtension(
            extension.name, CPP_SOURCES, extra_compile_args=flags, extra_link_args=["-fopenmp"]
        )
    template.depends = HEADERS
    vars(extension).update({k: v for k, v in vars(template).items() if k not in ("_full_name", "_needs_stub")})
    extension.optional = True
    cuda = {"built": cuda_reason is None, "reason": cuda_reason, "architectures": architectures}
    return {
        "torch": torch.__version__,
        "compiler": macros["ALIGNTOK_COMPILER"],
        "flags": CXX_FLAGS,
        "cuda": cuda,
    }


class BuildExtensionWithReport(BuildExt):
    """Build, or write down why not: `_C.<tag>.json` lies beside the library and is read before the library is
    loaded.
    """

    def build_extensions(self) -> None:
        """Compile the extension; on failure warn, unless FORCE_BUILD is on."""
        [extension] = self.extensions
        library = Path(self.get_ext_fullpath(extension.name))
        library.unlink(missing_ok=True)  # or a failure would leave the last build's there
        report, reason = {}, compiler_refusal()
        if reason is None:
            try:
                report = self._compile(extension, library)
                if not library.exists():
                    reason = "compilation failed; `pip install -v -e .` shows the compiler's words"
            except Exception as error:  # whatever stops a compiler must not stop the installation
                reason = f"compilation failed ({error}); `pip install -v -e .` shows the compiler's words"
        report |= {"built": reason is None, "reason": reason}
        if reason is not None:
            if cuda_toolkit.switch(os.environ, "FORCE_BUILD"):
                raise RuntimeError(f"FORCE_BUILD is set and aligntok._C cannot be built: {reason}")
            warnings.warn(f"aligntok is installed WITHOUT its C++ extension: {reason}", stacklevel=1)
            extension.optional = True
        target = self._report_path(library)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n")

    def _compile(self, extension: Extension, library: Path) -> dict:
        """Compile; where that fails with the CUDA sources, compile without them. Returns what to report."""
        report = prepare(extension)
        if not report["cuda"]["built"]:
            super().build_extensions()
            return report
        force = cuda_toolkit.switch(os.environ, "FORCE_BUILD")
        failure = "its compilation failed; `pip install -v -e .` shows the compiler's words"
        try:
            super().build_extensions()
        except Exception:  # as in build_extensions
            if force:
                raise
        if library.exists() or force:
            return report
        warnings.warn(f"the CUDA part of aligntok._C is left out: {failure}", stacklevel=1)
        report = prepare(extension, failure)
        super().build_extensions()
        return report

    def copy_extensions_to_source(self) -> None:
        """Editable install: put library and report into the source tree; a stale library must not outlive a
        failure.
        """
        [extension] = self.extensions
        built = Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(extension.name))
        command = self.get_finalized_command("build_py")
        assert isinstance(command, build_py)
        package = command.get_package_dir("aligntok")
        installed = Path(package) / built.name
        if not built.exists():
            installed.unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copyfile(self._report_path(built), self._report_path(installed))

    @staticmethod
    def _report_path(library: str | Path) -> Path:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        return Path(library).with_name(f"_C{suffix.removesuffix('.so')}.json")


setup(
    install_requires=DEPENDENCIES,
    packages=[*find_packages(include=["aligntok", "aligntok.*"]), "aligntok.kernels", "aligntok.configs"],
    package_dir={"aligntok.kernels": "kernels", "aligntok.configs": "configs"},
    package_data={
        "aligntok": ["py.typed", "data/*.tar", "data/*.json", "data/*.md"],
        "aligntok.report": ["*.css"],
        "aligntok.configs": ["*.yaml", "**/*.yaml"],
    },
    exclude_package_data={"*": ["_C.*"]},
    ext_modules=[Extension("aligntok._C", CPP_SOURCES, optional=True)],
    cmdclass={"build_ext": BuildExtensionWithReport},
)
