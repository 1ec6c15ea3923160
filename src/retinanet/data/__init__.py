"""Labelled pictures: reading, checking, converting, and on to batches."""

from retinanet.data.check import usable
from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.formats import digest, find_format, read_dataset, read_splits

__all__ = [
    "Annotation",
    "Dataset",
    "LabelledImage",
    "Problem",
    "digest",
    "find_format",
    "read_dataset",
    "read_splits",
    "usable",
]
