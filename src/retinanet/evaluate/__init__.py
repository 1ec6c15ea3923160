"""COCO's metrics and error analysis."""

from retinanet.evaluate.coco import MAX_DETECTIONS, evaluate_detections
from retinanet.evaluate.metrics import Metrics
from retinanet.evaluate.results import Results

__all__ = ["MAX_DETECTIONS", "Metrics", "Results", "evaluate_detections"]
