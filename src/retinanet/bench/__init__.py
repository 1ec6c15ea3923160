"""Benchmarks of each stage against the implementations in common use, on this machine."""

from retinanet.bench.benchmark import Benchmark, Case, Limit, Rival, Row, Setting, Timing
from retinanet.bench.machine import Machine, describe_machine
from retinanet.bench.run import bench, peak_memory
from retinanet.bench.stages import STAGES

__all__ = [
    "STAGES",
    "Benchmark",
    "Case",
    "Limit",
    "Machine",
    "Rival",
    "Row",
    "Setting",
    "Timing",
    "bench",
    "describe_machine",
    "peak_memory",
]
