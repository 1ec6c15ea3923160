"""Processors of this machine. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cpus() -> int:
    """Return the number of usable processors, by affinity and container quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
        return max(1, min(cpus, int(quota) // int(period)))
    except (OSError, ValueError):  # no such limit ("max"), or no Linux
        return cpus
