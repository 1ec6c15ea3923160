"""From images to what is found in them: the detector, its results, the files that hold them."""

from retinanet.inference.backends import Thresholds, detect_batch
from retinanet.inference.detections import Failure, ImageDetections
from retinanet.inference.detector import Detector, load
from retinanet.inference.sources import Source, find_sources
from retinanet.inference.urls import UrlSource

__all__ = [
    "Detector",
    "Failure",
    "ImageDetections",
    "Source",
    "Thresholds",
    "UrlSource",
    "detect_batch",
    "find_sources",
    "load",
]
