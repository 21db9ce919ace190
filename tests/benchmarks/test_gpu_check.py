"""gpu_check: rehearsed whole on this machine, as on a GPU; limits, what fails, what is not reached."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import NOT_REACHED, Part, operators, page, parts, run, run_all


def test_the_most_valuable_parts_come_first_and_tests_last():
    names = [part.name for part in parts()]
    assert names[:2] == ["environment", "smoke"] and names[-1] == "tests"
    assert [names.index(f"training step {size}/1") for size in ("XL", "B")] == [2, 3]
    assert names[4:6] == ["bench_qknorm_attention", "bench_qknorm_rope"]
    assert {f"bench_{op}" for op in operators()} == {name for name in names if name.startswith("bench_")}


@pytest.mark.parametrize(("gigabytes", "sizes"), [(80, ["XL", "B"]), (48, ["B", "S"]), (24, ["B", "S"])])
def test_training_steps_fit_the_gpu(gigabytes, sizes, monkeypatch):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    device = SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_properties", lambda: device)
    assert [part.name for part in parts()][2:4] == [f"training step {size}/1" for size in sizes]


def test_what_must_be_there_fits_into_the_time():
    """Even where every part takes all that it may: the environment, the smoke run and the training steps."""
    assert sum(part.limit for part in parts()[:4]) <= gpu_check.LIMIT_S


def test_a_rehearsal_of_the_whole_program(tmp_path, monkeypatch, capsys):
    """The driver believes in a GPU, and every command that it would be given runs here at its smallest."""
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "steps", lambda: gpu_check.STEPS)
    monkeypatch.setattr(gpu_check, "device_name", lambda: "NVIDIA Pretended 9000")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--rehearse", "--output", str(tmp_path), "--limit", "3000"])
    before = dict(os.environ)
    status = gpu_check.main()
    assert dict(os.environ) == before, "what is set for the commands stays with them"
    found = json.loads((tmp_path / "gpu_check_nvidia_pretended_9000.json").read_text())
    failed = {part["name"]: part["output"][-2000:] for part in found["parts"] if part["status"] != 0}
    assert failed == {} and status == 0
    assert found["device"] == "NVIDIA Pretended 9000" and len(found["parts"]) == len(parts(rehearse=True))
    text = (tmp_path / "gpu_check_nvidia_pretended_9000.md").read_text()
    assert all(f"## {part.name}" in text for part in parts(rehearse=True)) and "Not reached" not in text
    assert "training step S/1: 0, " in capsys.readouterr().out


def command(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_part_is_stopped_at_its_limit_with_what_it_had_printed():
    part = Part("slow", command("import time; print('begun', flush=True); time.sleep(60)"), limit=2)
    run(part, deadline=float("inf"))
    assert part.status == 124 and part.seconds < 30
    assert part.output.startswith("stopped after 2 s") and "begun" in part.output


def test_results_are_on_disk_after_each_part_and_what_is_not_reached_is_named(tmp_path: Path):
    every = [
        Part("one", command("print('fine')"), 60),
        Part("two", command("import sys; print('half'); sys.exit('broken')"), 60),
        Part("three", command("print('never')"), 60),
    ]
    parts_run = run_all(every, limit=1e9, folder=tmp_path)
    next(parts_run)
    [file] = tmp_path.glob("*.json")
    assert [part["status"] for part in json.loads(file.read_text())["parts"]] == [0, NOT_REACHED, NOT_REACHED]
    next(parts_run)
    assert every[1].status == 1 and "half" in every[1].output and "broken" in every[1].output
    assert "Not reached: three." in page(every)
    late = [Part("late", command("print('never')"), 60)]
    assert [part.status for part in run_all(late, limit=-1, folder=tmp_path)] == [NOT_REACHED]


def test_without_a_device_nothing_is_claimed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--output", str(tmp_path)])
    assert gpu_check.main() == 2
    assert "needs a CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("op", ["swiglu", "norm_ratio"])
def test_smoke_says_what_ran_and_fails_on_a_wrong_result(op, monkeypatch, capsys):
    from benchmarks import smoke

    monkeypatch.setattr(sys, "argv", ["smoke", op])
    assert smoke.main() == 0
    assert f"{op} (" in capsys.readouterr().out
    monkeypatch.setattr(smoke, "disagreement", lambda *_: "output 0 differs")
    assert smoke.main() == 1
    assert "output 0 differs" in capsys.readouterr().out
