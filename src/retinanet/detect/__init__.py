"""From pictures to what is found in them: the detector, its results, the files that hold them."""

from retinanet.detect.detector import Detector, load
from retinanet.detect.found import Failure, Found
from retinanet.detect.inference import Thresholds, detect_batch
from retinanet.detect.sources import Source, find_sources

__all__ = [
    "Detector",
    "Failure",
    "Found",
    "Source",
    "Thresholds",
    "detect_batch",
    "find_sources",
    "load",
]
