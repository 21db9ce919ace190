"""Checkpoints: what is kept, what is refused, what is written while training goes on, and by several processes."""

import json
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
from objectives import Small, checkpoints, mark
from safetensors import SafetensorError
from safetensors.torch import load_file

from aligntok.errors import UserError
from aligntok.runtime import files
from aligntok.training.recovery import checkpoint, state
from aligntok.training.recovery.best import BestValue
from aligntok.training.recovery.checkpoint import damage
from aligntok.training.recovery.state import collect


def same(a: Small, b: Small) -> bool:
    a, b = collect(a), collect(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "part").iterdir())


def trained(folder: Path, steps: int, value=lambda step: 1.0, **training) -> Small:
    """An objective that saved after every step and logged `value`."""
    objective = Small()
    with checkpoints(folder, **training) as saved:
        for step in range(1, steps + 1):
            objective.step()
            saved.observe({"loss": torch.tensor(value(step))})
            saved.save(step, objective, {"skipped": step})
    return objective


def test_everything_comes_back(tmp_path):
    objective, other = trained(tmp_path, 3), Small(seed=1)
    with checkpoints(tmp_path) as saved:
        assert saved.restore(other) == (3, {"skipped": 3})
    assert same(objective, other)
    torch.manual_seed(5)
    objective.step()
    torch.manual_seed(5)
    other.step()
    assert same(objective, other), "and goes on alike"


def test_step_counts_of_groups_come_back(tmp_path):
    """apex's FusedAdam keeps them there, and its bias correction needs them."""
    objective, other = Small(), Small(seed=1)
    objective.adam.param_groups[0]["step"] = 7
    with checkpoints(tmp_path) as saved:
        saved.save(1, objective, {})
    with checkpoints(tmp_path) as saved:
        saved.restore(other)
    assert other.adam.param_groups[0]["step"] == 7 and "step" not in other.idle.param_groups[0]


def test_an_optimizer_without_state_has_none_afterwards(tmp_path):
    trained(tmp_path, 1)
    other = Small()
    other.critic(torch.ones(1, 2)).sum().backward()
    other.idle.step()
    checkpoints(tmp_path).restore(other)
    assert not other.idle.state


