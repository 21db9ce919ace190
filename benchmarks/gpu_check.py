"""Everything that only a GPU can tell, the most valuable first: smoke, training steps, attention, operators, tests.

    python -m benchmarks.gpu_check [--limit 480] [--output FOLDER]                         (make gpu-check)
    python -m benchmarks.gpu_check --rehearse                                              the same, small, anywhere

Each part is a command of its own with a limit of its own, cut to what is left of --limit. After each of them
gpu_check_<device>.json and .md are written, with every output, what was stopped, and the names of what was not reached;
the exit status is 1 if a part failed. A rehearsal runs the same parts at their smallest on whatever is there, without a
GPU too, so that what a GPU will be asked to do is known to be askable.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from aligntok.runtime.files import write_bytes
from benchmarks.machine import device_name, machine_line

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 480
STEPS = (("XL", 256, 32), ("B", 256, 64))  # size, tokens, batch
SMALLER_STEPS = (
    ("B", 256, 64),
    ("S", 256, 128),
)  # four paths of XL with their optimizers take 43 GB before activations
LARGE_BYTES = 70e9  # of a GPU's memory, for XL
FIRST = ("qknorm_attention", "qknorm_rope")  # of the operators: what most of a long step's time depends on
TESTED = ("tests/kernels", "tests/models", "tests/diffusion")
PATIENCE = 10  # a rehearsal on a laptop's processor asks whether commands run, not how fast
NOT_REACHED = "not reached"


@dataclass
class Part:
    """One command, the seconds that it may take, and what became of it."""

    name: str
    command: list[str]
    limit: float
    status: int | str = NOT_REACHED  # exit status, 124 where it was stopped
    seconds: float = 0.0
    output: str = ""


def steps() -> tuple[tuple[str, int, int], ...]:
    """The training steps that fit this GPU; STEPS where none is."""
    if not torch.cuda.is_available() or torch.cuda.get_device_properties().total_memory >= LARGE_BYTES:
        return STEPS
    return SMALLER_STEPS


def operators() -> list[str]:
    """The public operators: those of kernels/ that have a benchmark, attention first."""
    found = sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py"))
    return [*FIRST, *(op for op in found if op not in FIRST)]


def parts(rehearse: bool = False) -> list[Part]:
    """The commands, in the order in which they run."""

    def module(name: str, limit: float, *options: str, title: str | None = None) -> Part:
        return Part(title or name, [sys.executable, "-m", name, *options], limit)

    options: tuple[str, ...]
    found = [module("aligntok", 60, "doctor", title="environment"), module("benchmarks.smoke", 90, title="smoke")]
    for size, tokens, batch in (("S", 4, 2),) if rehearse else steps():
        options = ("--size", size, "--tokens", str(tokens), "--batch", str(batch), "--rounds", "1" if rehearse else "7")
        found.append(module("benchmarks.bench_training_step", 150, *options, title=f"training step {size}/1"))
    for op in operators():
        quick = ("--phase", "both", "--seconds", "0", "--smallest")
        options = quick if rehearse else ("--phase", "all", "--seconds", "0.3")
        found.append(module(f"benchmarks.bench_{op}", 45, *options, title=f"bench_{op}"))
    options = ("--collect-only",) if rehearse else ("-n", "auto", "--maxprocesses", "8")
    found.append(module("pytest", 300, "-q", *options, *TESTED, title="tests"))
    for part in found:
        part.limit *= PATIENCE if rehearse else 1
    return found


def run(part: Part, deadline: float, **more: str) -> None:
    """Run one command within its limit and the deadline, and keep what it printed; stopped, it has status 124."""
    began = time.monotonic()
    allowed = min(part.limit, deadline - began)
    if allowed <= 0:
        return
    try:
        options: dict[str, Any] = {"cwd": ROOT, "env": os.environ | more, "capture_output": True, "text": True}
        answer = subprocess.run(part.command, **options, timeout=allowed, check=False)
        part.status, part.output = answer.returncode, answer.stdout
        if answer.returncode:
            part.output += "\n" + answer.stderr
    except subprocess.TimeoutExpired as error:
        printed = "\n".join((text or b"").decode(errors="replace") for text in (error.stdout, error.stderr))
        part.status, part.output = 124, f"stopped after {allowed:.0f} s\n{printed}"
    part.seconds = time.monotonic() - began


def page(done: list[Part]) -> str:
    """All outputs as Markdown."""
    lines = ["# GPU check", machine_line(), "| part | exit status | seconds | limit |\n|---|---|---|---|"]
    lines[-1] += "".join(f"\n| {part.name} | {part.status} | {part.seconds:.0f} | {part.limit:.0f} |" for part in done)
    if missed := [part.name for part in done if part.status == NOT_REACHED]:
        lines.append(f"Not reached: {', '.join(missed)}.")
    for part in done:
        if part.status != NOT_REACHED:
            lines += [f"## {part.name}", f"```\n{part.output.strip()}\n```"]
    return "\n\n".join(lines) + "\n"


def write(folder: Path, every: list[Part]) -> Path:
    """gpu_check_<device>.json and .md with what is known by now; returns the page."""
    slug = re.sub(r"\W+", "_", device_name()).strip("_").lower()
    data: dict[str, Any] = {"device": device_name(), "torch": torch.__version__, "date": date.today().isoformat()}
    data["parts"] = [asdict(part) for part in every]
    write_bytes(folder / f"gpu_check_{slug}.json", json.dumps(data, indent=1).encode())
    write_bytes(folder / f"gpu_check_{slug}.md", page(every).encode())
    return folder / f"gpu_check_{slug}.md"


def run_all(every: list[Part], limit: float, folder: Path, **more: str) -> Iterator[Part]:
    """Run the parts in turn, results on disk after each; yields each when it is done or passed over.

    `more` is added to the commands' environment.
    """
    deadline = time.monotonic() + limit
    for part in every:
        run(part, deadline, **more)
        write(folder, every)
        yield part


def main() -> int:
    """Run all parts; exit status 1 if one failed, 2 without a CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for everything (default: 480)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the two files")
    parser.add_argument("--rehearse", action="store_true", help="every part at its smallest, on any machine")
    options = parser.parse_args()
    # In a rehearsal nothing is compiled: that takes minutes on a CPU and tells nothing of the GPU
    more = {"TORCHDYNAMO_DISABLE": "1"} if options.rehearse else {}
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu-check needs a CUDA device: torch.cuda.is_available() is False here", file=sys.stderr)
        return 2
    every = parts(options.rehearse)
    for part in run_all(every, options.limit, options.output, **more):
        print(f"{part.name}: {part.status}, {part.seconds:.0f} of {part.limit:.0f} s", flush=True)
    print(f"wrote {write(options.output, every)}")
    return int(any(part.status not in (0, NOT_REACHED) for part in every))


if __name__ == "__main__":
    sys.exit(main())
