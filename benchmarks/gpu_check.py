"""Everything that only a GPU can tell, in under eight minutes: tests, microbenchmarks, training throughput.

    python -m benchmarks.gpu_check [--seconds 0.3] [--output FOLDER]                       (make gpu-check)

Runs the tests of the kernels and of everything marked `cuda` on the device, every benchmark against eager PyTorch,
torch.compile and the installed attention libraries, and training steps of LightningDiT-B/1 and -XL/1 with the fused
operators and with the references. Writes gpu_check_<device>.json and .md with the device's name and every output, even
where a part fails; the exit status is 1 then.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from aligntok.runtime.files import write_bytes
from benchmarks.machine import machine_line

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 480
BENCHMARKS = sorted(
    path.stem for path in Path(__file__).parent.glob("bench_*.py") if path.stem != "bench_training_step"
)
STEPS = (("B", 256, 64), ("XL", 256, 32))  # size, tokens, batch


@dataclass
class Part:
    """One command with what it printed."""

    name: str
    command: list[str]
    status: int = 0
    seconds: float = 0.0
    output: str = ""


def parts(seconds: float) -> list[Part]:
    """The commands, in the order in which they run."""
    python = sys.executable
    found = [Part("tests", [python, "-m", "pytest", "-q", "tests/kernels", "tests/models", "tests/diffusion"])]
    for name in BENCHMARKS:
        command = [python, "-m", f"benchmarks.{name}", "--phase", "all", "--seconds", str(seconds)]
        found.append(Part(name, command))
    for size, tokens, batch in STEPS:
        options = ["--size", size, "--tokens", str(tokens), "--batch", str(batch)]
        found.append(Part(f"training step {size}/1", [python, "-m", "benchmarks.bench_training_step", *options]))
    return found


def run(part: Part, deadline: float) -> None:
    """Run one command and keep its output; a command past the deadline is stopped and says so."""
    start = time.monotonic()
    if start >= deadline:
        part.status, part.output = 124, "left out: the time was used up"
        return
    try:
        answer = subprocess.run(
            part.command, cwd=ROOT, capture_output=True, text=True, timeout=deadline - start, check=False
        )
        part.status, part.output = (
            answer.returncode,
            answer.stdout + ("\n" + answer.stderr if answer.returncode else ""),
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        part.status, part.output = 124, f"stopped: the time was used up\n{printed.decode(errors='replace')}"
    part.seconds = time.monotonic() - start


def page(done: list[Part]) -> str:
    """All outputs as Markdown."""
    lines = ["# GPU check", machine_line(), "| part | exit status | seconds |\n|---|---|---|"]
    lines[-1] += "".join(f"\n| {part.name} | {part.status} | {part.seconds:.0f} |" for part in done)
    for part in done:
        lines += [f"## {part.name}", part.output.strip()]
    return "\n\n".join(lines) + "\n"


def main() -> int:
    """Run all parts; exit status 1 if one failed, 2 without a CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.3, help="time per row of a benchmark (default: 0.3)")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for everything (default: 480)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the two files")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device: torch.cuda.is_available() is False here", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.limit
    done = []
    for part in parts(options.seconds):
        print(f"{part.name} ...", end=" ", flush=True)
        run(part, deadline)
        print(f"exit status {part.status}, {part.seconds:.0f} s", flush=True)
        done.append(part)
        slug = re.sub(r"\W+", "_", torch.cuda.get_device_name()).strip("_").lower()
        data: dict[str, Any] = {"device": torch.cuda.get_device_name(), "date": date.today().isoformat()}
        data["parts"] = [asdict(one) for one in done]
        write_bytes(options.output / f"gpu_check_{slug}.json", json.dumps(data, indent=1).encode())
        write_bytes(options.output / f"gpu_check_{slug}.md", page(done).encode())
    print(f"wrote {options.output / f'gpu_check_{slug}.md'}")
    return int(any(part.status for part in done))


if __name__ == "__main__":
    sys.exit(main())
