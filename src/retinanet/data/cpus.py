"""Processors and memory of this machine. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_GROUP = Path("/sys/fs/cgroup")  # of a container


def usable_cpus() -> int:
    """Return the number of usable processors, by affinity and container quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = (_GROUP / "cpu.max").read_text("ascii").split()
        return max(1, min(cpus, int(quota) // int(period)))
    except (OSError, ValueError):  # no such limit ("max"), or no Linux
        return cpus


def free_memory() -> int:
    """Return the bytes of memory that are free, within the limit of a container."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        rows = (_GROUP / "memory.stat").read_text().splitlines()
        unneeded = int(dict(row.split() for row in rows)["inactive_file"])  # copies of files
    except (OSError, ValueError, KeyError):  # no such limit ("max"), or no Linux
        return free
    return max(0, min(free, limit - used + unneeded))
