"""The launch scripts: sound bash, commands that torchrun and aligntok accept, signals passed on, jobs requeued."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from aligntok.cli import COMMANDS
from aligntok.config.parsing import parse_recipe

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
NODE, SLURM = SCRIPTS / "launch_node.sh", SCRIPTS / "slurm.sbatch"
TRAIN = ["train-generator", "--config", "imagenet256_f16d32", "--data.path", "/data/two words"]
JOB = {"SLURM_JOB_ID": "2042", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "first,second", "SLURM_GPUS_ON_NODE": "4"}


def _run(script, *arguments, **variables):
    environment = {**os.environ, **variables}
    return subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", [NODE, SLURM], ids=lambda p: p.name)
def test_bash_reads_it_and_it_explains_itself(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    shown = _run(script)
    assert shown.returncode == 2 and "train-tokenizer --config" in shown.stderr and "#" not in shown.stderr


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        (NODE, {"GPUS": "8"}, {"nproc_per_node": "8", "nnodes": "1", "standalone": True}),
        (SLURM, JOB, {"nproc_per_node": "4", "nnodes": "2", "rdzv_endpoint": "first:29542", "rdzv_id": "2042"}),
    ],
    ids=["node", "slurm"],
)
def test_the_printed_command_is_understood(script, variables, expected):
    done = _run(script, *TRAIN, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    options = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert expected.items() <= vars(options).items()
    assert options.module and options.training_script == "aligntok"
    command, *arguments = options.training_script_args
    assert command in COMMANDS
    assert parse_recipe(command, arguments).data.path == "/data/two words"


def test_no_gpu_is_said():
    done = _run(NODE, *TRAIN, PATH="/usr/bin:/bin", GPUS="")
    assert done.returncode == 2 and "GPUS=N" in done.stderr


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("0", 1), ("4,6,7", 3), ("GPU-a,GPU-b", 2)], ids=["all", "one", "three", "names"]
)
def test_a_process_for_each_gpu_that_is_visible(visible, count, tmp_path):
    """nvidia-smi lists all of the machine's, and a line for each of their MIG parts."""
    smi = tmp_path / "nvidia-smi"
    lines = ["GPU 0: H100 (UUID: GPU-a)", "  MIG 1g.10gb", "GPU 1: H100 (UUID: GPU-b)"]
    smi.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    smi.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    given = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = _run(NODE, *TRAIN, PATH=path, GPUS="", DRY_RUN="1", **given)
    assert f"--nproc-per-node={count} " in done.stdout, done.stderr


def _slurm_stand_ins(folder: Path, step: str) -> dict[str, str]:
    """A PATH on which srun runs `step` and scontrol writes down what it was asked."""
    scripts = {
        "srun": step,
        "scontrol": f'echo "$@" >> {folder}/asked; if [ "$1" = show ]; then printf "first\\nsecond\\n"; fi',
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, **JOB, "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(("status", "step"), [(0, "exit 0"), (3, "exit 3")])
def test_a_job_that_ends_by_itself_is_not_requeued(tmp_path, status, step):
    environment = _slurm_stand_ins(tmp_path, step)
    assert subprocess.run(["bash", SLURM, *TRAIN], env=environment, check=False).returncode == status
    assert "requeue" not in (tmp_path / "asked").read_text()


def test_a_job_at_its_time_limit_saves_and_is_requeued(tmp_path):
    saving = f"trap 'sleep 0.3; touch {tmp_path}/saved; exit 143' TERM"
    step = f"{saving}; touch {tmp_path}/running; while :; do sleep 0.1; done"
    job = subprocess.Popen(["bash", SLURM, *TRAIN], env=_slurm_stand_ins(tmp_path, step))
    try:
        for _ in range(300):
            if (tmp_path / "running").exists():
                break
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=30) == 143
    finally:
        job.kill()
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "requeue 2042"
