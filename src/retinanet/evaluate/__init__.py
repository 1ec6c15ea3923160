"""COCO's metrics and error analysis, of models and of results."""

from retinanet.evaluate.coco import MAX_DETECTIONS, evaluate_detections
from retinanet.evaluate.metrics import Metrics
from retinanet.evaluate.results import Results
from retinanet.evaluate.run import evaluate, evaluate_model, match_classes, search, write_results

__all__ = [
    "MAX_DETECTIONS",
    "Metrics",
    "Results",
    "evaluate",
    "evaluate_detections",
    "evaluate_model",
    "match_classes",
    "search",
    "write_results",
]
