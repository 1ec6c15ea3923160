"""How long each part takes beside the one that people would use otherwise, on this machine."""

from retinanet.bench.contest import Case, Contest, Limit, Rival, Row, Setting, Timing
from retinanet.bench.goals import GOALS, GPU_GOALS
from retinanet.bench.machine import Machine, describe_machine
from retinanet.bench.rivals import RIVALS
from retinanet.bench.run import bench, peak_memory
from retinanet.bench.stages import STAGES

__all__ = [
    "GOALS",
    "GPU_GOALS",
    "RIVALS",
    "STAGES",
    "Case",
    "Contest",
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
