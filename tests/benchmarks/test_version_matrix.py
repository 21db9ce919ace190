"""The matrix of releases: names are parsed, results are judged and tabled. Nothing is installed here."""

import pytest

from benchmarks import version_matrix
from benchmarks.version_matrix import Outcome, Pair, broken, parsed, succeeded, table

GOOD = {"op": "o", "kernel": "k", "workload": "w", "arch": 86, "registers": 200, "spilled_bytes": 0}
GOOD |= {"shared": 1024, "shared_limit": 99 * 1024}


def test_pairs_are_parsed_and_named():
    assert parsed("2.8.0") == Pair("2.8.0") and parsed("2.14.1/3.9.0") == Pair("2.14.1", "3.9.0")
    assert parsed("2.14.1/3.9.0").name == "torch-2.14.1-triton-3.9.0"
    assert len({parsed(text).name for text in version_matrix.VERSIONS}) == len(version_matrix.VERSIONS)


@pytest.mark.parametrize("text", ["2.8", "newest", "2.8.0/", "/3.9.0", "2.8.0/3.9.0/1"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"expected TORCH or TORCH/TRITON"):
        parsed(text)


@pytest.mark.parametrize(
    ("output", "counts"),
    [
        ("....\n12 passed, 1 skipped in 3.10s\n", {"passed": 12, "skipped": 1}),
        ("F\n=== 2 failed, 3 passed in 61.00s (0:01:01) ===\n", {"failed": 2, "passed": 3}),
        ("ImportError while loading conftest\n", {"error": 1}),
    ],
)
def test_counts_are_read_from_pytest(output, counts):
    assert version_matrix.counts_of(output) == counts


@pytest.mark.parametrize("change", [{"spilled_bytes": 8}, {"shared": 100 * 1024}, {"error": "CompilationError"}])
def test_each_fault_of_a_kernel_breaks_the_pair(change):
    assert not broken(GOOD) and broken(GOOD | change)
    assert succeeded(Outcome("2.8.0", "3.4.0", [GOOD], {"passed": 3}))
    assert not succeeded(Outcome("2.8.0", "3.4.0", [GOOD, GOOD | change], {"passed": 3}))


@pytest.mark.parametrize("tests", [{"failed": 1, "passed": 3}, {"error": 1}])
def test_a_failed_test_breaks_the_pair(tests):
    assert not succeeded(Outcome("2.8.0", "3.4.0", [GOOD], tests))


def test_nothing_compiled_is_no_success():
    assert not succeeded(Outcome("2.8.0", "3.4.0", [], {"passed": 3}))


def test_the_table_has_a_line_for_each_pair():
    bad = [GOOD | {"arch": 80, "registers": 255, "spilled_bytes": 16}, GOOD | {"error": "CompilationError"}]
    lines = table([Outcome("2.8.0", "3.4.0", [GOOD, *bad], {"passed": 7}), Outcome("2.11.0", "3.6.0")]).splitlines()
    assert lines[2] == "| 2.8.0 | 3.4.0 | 80, 86 | 2 | 1 | 1 (16) | 0 | 1 | 7 passed |"
    assert len(lines) == 4 and lines[3].endswith("| not run |")
