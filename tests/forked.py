"""Runs `aligntok` commands as processes of their own, without paying for their imports each time.

Started as a script, it imports everything once and then forks for every line on its standard input: JSON with the
`arguments` of the command, the file for its `output`, and optionally what is to happen to the process on its way:

    {"part": P, "step": S, "delay": D}                    SIGKILL, D seconds after step S of part P was logged
    {"at": NAME, "call": N, "does": "kill" or "hang"}     to the thread that writes checkpoints, at its N-th call of a
                                                          function of runtime.files or training.recovery.checkpoint

It answers every line with the process's number, and when that has ended with its status.

`run_at_once` starts several commands in the same way, which run beside each other and may belong together as those that
torchrun starts.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any


class Forked:
    """The tests' side: a context with a warm parent process."""

    running: int | None = None

    def __enter__(self) -> "Forked":
        # The same package as here, and one thread: a forked process must not inherit half a thread pool
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self.parent = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.parent.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.parent.stdin.close()
        if self.running is not None:  # a test has failed in between
            os.kill(self.running, signal.SIGKILL)
        self.parent.wait(30)

    def start(self, arguments: list[str], output: Path, fate: dict[str, Any] | None = None) -> int:
        """Begin a command; returns its process number."""
        request = {"arguments": arguments, "output": str(output), "fate": fate}
        print(json.dumps(request), file=self.parent.stdin, flush=True)
        self.running = int(self.parent.stdout.readline())
        return self.running

    def wait(self) -> int:
        """Exit status of the running command, negative for the signal that ended it."""
        status, self.running = int(self.parent.stdout.readline()), None
        return status


@dataclass
class Job:
    """A command, the environment of its process, and what `prepare` of `run_at_once` is called with there."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    prepare: dict[str, Any] = field(default_factory=dict)


# For `run_at_once`: `die_on(n)` has the process killed at its n-th flush of a file to the disk.
DIES_ON_A_FLUSH = """
from aligntok.runtime import files

def die_on(number):
    flush, flushes = files._flush, []
    def flush_or_die(path):
        flushes.append(path)
        if len(flushes) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)
    files._flush = flush_or_die
"""

AT_ONCE = """
import json, os, signal, sys
from aligntok import cli

{setup}

def run(job):
    os.dup2(2, 1)
    os.environ.update(job["environment"])
    prepare(**job["prepare"])
    status = cli.main(job["arguments"])
    sys.stdout.flush()
    return status

jobs = {{}}
for name, job in json.load(sys.stdin).items():
    jobs[name] = os.fork()
    if not jobs[name]:
        os._exit(run(job))
print(json.dumps({{name: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for name, pid in jobs.items()}}))
"""


def run_at_once(jobs: dict[str, Job], setup: str) -> tuple[dict[str, int], str]:
    """Exit statuses by name, and what all of them said; `setup` imports what all need and defines `prepare`."""
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE.format(setup=setup)],
        input=json.dumps({name: asdict(job) for name, job in jobs.items()}),
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def places(size: int) -> list[dict[str, str]]:
    """The environments of the processes that torchrun starts on one machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        group = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    return [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(part: str, step: int, delay: float) -> None:
    """Have the process killed some time after a step."""
    from aligntok.training.monitoring.telemetry import PartLog

    original = PartLog.step

    def logged(self: PartLog, done: int, *arguments: Any) -> None:
        original(self, done, *arguments)
        if (self.name, done) == (part, step):
            threading.Timer(delay, kill).start()

    PartLog.step = logged


def lie_in_wait(at: str, call: int, does: str) -> None:
    """Replace a function by one that kills the process, or hangs, at the writing thread's `call`-th call."""
    from aligntok.runtime import files
    from aligntok.training.recovery import checkpoint

    owner = files if hasattr(files, at) else checkpoint
    original, calls = getattr(owner, at), []

    def deadly(*arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            calls.append(1)
            if len(calls) == call:
                kill() if does == "kill" else time.sleep(60)
        return original(*arguments)

    setattr(owner, at, deadly)


def main() -> None:
    from aligntok.cli import main as command

    for module in ("aligntok.training.train_generator", "torch.utils.tensorboard", "jsonargparse"):
        import_module(module)

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            file = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            if fate := request["fate"]:
                (lie_in_wait if "at" in fate else kill_after)(**fate)
            status = command(request["arguments"])
            sys.stdout.flush()
            os._exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(0)  # nothing to tidy up, and much to take down


if __name__ == "__main__":
    main()
