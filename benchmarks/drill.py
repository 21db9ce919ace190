"""Fault drills: training is disturbed in every way that a week of it may bring, and nothing may be lost.

    python -m benchmarks.drill [--seed 0] [--rounds 1] [--only NAME ...] [--jobs 2] [--output FOLDER]

Every drill runs the real command line in processes of its own, makes its fault, does what the message tells the user to
do, and compares the end with that of a run left alone: weights, latents and documents to the bit, metrics.jsonl step by
step, no unfinished files, one line of explanation, the documented exit status. The table goes to FOLDER/drill.md and
drill.json (benchmarks/results if not given). Exit status 1 if anything was lost.

A seed decides which part, step, file and bit; the moment of a kill is also the machine's chance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from random import Random

from aligntok.runtime.files import write_bytes
from aligntok.training.monitoring.progress import clock
from benchmarks.drills.disks import flipped, full_disk, read_only, truncated
from benchmarks.drills.inputs import clock_back, corrupt_images, stalled_loader
from benchmarks.drills.kills import dead_rank, impatient, kill_cache, kill_generator, kill_tokenizer, polite
from benchmarks.drills.place import Place, Trial
from benchmarks.machine import machine_line

Drill = Callable[[Place, Random], Iterator[Trial]]
DRILLS: dict[str, tuple[str, Drill]] = {
    "kill-tokenizer": ("SIGKILL in Stage 1, 2 and 3, also while a checkpoint is written", kill_tokenizer),
    "kill-generator": ("SIGKILL in the generator, likewise", kill_generator),
    "kill-cache": ("SIGKILL in the writer of the latent cache, likewise", kill_cache),
    "dead-rank": ("SIGKILL of one of two processes under torchrun", dead_rank),
    "signals": ("SIGTERM, SIGINT", polite),
    "second-signal": ("a second signal while the first one waits", impatient),
    "truncated": ("the newest checkpoint cut off", truncated),
    "bit-flip": ("one bit of the newest checkpoint changed", flipped),
    "full-disk": ("no space left", full_disk),
    "read-only": ("a folder that may not be written to", read_only),
    "corrupt-images": ("5 % of the images cannot be read", corrupt_images),
    "stalled-loader": ("an image whose reading never ends", stalled_loader),
    "clock": ("the clock goes back by an hour", clock_back),
}
RESULTS = Path(__file__).parent / "results"
_LONGEST = 300  # characters of a message in the table


def perform(name: str, place: Place, seed: int, rounds: int) -> list[Trial]:
    """All trials of a drill; an exception is a loss like any other, and ends its round."""
    trials: list[Trial] = []
    for number in range(rounds):
        chance = Random(f"{seed} {name} {number}")
        try:
            trials += DRILLS[name][1](place, chance)
        except Exception as error:
            trials.append(Trial(1, [f"{type(error).__name__}: {error}"]))
    return trials


def row(name: str, trials: list[Trial]) -> str:
    """One line of the table."""
    tried, survived = (sum(t.faults for t in found) for found in (trials, [t for t in trials if not t.lost]))
    lost = "; ".join(dict.fromkeys(loss for trial in trials for loss in trial.lost)) or "nothing"
    seen = "<br>".join(dict.fromkeys(_shown(trial.seen) for trial in trials if trial.seen))
    return f"| {DRILLS[name][0]} | {tried} | {survived} | {_shown(lost)} | {seen} |"


def _shown(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def report(results: dict[str, list[Trial]], machine: str) -> str:
    """The table with its heading."""
    every = [trial for trials in results.values() for trial in trials]
    tried, kept = sum(t.faults for t in every), sum(t.faults for t in every if not t.lost)
    head = [machine, "", f"{tried} faults tried, {kept} survived.", ""]
    head += ["| drill | tried | survived | lost | what the user saw |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(row(name, results[name]) for name in DRILLS if name in results)]) + "\n"


def run_drills(options: argparse.Namespace, folder: Path) -> dict[str, list[Trial]]:
    """All wanted drills, `jobs` at a time, with a line for each as it ends."""
    place, began, results = Place(folder), time.monotonic(), {}
    print(f"{len(options.only)} drills, {options.jobs} at a time", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        work = {pool.submit(perform, name, place, options.seed, options.rounds): name for name in options.only}
        for done in as_completed(work):
            name = work[done]
            results[name] = done.result()
            losses = [loss for trial in results[name] for loss in trial.lost]
            stamp = f"[{clock(time.monotonic() - began)}] {len(results)}/{len(work)}"
            print(f"{stamp} {name}: {'; '.join(losses) if losses else 'nothing lost'}", flush=True)
    return {name: [anonymous(trial, folder) for trial in trials] for name, trials in results.items()}


def anonymous(trial: Trial, folder: Path) -> Trial:
    """Without the names of the temporary folder and of the interpreter."""

    def told(text: str) -> str:
        return text.replace(str(folder), "FOLDER").replace(sys.executable, "python")

    return Trial(trial.faults, [told(text) for text in trial.lost], told(trial.seen))


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}, expected at least 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run the drills, print and write the table; exit status 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=_count, default=1, help="how often each drill is done, each time elsewhere")
    parser.add_argument(
        "--only", nargs="+", choices=DRILLS, default=list(DRILLS), metavar="NAME", help=f"{', '.join(DRILLS)}"
    )
    parser.add_argument("--jobs", type=_count, default=2, help="drills at a time, each with one processor")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for drill.md and drill.json")
    options = parser.parse_args(arguments)
    options.only = list(dict.fromkeys(options.only))  # of one that is given twice, one table row would hide the other
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output} cannot be made ({error.strerror}): give a folder that can be written")
    machine = machine_line()
    print(machine)
    with tempfile.TemporaryDirectory(prefix="drill-", ignore_cleanup_errors=True) as folder:
        results = run_drills(options, Path(folder))
    text = report(results, machine)
    document = {name: [dataclasses.asdict(trial) for trial in trials] for name, trials in results.items()}
    write_bytes(options.output / "drill.md", text.encode())
    write_bytes(options.output / "drill.json", json.dumps({"machine": machine, "drills": document}, indent=1).encode())
    print(f"\n{text}\n{options.output / 'drill.md'}")
    return int(any(trial.lost for trials in results.values() for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
