"""The profile: a trace that tools can read, of the steps that were asked for."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from aligntok.training.monitoring.profiling import WARM_UP, StepProfiler


def profiled(file: Path, wanted: int, taken: int) -> list[str]:
    said: list[str] = []
    profiler = StepProfiler(wanted, file, torch.device("cpu"), said.append)
    for _ in range(taken):
        torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.step()
    profiler.close()
    return said


def recorded_steps(file: Path) -> set[str]:
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    return {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}


def test_trace_of_the_steps_after_the_warm_up(tmp_path):
    file = tmp_path / "profile" / "stage1.json.gz"
    said = profiled(file, wanted=2, taken=10)
    assert recorded_steps(file) == {f"ProfilerStep#{WARM_UP + i}" for i in range(2)}
    assert str(file) in said[0] and "ui.perfetto.dev" in said[0] and "aten::mm" in said[1]
    assert [p.name for p in file.parent.iterdir()] == [file.name], "nothing unfinished is left"


def test_a_recording_that_is_cut_short_is_written(tmp_path):
    file = tmp_path / "stage1.json.gz"
    profiled(file, wanted=5, taken=WARM_UP + 2)
    assert f"ProfilerStep#{WARM_UP}" in recorded_steps(file)


@pytest.mark.parametrize("taken", [0, 2, WARM_UP - 1])
def test_too_few_steps_are_said(tmp_path, taken):
    said = profiled(tmp_path / "stage1.json.gz", wanted=2, taken=taken)
    assert said == ["profile: nothing recorded, fewer than 6 steps were left to take"]
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_is_a_warning(tmp_path):
    (tmp_path / "profile").write_text("a file where the folder should be")
    said = profiled(tmp_path / "profile" / "stage1.json.gz", wanted=1, taken=8)
    assert "could not be written" in said[0] and "aten::mm" in said[1], "the table is shown all the same"
