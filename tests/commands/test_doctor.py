"""`aligntok doctor`: every finding is there, and nothing that is broken stops it."""

import importlib
from importlib import metadata

import pytest
import torch

from aligntok import kernels
from aligntok.commands import doctor
from aligntok.kernels import _extension as extension


def _rows(section):
    return {row.name: row for row in doctor.report() if row.section == section}


@pytest.fixture
def quick_imports(monkeypatch):
    """Every package imports at once; the real imports are what the first test examines."""
    monkeypatch.setattr(doctor, "_import_error", lambda module: None)


def test_the_real_environment():
    rows = doctor.report()
    found = {(row.section, row.name): row for row in rows}
    assert found["Packages", "torch"].value == metadata.version("torch")
    assert not found["Packages", "torch"].note and not found["Packages", "pillow"].note
    assert found["Devices", "cpu"].note.startswith(f"{torch.get_num_threads()} threads")
    assert torch.__version__ in found["Extension", "aligntok._C"].value
    cuda = extension.build_report()["cuda"]
    assert found["Extension", "CUDA part"].value == ("built" if cuda["built"] else f"not built ({cuda['reason']})")
    assert found["Operators", "gan_loss on cpu"].value == "cpp"
    assert found["Attention", "sdpa on cpu"].value == "available"
    assert "CUDA device" in found["Attention", "flash-attn on cpu"].note
    assert {row.section for row in rows} == {name for name, _ in doctor._SECTIONS}
    assert not [row for row in rows if row.name == "not examined"]


def test_absent_packages_get_their_command(quick_imports, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    rows = _rows("Packages")
    assert rows["wandb"].note == "optional: pip install 'aligntok[wandb]'"
    assert rows["lpips"].note == "required: pip install 'lpips>=0.1.4'"
    assert "another project" in rows["apex"].note
    assert "pytest" not in rows


def test_a_package_that_fails_to_import_is_a_finding(monkeypatch):
    def failing(name):
        raise OSError("libfoo.so.1: cannot open shared object file\nmore")

    monkeypatch.setattr(importlib, "import_module", failing)
    assert doctor._import_error("timm") == "OSError: libfoo.so.1: cannot open shared object file"


def test_a_section_that_cannot_be_examined_is_one_row(quick_imports, monkeypatch):
    def failing():
        raise ImportError("no torch here")
        yield

    monkeypatch.setattr(doctor, "_SECTIONS", (("Devices", failing), ("System", doctor._system)))
    first, *others = doctor.report()
    assert first == ("Devices", "not examined", "", "ImportError: no torch here")
    assert {"aligntok", "Python"} <= {row.name for row in others}


def test_an_unusable_extension_is_explained(quick_imports, monkeypatch):
    reason = "aligntok._C: built for torch 2.5, found 2.9: run `pip install -e .` again"
    monkeypatch.setattr(extension, "unavailable", lambda: reason)
    assert _rows("Extension")["aligntok._C"][2:] == ("not used", reason)
    row = _rows("Operators")["gan_loss on cpu"]
    assert (row.value, row.note) == ("reference", f"not cpp: {reason}")


def test_a_request_is_shown(quick_imports, monkeypatch):
    monkeypatch.setenv("ALIGNTOK_KERNELS", "triton")
    assert _rows("System")["ALIGNTOK_KERNELS"].value == "triton"
    row = _rows("Operators")["gan_loss on cpu"]
    assert row.value == "none: calls raise" and "triton was requested" in row.note
    with kernels.use_implementation("reference"):
        assert _rows("Operators")["gan_loss on cpu"].value == "reference"


def test_the_printed_report_has_every_section(quick_imports, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    cuda = {"built": False, "reason": "torch is built without CUDA", "architectures": []}
    report = {**extension.build_report(), "cuda": cuda}
    monkeypatch.setattr(extension, "build_report", lambda: report)
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "peft" else version(name))
    doctor.print_report()
    printed = capsys.readouterr().out
    for section, _ in doctor._SECTIONS:
        assert section in printed
    assert "not built (torch is built without CUDA)" in printed and "aligntok[peft]" in printed
