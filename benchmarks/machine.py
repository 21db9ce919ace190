"""What the figures were measured on: the machine's name, its bandwidth and its matmul rate."""

import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from aligntok.runtime.machine import processor
from aligntok.training.monitoring import throughput

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Larger than any cache: 1 GiB on a GPU (H100: 50 MB of L2), 256 MiB on a CPU
_COPIED_BYTES = 2**30 if CUDA else 2**28
_REPEATS = 7


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    """Time that a call takes, the GPU's part included."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def device_name() -> str:
    """The GPU, or the processor."""
    if CUDA:
        return torch.cuda.get_device_name()
    return processor()


def machine_line() -> str:
    """Device, threads, torch, date and command, in one line to print above every table."""
    extent = f"CUDA {torch.version.cuda}" if CUDA else torch.backends.cpu.get_cpu_capability()
    date = datetime.date.today().isoformat()
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    threads = f"{torch.get_num_threads()} threads"
    return f"{device_name()}, {extent}, {threads}, torch {torch.__version__}, {date}, `{command}`"


def _median_seconds(work: Callable[[], object]) -> float:
    work()
    samples = []
    for _ in range(_REPEATS):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


@cache
def bandwidth() -> float:
    """Bytes per second of a large copy, read and write counted: what a memory-bound kernel can reach here."""
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / _median_seconds(lambda: target.copy_(source))


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOPs per second of one large square matrix product."""
    return throughput.matmul_rate(torch.device(DEVICE), dtype)
