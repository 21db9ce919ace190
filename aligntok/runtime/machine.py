"""What machine this is, for every place that prints what it runs on or what numbers were taken on."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def processor() -> str:
    """Model name from the kernel where it gives one, else what Python knows."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def devices() -> Iterator[tuple[str, str, str]]:
    """(name, what it is, a note) of the processor and of every CUDA device, or why there is none."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    yield "cpu", processor(), f"{torch.get_num_threads()} threads, {capability}"
    if torch.version.cuda is None:
        yield "cuda", "none", f"torch {torch.__version__} is built without CUDA"
        return
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
            reason = "torch finds no CUDA device"
        except Exception as error:  # the driver's complaint is what we are after
            reason = first_line(error)
        yield "cuda", "none", reason
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", card.name, f"{card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}"


def device_line(device: torch.device) -> str:
    """What is known of the device that a run uses: "cpu: NAME (2 threads, AVX512)"."""
    import torch

    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    name = device.type if index is None else f"{device.type}:{index}"
    return next((f"{name}: {value} ({note})" for found, value, note in devices() if found == name), name)


def first_line(error: BaseException) -> str:
    """Kind of an error and the first line of its message."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