def test_the_last_ones_are_kept(tmp_path):
    trained(tmp_path, 5, keep_checkpoints=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_the_best_one_is_kept_beside_them(tmp_path):
    objective = trained(tmp_path, 5, value={1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: 9.0}.get, keep_best="loss")
    assert names(tmp_path) == ["best-00000002", "step-00000004", "step-00000005"]
    assert damage(tmp_path / "part" / "best-00000002") is None
    saved = checkpoints(tmp_path, keep_best="loss")
    assert saved.restore(objective)[0] == 5
    assert (saved.best.lowest, saved.best.step) == (1.0, 2)
    saved.remove()
    assert names(tmp_path) == ["best-00000002"], "it outlives the part"


def test_a_best_one_that_a_kill_has_prevented_is_made_up_for(tmp_path):
    objective = trained(tmp_path, 2, value=lambda step: -step, keep_best="loss")
    shutil.rmtree(tmp_path / "part" / "best-00000002")
    checkpoints(tmp_path, keep_best="loss").restore(objective)
    assert "best-00000002" in names(tmp_path)


def test_the_mean_of_the_best_value_goes_on_after_an_interruption():
    straight, first, second = BestValue("loss"), BestValue("loss"), BestValue("loss")
    numbers = torch.rand(7)
    for index, number in enumerate(numbers):
        straight.observe({"loss": number})
        (first if index < 3 else second).observe({"loss": number})
        if index == 2:
            second.load_state(json.loads(json.dumps(first.state())))
    assert straight.close(7) and second.close(7)
    assert straight.lowest == second.lowest == pytest.approx(float(numbers.double().mean()))
    straight.observe({"loss": torch.tensor(2.0)})
    assert not straight.close(8) and straight.step == 7


def test_a_best_value_that_nobody_logs_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"keep_best is 'los', but no step has logged it; there are loss"):
        trained(tmp_path, 1, keep_best="los")


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damaging", "file", "said"),
    [
        (flip_a_bit, "state.safetensors", "state.safetensors fails its checksum"),
        (truncate, "state.safetensors", "state.safetensors fails its checksum"),
        (Path.unlink, "state.safetensors", "state.safetensors is missing"),
        (flip_a_bit, "state.json", "state.json"),
        (truncate, "state.json", "state.json cannot be read"),
        (Path.unlink, "state.json", "state.json cannot be read"),
        (lambda f: f.write_text(f.read_text().replace('"step": 3', '"step": 7')), "state.json", "fails its checksum"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, damaging, file, said):
    objective = trained(tmp_path, 3)
    damaging(tmp_path / "part" / "step-00000003" / file)
    with pytest.warns(UserWarning, match=f"step-00000003 is damaged .*{said}"):
        assert checkpoints(tmp_path).restore(objective)[0] == 2


def test_without_a_sound_one_nothing_is_started_over(tmp_path):
    objective = trained(tmp_path, 3)
    for step in (2, 3):
        truncate(tmp_path / "part" / f"step-0000000{step}" / "state.safetensors")
    with warnings.catch_warnings(), pytest.raises(UserError, match=r"no sound .*3 is damaged.*2 is damaged.*Remove"):
        warnings.simplefilter("ignore")
        checkpoints(tmp_path).restore(objective)


def test_a_damaged_later_one_does_not_push_out_the_new_one(tmp_path):
    objective = trained(tmp_path, 3, keep_checkpoints=1)
    truncate(tmp_path / "part" / "step-00000003" / "state.safetensors")
    with checkpoints(tmp_path, keep_checkpoints=1) as saved:
        saved.save(2, objective, {})
    assert damage(tmp_path / "part" / "step-00000002") is None


def test_another_configuration_is_named(tmp_path):
    objective = trained(tmp_path, 1)
    with pytest.raises(UserError, match=r"training.seed was 0, is 4 \(and stage.learning_rate\)"):
        checkpoints(tmp_path, mark(seed=4, workers=99, learning_rate=2e-3)).restore(objective)
    assert checkpoints(tmp_path, mark(workers=99)).restore(objective)[0] == 1, "this does not decide the course"


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    begun, wait, written = threading.Event(), threading.Event(), checkpoint.write_whole

    def slow(*arguments):
        begun.set()
        assert wait.wait(20)
        written(*arguments)

    monkeypatch.setattr(checkpoint, "write_whole", slow)
    objective, copy = Small(), Small()
    with checkpoints(tmp_path) as saved:
        objective.step()
        copy.model.load_state_dict(objective.model.state_dict())
        saved.save(1, objective, {})
        objective.step()  # changes the weights, not their copy
        saved.check()
        assert begun.wait(20)
        assert [name.endswith(".tmp") for name in names(tmp_path)] == [True]
        wait.set()
    stored = load_file(tmp_path / "part" / "step-00000001" / "state.safetensors")
    assert all(torch.equal(stored[f"module/model/{k}"], v) for k, v in copy.model.state_dict().items())


def test_a_failed_write_surfaces_and_can_be_repeated(tmp_path, monkeypatch):
    objective = trained(tmp_path, 1)

    def no_space(path):
        raise OSError(28, "No space left on device")

    with checkpoints(tmp_path) as saved:
        with monkeypatch.context() as patch:
            patch.setattr(files, "_flush", no_space)
            saved.save(2, objective, {})
            saved._writer.join()
        with pytest.raises(UserError, match=r"No space left on device.*untouched"):
            saved.check()
        saved.check()
        assert names(tmp_path) == ["step-00000001"]
        saved.save(2, objective, {})
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_write_that_the_safetensors_library_gives_up_is_a_refused_one(tmp_path, monkeypatch):
    def gives_up(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    objective = trained(tmp_path, 1)
    monkeypatch.setattr(state, "save_file", gives_up)
    with (
        pytest.raises(UserError, match=r"could not write .*step-00000002: .*No space left"),
        checkpoints(tmp_path) as to,
    ):
        to.save(2, objective, {})
    assert names(tmp_path) == ["step-00000001"]


def test_what_killed_writers_left_is_cleared_away(tmp_path):
    objective = trained(tmp_path, 2)
    part = tmp_path / "part"
    (part / ".step-00000003.0123abcd.tmp").mkdir()
    shutil.copytree(part / "step-00000001", part / ".step-00000001.0123abcd.old")
    (part / "step-00000002").rename(part / ".step-00000002.89abcdef.old")  # killed between two renames
    (part / ".notes.tmp").write_text("the user's")
    (part / ".mine.0123abcd.tmp").write_text("not a checkpoint")
    with checkpoints(tmp_path) as saved:
        assert saved.restore(objective)[0] == 2
    assert names(tmp_path) == [".mine.0123abcd.tmp", ".notes.tmp", "step-00000001", "step-00000002"]
