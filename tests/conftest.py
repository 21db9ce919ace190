"""Rules for the whole test suite: a test may be skipped only for a declared reason that holds on this
machine.

Everything else that pytest would count as skipped or expected to fail is turned into a failure, so that a
green run means that every test which could run did run.
"""

import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest

# MKL may round differently for differently aligned memory, which tests that compare bits cannot use. Read on import.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")


def _no_cuda_device() -> bool:
    import torch

    return not torch.cuda.is_available()


def _no_nvcc() -> bool:
    from aligntok._cuda_toolkit import find_toolkit

    return find_toolkit()[0] is None


# Kernels run in Triton's interpreter where there is no device; Triton reads this when the kernels are imported.
if _no_cuda_device():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Reason given to pytest.skip -> whether it holds here. To need something else, add a line.
ALLOWED_SKIPS: dict[str, Callable[[], bool]] = {
    "needs a CUDA device": _no_cuda_device,
    "needs nvcc": _no_nvcc,
    "needs Triton's interpreter": lambda: not _no_cuda_device(),
}
_MARKERS = {"cuda": "needs a CUDA device"}
# Files of minutes, the longest first: begun early, no worker is left with one of them at the end (make test)
_LONGEST = ("test_switches.py", "test_recipes.py", "test_gpu_check.py", "test_train_rival.py", "test_distributed.py")

# Same examples in every run: a red test stays red until the code changes. First calls compile, so there is no
# deadline.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("project")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers of the table."""
    for marker, reason in _MARKERS.items():
        config.addinivalue_line("markers", f"{marker}: {reason}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip marked tests where their reason holds; put the longest files first."""
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))
    for item in items:
        for marker, reason in _MARKERS.items():
            if item.get_closest_marker(marker) and ALLOWED_SKIPS[reason]():
                item.add_marker(pytest.mark.skip(reason=reason))


def _forbid(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome != "skipped":
        return
    reason = getattr(report, "wasxfail", None)
    if reason is None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if reason in ALLOWED_SKIPS and ALLOWED_SKIPS[reason]():
            return
        kind = "skipped"
    else:
        del report.wasxfail
        kind = "expected to fail"
    report.outcome = "failed"
    report.longrepr = f"{kind} ({reason or 'no reason'}), which tests/conftest.py does not allow here"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Turn a forbidden skip of a test into a failure."""
    report = yield
    _forbid(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """Turn a forbidden skip of a whole file into a failure."""
    report = yield
    _forbid(report)
    return report
