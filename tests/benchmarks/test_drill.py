"""The drills see every kind of loss, and two of them find none."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from benchmarks import drill
from benchmarks.drills import disks, kills, place
from benchmarks.drills.place import Failed, Place, Running, Trial, complaint, losses


def write_run(folder: Path) -> Path:
    """What a run leaves, as far as the comparison looks at it."""
    (folder / "stage1").mkdir(parents=True)
    (folder / "stage1" / "model.safetensors").write_bytes(bytes(range(9)))
    (folder / "stage1" / "config.json").write_text("{}")
    lines = [{"part": "stage1", "step": step, "loss": 1 / step, "seconds": id(folder)} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def flip(folder: Path) -> None:
    (folder / "stage1" / "model.safetensors").write_bytes(bytes([1, *range(1, 9)]))


def forget_a_step(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0] + lines[2])


def repeat_a_step(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*lines, lines[2]]))


@pytest.mark.parametrize(
    ("harm", "loss"),
    [
        (flip, "stage1/model.safetensors differs"),
        (lambda f: (f / "stage1" / "config.json").unlink(), "stage1/config.json is missing"),
        (lambda f: (f / "state.json").write_text("{}"), "state.json is left over"),
        (lambda f: (f / ".step-00000002.0123abcd.tmp").mkdir(), ".step-00000002.0123abcd.tmp is unfinished"),
        (forget_a_step, "metrics.jsonl differs"),
        (repeat_a_step, "metrics.jsonl differs"),
        (lambda f: (f / "metrics.jsonl").open("a").write("{"), "metrics.jsonl differs"),
    ],
)
def test_every_loss_is_seen(harm, loss, tmp_path):
    expected, found = write_run(tmp_path / "expected"), write_run(tmp_path / "found")
    assert losses(found, expected) == []
    harm(found)
    assert losses(found, expected) == [loss]


def test_the_message_must_be_one_line_and_say_the_cause():
    line = "aligntok: error: could not write x: No space left on device"
    assert complaint(f"something\n{line}\n", "could not write", "No space") == ([], line)
    assert complaint(line, "File too large")[0] == ["the message lacks 'File too large'"]
    assert complaint(f"Traceback (most recent call last):\n{line}")[0] == ["1 lines of explanation, a traceback"]
    assert complaint("killed")[0] == ["0 lines of explanation"]
    assert place.expect(2, 2) == [] and place.expect(-9, 1, 2) == ["status -9, expected 1 or 2"]


def start(code: str, log: Path) -> Running:
    return Running([sys.executable, "-c", code], log, {}, None)


def test_a_fault_that_comes_too_late_and_a_run_that_hangs_count_as_losses(monkeypatch, tmp_path):
    with pytest.raises(Failed, match="ended with status 3 before step 2: done"):
        start("print('done'); raise SystemExit(3)", tmp_path / "log").until(lambda: False, "step 2")
    monkeypatch.setattr(place, "LIMIT", 0.2)
    for wait in (Running.wait, lambda running: running.until(lambda: False, "step 2")):
        running = start("import time; time.sleep(60)", tmp_path / "log")
        with pytest.raises(Failed, match="hangs"):
            wait(running)
        assert running.process.returncode == -signal.SIGKILL


def test_whatever_a_process_has_started_ends_with_it(tmp_path):
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid)"
    running = start(code, tmp_path / "log")
    assert running.wait() == 0
    state = Path(f"/proc/{running.said().strip()}/stat")
    ends = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z":  # a zombie waits for this machine's first process
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_losses_are_counted_shown_and_end_with_status_1(monkeypatch, tmp_path, capsys):
    def careless(place: Place, chance: Random) -> Iterator[Trial]:
        yield Trial(3, [], "a | message")
        yield Trial(2, [f"{place.folder}/x differs"])
        raise OSError("no such drill")

    monkeypatch.setitem(drill.DRILLS, "clock", ("carelessness", careless))
    assert drill.main(["--only", "clock", "--rounds", "2", "--output", str(tmp_path)]) == 1
    table = (tmp_path / "drill.md").read_text()
    assert "12 faults tried, 6 survived." in table
    line = "| carelessness | 12 | 6 | FOLDER/x differs; OSError: no such drill | a \\| message |"
    assert line in table and line in capsys.readouterr().out
    assert len(json.loads((tmp_path / "drill.json").read_text())["drills"]["clock"]) == 6
    monkeypatch.setitem(drill.DRILLS, "clock", ("care", lambda place, chance: [Trial(1, [])]))
    assert drill.main(["--only", "clock", "--output", str(tmp_path)]) == 0


def test_unknown_drills_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        drill.main(["--only", "flood"])
    assert "kill-tokenizer" in capsys.readouterr().err


def test_options_that_try_nothing_or_hide_a_loss(monkeypatch, tmp_path, capsys):
    for option in ("--rounds", "--jobs"):
        with pytest.raises(SystemExit, match="2"):
            drill.main([option, "0", "--output", str(tmp_path)])
        assert "0, expected at least 1" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        drill.main(["--output", str(tmp_path / "file")])
    assert "cannot be made" in capsys.readouterr().err
    losses = iter([["lost"], []])
    monkeypatch.setitem(drill.DRILLS, "clock", ("twice", lambda place, chance: [Trial(1, next(losses))]))
    assert drill.main(["--only", "clock", "clock", "--jobs", "1", "--output", str(tmp_path)]) == 1


def test_two_drills_lose_nothing(tmp_path):
    """A checkpoint cut off, and SIGTERM: the first trials of their drills, side by side."""
    here = Place(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda d: next(iter(d(here, Random(0)))), (disks.truncated, kills.polite)))
    assert [trial.lost for trial in found] == [[], []]
    assert "is damaged" in found[0].seen and "stopped by SIGTERM after step" in found[1].seen
