"""The whole quickstart of two installations of aligntok, an earlier one and a later one, side by side in one run.

    git worktree add ../before ee7078f && make -C ../before install && make install
    python -m benchmarks.bench_quickstart --before ../before/.venv/bin/python --after .venv/bin/python

A shared machine may run at half its speed for minutes, so that two runs one after the other say little. Here both are
started and take turns: one is stopped (SIGSTOP) while the other has all processors for some seconds. The slower one
ends a part by itself, before the other begins the next. A part's seconds are those in which its run was not stopped,
to within a turn.
Arguments behind `--` go to both, for example: -- --tokenizer.stages.stage1.steps 50
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from aligntok.errors import UserError
from benchmarks.machine import machine_line

PSNR = "PSNR [dB]"


class Run:
    """One quickstart in its own session, stopped unless it has its turn."""

    def __init__(self, python: str, folder: Path, arguments: list[str]) -> None:
        self.folder = folder
        self.parts: dict[str, float] = {}
        self.seconds = 0.0
        folder.mkdir(parents=True)
        self.interpreter = str(Path(python).absolute())
        command = [self.interpreter, "-m", "aligntok", "quickstart", "--output", str(folder / "run"), *arguments]
        with open(folder / "output.txt", "w") as output:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> None:
        """Let it run for some seconds, or to its end, and note the parts that it has finished."""
        before = time.perf_counter()
        self._signal(signal.SIGCONT)
        try:
            status = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGSTOP)
            status = 0
        self.seconds += time.perf_counter() - before
        if status:
            raise UserError(f"{self.interpreter} ended with status {status}: see {self.folder / 'output.txt'}")
        self._note_parts()

    @property
    def finished(self) -> bool:
        return self.process.returncode is not None

    def psnr(self) -> float:
        """Of held-out pictures after the last stage."""
        stages = json.loads((self.folder / "run" / "results.json").read_text())["reconstruction"]
        return list(stages.values())[-1][PSNR]

    def end(self) -> None:
        """Whatever it is doing."""
        if not self.finished:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def _note_parts(self) -> None:
        """Seconds of its own up to the turn in which a part ended, less those of the parts before."""
        times = self.folder / "run" / "times.json"
        for name in json.loads(times.read_text()) if times.is_file() else ():
            if name not in self.parts:
                self.parts[name] = self.seconds - sum(self.parts.values())

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)


def alternate(runs: dict[str, Run], seconds: float) -> None:
    """Turns until all have finished; who has finished fewer parts, or has had less time, goes first."""
    shown = 0
    while waiting := [run for run in runs.values() if not run.finished]:
        min(waiting, key=lambda run: (len(run.parts), run.seconds)).turn(seconds)
        if (known := sum(len(run.parts) for run in runs.values())) > shown:
            shown = known
            states = (f"{name}: {', '.join(run.parts)} in {run.seconds:.0f} s" for name, run in runs.items())
            print("; ".join(states), file=sys.stderr)


def report(runs: dict[str, Run]) -> str:
    """A table of the parts; start-up counts to the first of them, the page to none but the sum."""
    before, after = runs.values()
    lines = [f"| part | {' | '.join(runs)} | ratio |", "|---|---|---|---|"]
    for name in after.parts:
        lines.append(_line(name, before.parts.get(name, 0.0), after.parts[name]))
    lines.append(_line("all", before.seconds, after.seconds))
    return "\n".join([*lines, "", f"held-out PSNR after the last stage: {before.psnr():.2f} and {after.psnr():.2f} dB"])


def _line(name: str, before: float, after: float) -> str:
    ratio = f"{before / after:.2f}x" if after else "-"
    return f"| {name} | {before:.0f} s | {after:.0f} s | {ratio} |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="Python of the environment with the earlier aligntok")
    parser.add_argument("--after", default=sys.executable, help="and with the later one; default: this one")
    parser.add_argument("--turn", type=float, default=4.0, help="seconds that a run has the machine for itself")
    parser.add_argument("arguments", nargs="*", help="of `aligntok quickstart`, behind --")
    options = parser.parse_args()
    pythons = {"before": options.before, "after": options.after}
    for name, python in pythons.items():
        if not os.access(python, os.X_OK):
            parser.error(f"--{name} is {python!r}, expected the Python of an environment with aligntok in it")
    folder, runs = Path(tempfile.mkdtemp(prefix="quickstart-")), {}
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # or the stopped runs stay behind
    try:
        for name, python in pythons.items():
            runs[name] = Run(python, folder / name, options.arguments)
        alternate(runs, options.turn)
        print(machine_line(), report(runs), f"both runs are in {folder}", sep="\n\n")
    except UserError as error:
        print(f"bench_quickstart: {error}", file=sys.stderr)
        return 1
    finally:
        for run in runs.values():
            run.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
