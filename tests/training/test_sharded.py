"""Checkpoints of several processes: written in shards, read back by any number, refused like any other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from objectives import Small, checkpoints

from aligntok.errors import UserError
from aligntok.training.recovery.checkpoint import damage
from aligntok.training.recovery.state import collect


def state_of(objective: Small) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in collect(objective).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of a single process in one/, as sharded_run.py wants it."""
    folder = tmp_path_factory.mktemp("sharded")
    objective = Small()
    with checkpoints(folder / "one") as saved:
        objective.step()
        saved.save(1, objective, {"skipped": 5})
    torch.save(state_of(objective), folder / "one" / "expected.pt")
    return folder


@pytest.fixture(scope="module")
def two(folder) -> dict:
    """What two processes say; leaves their checkpoints in ddp/ and fsdp/."""
    script = Path(__file__).with_name("sharded_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_processes_read_what_one_or_two_have_written(two):
    assert len(two["restored"]) == 6
    for name, found in two["restored"].items():
        written, read = name.split(" -> ")
        assert found["different"] == [], name
        assert (found["step"], found["guard"]["skipped"]) == ((1, 5) if written == "one" else (2, 2))
        assert (found["shards"] > 10) == (read == "fsdp")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_reads_what_two_have_written(kind, folder, two):
    newest = folder / kind / "part" / "step-00000002"
    assert damage(newest) is None
    assert len(list(newest.glob("shard-*.safetensors"))) == 2 and not list(newest.glob("*.pt"))
    objective = Small(1)
    assert checkpoints(folder / kind).restore(objective) == (2, {"skipped": 2})
    expected, found = torch.load(folder / kind / "expected.pt", weights_only=True), collect(objective)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    objective.step()


def test_a_refused_save_ends_all_processes_and_leaves_the_earlier_ones(folder, two):
    (first_flush, first_folder), (_, second_folder) = two["refused"]
    assert "No space left on device" in first_flush and "No space left on device" in first_folder
    assert "the first process could not make the folder" in second_folder
    assert sorted(path.name for path in (folder / "fsdp" / "part").iterdir()) == ["step-00000001", "step-00000002"]


def test_a_damaged_shard_is_named(folder, two):
    shard = sorted((folder / "fsdp" / "part" / "step-00000002").glob("shard-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=rf"step-00000002 is damaged \({shard.name} fails its checksum"):
        assert checkpoints(folder / "fsdp").restore(Small())[0] == 1


def test_shards_of_another_network_are_refused(folder, two):
    objective = Small()
    objective.model.append(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="another configuration: module/model/3"):
        checkpoints(folder / "ddp").restore(objective)
