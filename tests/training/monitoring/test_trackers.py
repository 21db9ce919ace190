"""TensorBoard and W&B: every step once after a resume, one W&B run for an output folder."""

import io
import sys
import time
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aligntok.config import TrainingConfig
from aligntok.errors import UserError
from aligntok.runtime.devices import choose_precision
from aligntok.training.monitoring.telemetry import Telemetry
from aligntok.training.monitoring.trackers import TensorBoard

WANDB = TrainingConfig(wandb_project="tokens", log_every=1)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (255, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def logged(tracker, part: str, start: int, steps: int) -> None:
    tracker.begin(part, start, {})
    for step in range(start + 1, steps + 1):
        tracker.scalars({"part": part, "step": step, "l1": float(step)})
    tracker.end()


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path, monkeypatch):
    logged(TensorBoard(tmp_path), "stage1", 0, 6)
    logged(TensorBoard(tmp_path), "stage2", 0, 2)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 60)  # a later command, a later name of the events' file
    logged(TensorBoard(tmp_path), "stage1", 3, 8)
    for part, steps in (("stage1", 8), ("stage2", 2)):
        events = EventAccumulator(str(tmp_path / part))
        events.Reload()
        assert [(e.step, e.value) for e in events.Scalars("l1")] == [(s, float(s)) for s in range(1, steps + 1)]


def test_tensorboard_keeps_pictures(tmp_path):
    tracker = TensorBoard(tmp_path)
    tracker.begin("stage1", 0, {})
    tracker.picture("stage1", 5, png())
    tracker.end()
    events = EventAccumulator(str(tmp_path / "stage1"))
    events.Reload()
    (shown,) = events.Images("preview")
    assert (shown.step, shown.width, shown.height) == (5, 6, 4)


class FakeWandb(SimpleNamespace):
    """What we use of wandb, writing down every call."""

    def __init__(self):
        self.started, self.logged, self.axes, self.settings = [], [], [], {}
        self.Image = lambda image: ("image", image.size)

    def init(self, **options):
        self.started.append(options)
        config = SimpleNamespace(update=lambda values, allow_val_change: self.settings.update(values))
        define = lambda name, step_metric=None: self.axes.append((name, step_metric))  # noqa: E731
        return SimpleNamespace(log=self.logged.append, define_metric=define, config=config)


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def run(folder, start: int, console: Console | None = None) -> None:
    telemetry = Telemetry(folder, 1, console or Console(file=io.StringIO()))
    telemetry.watch("stage1", WANDB, choose_precision("cpu", "fp32"), WANDB, None, lambda: {0: 1.0})
    with telemetry.part("stage1", start, 4) as log:
        log.step(start + 1, {}, 2)
        telemetry.show("stage1", start + 1, png())


def test_wandb_continues_its_run(tmp_path, wandb):
    run(tmp_path, 0)
    run(tmp_path, 1)
    first, second = wandb.started
    assert first["project"] == "tokens" and first["id"] == second["id"] and second["resume"] == "allow"
    assert ("stage1/*", "stage1/step") in wandb.axes and wandb.settings["stage1"]["log_every"] == 1
    assert [entry["stage1/step"] for entry in wandb.logged] == [1, 1, 2, 2]
    assert "stage1/images_per_second" in wandb.logged[0] and wandb.logged[1]["stage1/preview"] == ("image", (6, 4))


def test_wandb_that_is_absent_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'aligntok\[wandb\]'"):
        run(tmp_path, 0)


def test_wandb_that_refuses_is_a_users_error(tmp_path, wandb):
    def refuse(**options):
        raise RuntimeError("no login")

    wandb.init = refuse
    with pytest.raises(UserError, match=r"no login.*wandb login"):
        run(tmp_path, 0)
    assert not (tmp_path / "wandb.json").exists()


def test_a_tracker_that_fails_is_given_up_with_a_warning(tmp_path, wandb):
    def fail(values):
        raise OSError("network is unreachable")

    class Failing(FakeWandb):
        def init(self, **options):
            return SimpleNamespace(**(vars(FakeWandb.init(self, **options)) | {"log": fail}))

    sys.modules["wandb"] = Failing()
    said = io.StringIO()
    run(tmp_path, 0, Console(file=said))
    assert said.getvalue().count("W&B is given up (OSError: network is unreachable); training goes on") == 1
    assert len(Telemetry(tmp_path, 1).records()) == 1, "metrics.jsonl goes on"


# pytest takes the traceback of a thread and makes a warning of it
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_refusing_disk_is_raised_without_a_traceback_of_tensorboards_thread(tmp_path, capfd):
    tracker = TensorBoard(tmp_path)
    tracker.begin("stage1", 0, {})
    tracker.scalars({"loss": 1.0, "step": 1})
    tracker.writer.flush()
    inner = tracker.writer._get_file_writer().event_writer._async_writer
    with open("/dev/full", "wb", buffering=0) as full:
        inner._worker._record_writer._writer = full
        with pytest.raises(OSError, match="No space left"):
            for step in range(2, 200):
                tracker.scalars({"loss": 1.0, "step": step})
                time.sleep(0.01)
    assert "Traceback" not in capfd.readouterr().err
