"""The name of the machine's processor, for every place that prints what numbers were taken on."""

from __future__ import annotations

import platform


def processor() -> str:
    """Model name from the kernel where it gives one, else what Python knows."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
