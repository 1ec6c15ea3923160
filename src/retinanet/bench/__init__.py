"""How long each part takes beside the one that people would use otherwise, on this machine."""

from retinanet.bench.contest import Contest, Row, Timing
from retinanet.bench.run import bench, peak_memory
from retinanet.bench.stages import STAGES

__all__ = ["STAGES", "Contest", "Row", "Timing", "bench", "peak_memory"]
