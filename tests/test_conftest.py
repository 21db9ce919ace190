"""A skipped test that could have run makes the session red."""

import subprocess
import sys
from pathlib import Path

SKIPPED = """
import pytest

def test_allowed(): pytest.skip("declared")

def test_declared_but_untrue(): pytest.skip("declared, but it could run")

@pytest.mark.skip(reason="too slow")
def test_forbidden(): pass

@pytest.mark.xfail(reason="broken", strict=True)
def test_expected(): assert False

def test_inside(): pytest.skip("no mood")

def test_runs(): pass
"""
MODULE = 'import pytest\npytest.skip("whole file", allow_module_level=True)\n'


# What a line more in the table does.
DECLARED = """
ALLOWED_SKIPS |= {"declared": lambda: True, "declared, but it could run": lambda: False}
"""


def _pytest(folder: Path) -> subprocess.CompletedProcess[str]:
    conftest = (Path(__file__).parent / "conftest.py").read_text()
    (folder / "conftest.py").write_text(conftest + DECLARED)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        str(folder),
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_undeclared_skips_and_expected_failures_fail(tmp_path):
    (tmp_path / "test_some.py").write_text(SKIPPED)
    found = _pytest(tmp_path)
    assert found.returncode == 1, found.stdout
    for reason in ("too slow", "no mood", "declared, but it could run"):
        assert f"skipped ({reason})" in found.stdout
    assert "expected to fail (broken)" in found.stdout
    # The mark on test_forbidden acts before the test starts, which pytest counts as an error.
    assert "3 failed, 1 passed, 1 skipped, 1 error" in found.stdout


def test_a_file_that_skips_itself_fails(tmp_path):
    (tmp_path / "test_module.py").write_text(MODULE)
    found = _pytest(tmp_path)
    assert found.returncode != 0 and "whole file" in found.stdout
