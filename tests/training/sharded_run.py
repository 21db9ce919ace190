"""What test_sharded.py starts under torchrun: checkpoints of a small objective on two processes.

    sharded_run.py FOLDER

FOLDER/one/part holds a checkpoint that a single process has written, FOLDER/one/expected.pt its state. The first
process prints what was found as JSON.
"""

import json
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from objectives import Small, checkpoints
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from aligntok.errors import UserError
from aligntok.runtime import files
from aligntok.runtime.world import current
from aligntok.training.recovery.state import collect


def whole(objective: Small) -> dict[str, torch.Tensor]:
    """The state with every shard gathered."""
    return {k: v.full_tensor() if isinstance(v, DTensor) else v.clone() for k, v in collect(objective).items()}


def restored(folder: Path, shard) -> dict:
    """What comes back from a folder's checkpoint into an objective of other weights."""
    objective = Small(1, shard)
    step, guard = checkpoints(folder).restore(objective)
    expected, found = torch.load(folder / "expected.pt", weights_only=True), whole(objective)
    differ = sorted(expected.keys() ^ found.keys())
    differ += [key for key in expected if not torch.equal(expected[key], found[key])]
    shards = sum(isinstance(value, DTensor) for value in collect(objective).values())
    return {"step": step, "guard": guard, "different": differ, "shards": shards}


def save(folder: Path, shard) -> None:
    """Two steps with a checkpoint after each; the state of the second is kept for comparison."""
    folder.mkdir(exist_ok=True)
    objective = Small(0, shard)
    with checkpoints(folder) as saved:
        for step in (1, 2):
            torch.manual_seed(step)
            objective.step()
            saved.save(step, objective, {"skipped": step})
        state = whole(objective)
        objective.step()  # after the copy was taken
    if current().main:
        torch.save(state, folder / "expected.pt")
    distributed.barrier()


def refused(folder: Path, shard, name: str) -> str:
    """What this process says of a save on whose way a function of aligntok.runtime.files fails in the first process."""

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    original = getattr(files, name)
    if current().main:
        setattr(files, name, no_space)
    try:
        with checkpoints(folder) as saved:
            saved.save(3, Small(0, shard), {})
    except UserError as error:
        return str(error)
    finally:
        setattr(files, name, original)
    return ""


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo")
    shard = partial(fully_shard, mesh=init_device_mesh("cpu", (current().size,)))
    for name, how in (("ddp", None), ("fsdp", shard)):
        save(folder / name, how)
    said = {
        f"{name} -> {kind}": restored(folder / name, how)
        for name in ("one", "ddp", "fsdp")
        for kind, how in (("ddp", None), ("fsdp", shard))
    }
    full = [refused(folder / "fsdp", shard, name) for name in ("_flush", "_beside")]
    everyone = [None] * current().size
    distributed.all_gather_object(everyone, full)
    if current().main:
        print(json.dumps({"restored": said, "refused": everyone}), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
