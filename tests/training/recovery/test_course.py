"""What tells one run from another: weights by what they are, wherever they lie."""

import json

import pytest
from objectives import Small, checkpoints

from aligntok.config import DataConfig, PerceptualConfig, TrainingConfig
from aligntok.errors import UserError
from aligntok.runtime.devices import choose_precision
from aligntok.training.recovery.course import by_content, course


def mark(weights: str) -> dict:
    losses = {"perceptual": PerceptualConfig(kind="lpips-vgg", weights=weights)}
    return course(TrainingConfig(), choose_precision("cpu"), DataConfig(), losses=losses)


def test_weights_are_known_by_their_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.pth").write_bytes(b"weights")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "b.pth").write_bytes(b"weights")
    (tmp_path / "link.pth").symlink_to("a.pth")
    spelled = ["a.pth", "./copy/../a.pth", str(tmp_path / "a.pth"), "~/a.pth", "link.pth", "copy/b.pth", "copy"]
    assert len({json.dumps(mark(name)) for name in spelled}) == 1
    (tmp_path / "other.pth").write_bytes(b"others")
    assert mark("other.pth") != mark("a.pth")


@pytest.mark.parametrize("value", ["pretrained", "random", "https://host/file.pth", "not/there.pth", "", None, 3])
def test_what_is_no_file_stays_as_it_is(value):
    assert by_content("model.encoder.weights", value) == value


def test_other_values_stay_as_they_are(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    assert by_content("output", str(tmp_path / "file")) == str(tmp_path / "file")


def test_a_checkpoint_from_before_goes_on_where_its_weights_are_the_same(tmp_path):
    """They were known by where they lay."""
    (tmp_path / "a.pth").write_bytes(b"weights")
    then = mark("random") | {"losses.perceptual.weights": str(tmp_path / "a.pth")}
    with checkpoints(tmp_path, then) as written:
        written.save(1, Small(), {})
    (tmp_path / "b.pth").write_bytes(b"weights")
    assert checkpoints(tmp_path, mark(str(tmp_path / "b.pth"))).restore(Small())[0] == 1
    (tmp_path / "b.pth").write_bytes(b"another's")
    with pytest.raises(UserError, match=r"losses.perceptual.weights was sha256 \w+, is sha256 \w+"):
        checkpoints(tmp_path, mark(str(tmp_path / "b.pth"))).restore(Small())
