"""COCO's metrics and error analysis, of models and of results.

What runs a model is imported when it is first asked for: :func:`evaluate_detections` starts without
it in a third of the time, and takes 160 MB less.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from retinanet.evaluation.coco import MAX_DETECTIONS, evaluate_detections
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.results import Results

if TYPE_CHECKING:
    from retinanet.evaluation.run import (
        evaluate,
        evaluate_model,
        match_classes,
        search,
        write_results,
    )

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


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("retinanet.evaluation.run"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
