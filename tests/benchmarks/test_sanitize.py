"""benchmarks.sanitize without ttsem: the lists, what its parts hand over, and what counts as a fault."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import sanitize, sanitized
from benchmarks.hardware_report import triton_operators

ROOT = Path(__file__).resolve().parents[2]
ROW = {"op": "swiglu", "launches": 12, "unchecked": 1, "ratio": 0.7, "where": "output 0", "faults": [], "programs": {}}


def test_every_exception_exists_and_has_a_reason():
    for name, reason in sanitize.EXCEPTIONS.items():
        file, _, test = name.partition("::")
        text = (ROOT / "tests/kernels" / file).read_text()
        assert reason and (not test or f"def {test.partition('[')[0]}(" in text), name
    assert (ROOT / sanitize.STEPS).is_file()


def test_every_kernel_test_runs_or_is_an_exception():
    chosen = sanitize.kernel_tests()
    files = {path.name for path in (ROOT / "tests/kernels").glob("test_*.py")}
    assert {Path(name).name for name in chosen if not name.startswith("--")} == files - sanitize.EXCEPTIONS.keys()
    left_out = {name for name in chosen if name.startswith("--")}
    assert {f"--deselect=tests/kernels/{name}" for name in sanitize.EXCEPTIONS if "::" in name} < left_out
    assert "--deselect=tests/kernels/test_swiglu.py::test_operator_contract" in left_out


def test_every_operator_has_ragged_shapes_of_its_own_sizes():
    assert sanitized.RAGGED.keys() == set(triton_operators())
    for op in triton_operators():
        found = list(sanitized.cases(op, ragged_only=True))
        assert found and all(shape.keys() == workload.shape.keys() for workload, shape in found), op
        assert len(list(sanitized.cases(op, ragged_only=False))) > len(found)


def test_what_a_part_hands_over():
    result = {"operators": [ROW]}
    assert sanitize.parse(["swiglu: ...\n", f"{sanitize.MARK}{json.dumps(result)}\n"]) == result
    assert sanitize.parse(["Segmentation fault\n"]) is None
    assert "12 launches, 1 of them too large" in sanitize.summary("operators", result)
    tests = {"passed": 3, "failed": [], "launches": 7, "unchecked": 0}
    assert sanitize.summary("tests", tests).startswith("tests: 3 tests passed, 0 failed, 7 launches")


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (None, "ended without a result"),
        ({"operators": [ROW | {"faults": ["M=5: writes 3 past the end"]}]}, "past the end"),
        ({"operators": [ROW, ROW | {"launches": 0}]}, "nothing was launched"),
        ({"passed": 3, "failed": ["test_adaln.py: race"], "launches": 7}, "race"),
        ({"passed": 0, "failed": [], "launches": 0}, "nothing was launched"),
    ],
)
def test_faults(result, told):
    (fault,) = sanitize.faults_of("part", result)
    assert told in fault
    assert sanitize.faults_of("part", {"operators": [ROW]}) == []


def test_errors_are_counted_in_those_of_eager():
    exact = {"output 0": torch.tensor([1.0, -2.0])}
    ours, eager = ({"output 0": torch.tensor([1.0, -2.0 - error])} for error in (0.02, 0.04))
    assert sanitized.ratios(ours, eager, exact)["output 0"] == pytest.approx(0.5, rel=1e-5)
    assert sanitized.ratios(ours, exact, exact)["output 0"] == pytest.approx(0.01 * 2**20, rel=1e-5)
    unwritten = {"output 0": torch.tensor([1.0, math.nan])}
    assert not sanitized.ratios(unwritten, eager, exact)["output 0"] <= sanitized.FACTOR


def test_python_that_cannot_run_it_is_told_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sanitize"])
    monkeypatch.setattr(sanitize, "refusal", lambda: "ttsem needs Python 3.12 or 3.13, this is 3.11.7")
    assert sanitize.main() == 1
    assert capsys.readouterr().out == "not run: ttsem needs Python 3.12 or 3.13, this is 3.11.7\n"
