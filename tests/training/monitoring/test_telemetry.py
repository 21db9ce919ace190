"""The step line and the records: by a clock that we turn, on a terminal, in a file, and when all goes wrong."""

import io
import json
import re
import time

import pytest
import torch
from rich.console import Console

from aligntok.config import TrainingConfig
from aligntok.runtime import collectives
from aligntok.runtime.devices import choose_precision
from aligntok.runtime.world import World
from aligntok.training.monitoring import part_log
from aligntok.training.monitoring.part_log import PartLog, Watch
from aligntok.training.monitoring.telemetry import Telemetry
from aligntok.training.monitoring.throughput import Peak


class Clock:
    """time.monotonic that stands still until it is moved."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def watched(folder, watch: Watch, console: Console | None = None, world: World | None = None) -> Telemetry:
    telemetry = Telemetry(folder, 1, console or Console(file=io.StringIO()), world or World())
    telemetry._watches["stage1"] = watch
    return telemetry


def take(log: PartLog, clock: Clock, step: int, seconds: float = 2.0, waited: float = 0.5, values=None) -> None:
    """A step of 4 images, the first part of its seconds waiting for them."""

    def fetch():
        clock.now += waited

    log.waiting_for(fetch)
    clock.now += seconds - waited
    log.step(step, {"loss": torch.tensor(1.0 * step), "grad_norm_generator": torch.tensor(1.0)} | (values or {}), 4)


STEP_FLOPS = 2048.0
COUNTED = {"peak": Peak(1000.0, "invented"), "flops": {0: STEP_FLOPS / 4}}


def test_records_hold_means_rates_and_shares(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    telemetry = watched(tmp_path, Watch(log_every=2, **COUNTED))
    with telemetry.part("stage1", 0, 5) as log:
        for step in range(1, 6):
            take(log, clock, step)
    records = telemetry.records()
    assert [r["step"] for r in records] == [2, 4, 5] and [r["loss"] for r in records] == [1.5, 3.5, 5.0]
    assert [r["seconds"] for r in records] == [4.0, 8.0, 10.0]
    for record in records:
        assert record["images_per_second"] == 2.0 and record["data_wait"] == 0.25
        assert record["mfu"] == pytest.approx(STEP_FLOPS / 2.0 / 1000.0, abs=1e-6)
        assert 0 < record["memory_gib"] < 1000


def test_each_kind_of_step_has_its_flops_also_after_resuming(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    telemetry = watched(tmp_path, Watch(1, peak=Peak(1000.0, "invented"), flops={0: 100.0, 2: 200.0, 3: 400.0}))
    for start, stop in ((0, 3), (3, 5)):
        with telemetry.part("stage1", start, 5) as log:
            for step in range(start + 1, stop + 1):
                take(log, clock, step)
    assert [r["mfu"] for r in telemetry.records()] == [0.2, 0.2, 0.4, 0.8, 0.8], "4 images in 2 seconds"


def test_a_skipped_step_has_trained_nothing(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    telemetry = watched(tmp_path, Watch(log_every=2, **COUNTED))
    with telemetry.part("stage1", 0, 2) as log:
        take(log, clock, 1)
        log.step(2, {}, 4)
    (record,) = telemetry.records()
    assert record["mfu"] == pytest.approx(STEP_FLOPS / 2.0 / 1000.0), "the step that was taken, in the time of both"


def watch(folder, flops, world: World | None = None) -> tuple[Telemetry, str | None]:
    telemetry = Telemetry(folder, 1, Console(file=io.StringIO()), world or World())
    training = TrainingConfig(log_every=1, precision="fp32")
    return telemetry, telemetry.watch("stage1", training, choose_precision("cpu", "fp32"), training, None, flops)


def test_the_line_on_mfu_has_the_peak_and_the_flops_of_every_kind(tmp_path):
    _, line = watch(tmp_path, lambda: {0: 2.5e9, 5000: 3e9})
    assert re.fullmatch(r"MFU against .* measured here .*; 2\.5 GFLOP per image, 3 from step 5,001", line)


def test_flops_that_cannot_be_counted_cost_the_mfu_and_the_line_says_why(tmp_path):
    def refuse():
        raise NotImplementedError("aten::nonzero has no meta kernel\nand a page of advice")

    telemetry, line = watch(tmp_path, refuse)
    reason = "NotImplementedError: aten::nonzero has no meta kernel"
    assert line == f"no MFU: the FLOPs of a step could not be counted ({reason})"
    with telemetry.part("stage1", 0, 1) as log:
        log.step(1, {"loss": torch.tensor(1.0)}, 4)
    assert "mfu" not in telemetry.records()[0]


def test_only_the_first_process_counts(tmp_path):
    _, line = watch(tmp_path, lambda: pytest.fail("counted"), World(1, 2))
    assert line is None


def test_estimate_follows_the_pace(tmp_path, monkeypatch):
    clock, shown = Clock(monkeypatch), []
    log = PartLog(watched(tmp_path, Watch(1)), "stage1", 0, 100, lambda done, steps, text="": shown.append(text))
    take(log, clock, 1, seconds=10)
    assert shown[-1].endswith("0:16:30 left"), "99 steps of 10 s"
    take(log, clock, 2, seconds=2)
    assert shown[-1].endswith("0:09:48 left"), "98 steps of 6 s, half way to the new pace"


def test_a_clock_that_jumps_back_changes_nothing(tmp_path, monkeypatch):
    clock, said = Clock(monkeypatch), io.StringIO()
    day = [1_800_000_000.0]

    def jumping() -> float:
        day[0] -= 3600
        return day[0]

    monkeypatch.setattr(time, "time", jumping)
    telemetry = watched(tmp_path, Watch(log_every=1), Console(file=said))
    with telemetry.part("stage1", 0, 3) as log:
        for step in (1, 2, 3):
            take(log, clock, step)
    assert [(r["seconds"], r["images_per_second"]) for r in telemetry.records()] == [(2, 2), (4, 2), (6, 2)]
    assert re.findall(r"\[(\S+)\] stage1 (\d)/3 .* (\S+) left", said.getvalue()) == [
        ("0:00:02", "1", "0:00:04"),
        ("0:00:04", "2", "0:00:02"),
        ("0:00:06", "3", "0:00:00"),
    ]


def test_a_file_gets_one_whole_line_per_record(tmp_path, monkeypatch):
    clock, said = Clock(monkeypatch), io.StringIO()
    telemetry = watched(tmp_path, Watch(log_every=2, **COUNTED), Console(file=said, width=40))
    with telemetry.part("stage1", 0, 6) as log:
        for step in range(1, 7):
            take(log, clock, step)
    lines = said.getvalue().splitlines()
    assert len(lines) == 3 + 1 and all(line.startswith("[0:00:") for line in lines[:3])
    assert lines[1].startswith("[0:00:08] stage1 4/6 loss 3.500 | 2 img/s | MFU 102.4% | ")
    assert lines[1].endswith("GiB | data 25% | 0:00:04 left")


def test_a_file_gets_other_progress_once_a_minute_and_at_the_end(tmp_path, monkeypatch):
    clock, said = Clock(monkeypatch), io.StringIO()
    with Telemetry(tmp_path, 1, Console(file=said)).bar("reading images") as update:
        for done in range(1, 101):
            clock.now += 1.0
            update(done, 100)
    assert said.getvalue().splitlines() == ["[0:01:01] reading images 61/100", "[0:01:40] reading images 100/100"]


def test_a_terminal_gets_a_bar_with_the_step_line_below(tmp_path):
    said = io.StringIO()
    telemetry = watched(tmp_path, Watch(log_every=1), Console(file=said, force_terminal=True, width=120))
    with telemetry.part("stage1", 0, 2) as log:
        for step in (1, 2):
            log.step(step, {"l1": torch.tensor(0.25)}, 4)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.getvalue()).splitlines()
    assert any("stage1" in line and "2/2" in line for line in last)
    assert any(line.startswith("l1 0.250 | ") and " img/s | " in line for line in last)


def test_values_are_not_fetched_between_records(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(part_log._Interval, "means", lambda self: fetched.append(1) or {})
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
    telemetry = watched(tmp_path, Watch(log_every=3, peak=Peak(1.0, "invented"), flops={0: 1.0, 2: 2.0}))
    with telemetry.part("stage1", 0, 6) as log:
        for step in range(1, 7):
            log.step(step, {"l1": torch.tensor(0.25)}, 4)
            assert len(fetched) == step // 3


def test_a_resumed_part_has_each_step_once(tmp_path):
    for start, stop in ((0, 4), (2, 6)):
        telemetry = watched(tmp_path, Watch(1))
        with telemetry.part("stage1", start, 6) as log:
            for step in range(start + 1, stop + 1):
                log.step(step, {}, 4)
    with telemetry.part("stage2", 0, 1) as log:
        log.step(1, {}, 4)
    found = [(r["part"], r["step"]) for r in telemetry.records()]
    assert found == [("stage1", step) for step in range(1, 7)] + [("stage2", 1)]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    telemetry = watched(tmp_path, Watch(1))
    telemetry.write({"part": "stage1", "step": 1, "seconds": 1.0})
    with telemetry.file.open("a") as file:
        file.write('{"part": "stage1", "st')
    assert len(telemetry.records()) == 1
    with telemetry.part("stage1", 1, 2) as log:
        log.step(2, {}, 4)
    assert [json.loads(line)["step"] for line in telemetry.file.read_text().splitlines()] == [1, 2]


def test_a_full_disk_costs_records_and_one_warning(tmp_path, monkeypatch):
    said = io.StringIO()
    telemetry = watched(tmp_path, Watch(1), Console(file=said))
    original = type(telemetry.file).open

    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    with telemetry.part("stage1", 0, 4) as log:
        log.step(1, {}, 4)
        with monkeypatch.context() as patch:
            patch.setattr(type(telemetry.file), "open", full)
            log.step(2, {}, 4)
            log.step(3, {}, 4)
        assert type(telemetry.file).open is original
        log.step(4, {}, 4)
    assert [r["step"] for r in telemetry.records()] == [1, 4]
    assert said.getvalue().count("No space left on device); training goes on") == 1


def test_only_the_first_process_speaks_and_writes(tmp_path, monkeypatch):
    reduced = []

    def mean(values):
        reduced.append(values)
        return (values + values + 1) / 2  # another process with the same values plus one

    monkeypatch.setattr(collectives, "mean", mean)
    clock, previews = Clock(monkeypatch), []
    watch = Watch(1, preview_every=1, preview=lambda: previews.append(1) or b"PNG")
    for rank in (1, 0):
        said = io.StringIO()
        telemetry = watched(tmp_path, watch, Console(file=said), World(rank, 2))
        with telemetry.part("stage1", 0, 1) as log:
            take(log, clock, 1)
        if rank:
            assert not list(tmp_path.iterdir()) and not said.getvalue()
    assert len(reduced) == 2 and len(previews) == 2, "everyone takes part in what needs everyone"
    (record,) = telemetry.records()
    assert record["loss"] == 1.5 and record["images_per_second"] == 4.0
    assert (tmp_path / "previews" / "stage1-00000001.png").read_bytes() == b"PNG"
