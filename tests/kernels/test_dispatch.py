"""Selection of implementations: order, requests, refusals, and the reasons that are given."""

import subprocess
import sys
import threading

import pytest
import torch

from aligntok import kernels
from aligntok.kernels import _dispatch as dispatch
from aligntok.kernels import _extension as extension
from aligntok.kernels import _triton

OP = "made_up_op"


@pytest.fixture(autouse=True)
def made_up_operator(monkeypatch):
    """An operator of which Triton wants CUDA and the C++ part wants the CPU."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_registry", dict(dispatch._registry))
    monkeypatch.setattr(dispatch, "_selected", {})
    dispatch.register(
        OP,
        triton=lambda device: None if device.type == "cuda" else "needs a CUDA tensor",
        cpp=lambda device: None if device.type == "cpu" else "needs a CPU tensor",
    )


def test_auto_takes_the_first_that_runs_and_keeps_the_reasons():
    found = dispatch.explain(OP, "cpu")
    assert (found.name, found.rejected) == ("cpp", {"triton": "needs a CUDA tensor"})
    assert dispatch.explain(OP, "cuda").name == "triton"
    nowhere = dispatch.explain(OP, torch.device("meta"))
    assert nowhere.name == "reference" and list(nowhere.rejected) == ["triton", "cpp"]


def test_argument_before_context_before_environment(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert dispatch.select(OP, "cpu") == "reference"
    with kernels.use_implementation("cpp"):
        assert dispatch.select(OP, "cpu") == "cpp"
        with kernels.use_implementation("auto"):
            assert dispatch.select(OP, "cuda") == "triton"
        assert dispatch.select(OP, "cpu", "reference") == "reference"
    assert dispatch.select(OP, "cpu") == "reference"


def test_context_ends_with_an_exception_and_belongs_to_its_thread():
    seen = []
    with pytest.raises(KeyError), kernels.use_implementation("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.select(OP, "cpu")))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == ["cpp"] and dispatch.select(OP, "cpu") == "cpp"


def test_a_request_that_cannot_be_met_lists_the_reasons():
    with pytest.raises(
        ValueError, match=r"'triton' was requested .*'cpu'.*needs a CUDA tensor.*'auto' would take 'cpp'"
    ):
        dispatch.select(OP, "cpu", "triton")
    with pytest.raises(ValueError, match="gan_loss has no such implementation"):
        kernels.generator_loss(torch.zeros(3), implementation="triton")


def test_unknown_names_are_refused_with_their_origin(monkeypatch):
    with pytest.raises(ValueError, match=r"implementation: unknown .*'cuda'.*auto, triton, cpp, reference"):
        dispatch.select(OP, "cpu", "cuda")
    with pytest.raises(ValueError, match="use_implementation"), kernels.use_implementation("fast"):
        pass
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="ALIGNTOK_KERNELS: unknown implementation 'fast'"):
        dispatch.select(OP, "cpu")


def test_the_choice_decides_what_runs(monkeypatch):
    fake = torch.randn(5).requires_grad_()
    names = {}
    for implementation in ("cpp", "reference"):
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, implementation)
        names[implementation] = kernels.generator_loss(fake)[0].grad_fn.name()
    assert "GeneratorLoss" in names["cpp"] and "NegBackward" in names["reference"]


def test_every_operator_has_a_reference_everywhere():
    assert {"gan_loss", OP} <= set(kernels.operators())
    for op in kernels.operators():
        assert dispatch.explain(op, "meta").name == "reference"


def test_the_extension_was_built_for_this_torch():
    assert extension.unavailable() is None, "run `pip install -e .` first"
    assert extension.build_report()["torch"] == torch.__version__
    info = extension.build_info()
    assert info["torch"] == torch.__version__.partition("+")[0] and info["openmp"]


def test_a_library_for_another_torch_is_never_loaded(monkeypatch):
    def loaded(name):
        raise AssertionError(f"{name} was loaded")

    report = {**extension.build_report(), "torch": "2.5.0+cu121"}
    monkeypatch.setattr(extension, "build_report", lambda: report)
    monkeypatch.setattr(extension.importlib, "import_module", loaded)
    reason = extension.unavailable.__wrapped__()
    assert f"built for torch 2.5.0+cu121, found {torch.__version__}: run `pip install -e .` again" in reason


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (None, "never built for Python"),
        ({"built": False, "reason": "no C++ compiler"}, "not built: no C++ compiler"),
    ],
)
def test_an_absent_library_has_a_reason(monkeypatch, report, words):
    monkeypatch.setattr(extension, "build_report", lambda: report)
    assert words in extension.unavailable.__wrapped__()


def test_a_library_that_does_not_load_is_a_reason_too(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(extension.importlib, "import_module", broken)
    assert "cannot be loaded (undefined symbol: _ZN3c10)" in extension.unavailable.__wrapped__()


@pytest.mark.parametrize("version", ["3.3.1", "2.1.0", "3.2.0+git1234"])
def test_a_triton_that_is_too_old_has_a_reason(version):
    assert "need 3.4 or newer" in (_triton.version_refusal(version) or "")


@pytest.mark.parametrize("version", ["3.4.0", "3.10.0", "4.0.0", "3.9.0+gitabcdef"])
def test_newer_tritons_are_taken(version):
    assert _triton.version_refusal(version) is None


OLD_TRITON = """
import torch._dynamo, triton
triton.__version__ = "3.3.1"
del triton.knobs
from aligntok.kernels import explain
print(explain("swiglu", "cuda").rejected["triton"])
"""


def test_the_package_imports_beside_a_triton_that_is_too_old():
    """torch 2.6 and 2.7 come with one that has no triton.knobs: the references run, and the reason is given."""
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OLD_TRITON], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert "version 3.3.1" in answer.stdout and "need 3.4 or newer" in answer.stdout
