"""Labelled images: reading, checking, converting, and on to batches."""

from retinanet.data.check import CheckReport, check_datasets, usable
from retinanet.data.convert import Written, convert
from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.fix import write_fixed
from retinanet.data.formats import DataSource, digest, find_data, read_dataset, read_splits
from retinanet.data.statistics import AnchorRecall, Statistics, anchor_recall

__all__ = [
    "AnchorRecall",
    "Annotation",
    "CheckReport",
    "DataSource",
    "Dataset",
    "LabelledImage",
    "Problem",
    "Statistics",
    "Written",
    "anchor_recall",
    "check_datasets",
    "convert",
    "digest",
    "find_data",
    "read_dataset",
    "read_splits",
    "usable",
    "write_fixed",
]
