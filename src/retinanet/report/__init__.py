"""Plots and HTML reports."""

from retinanet.report.html import Page, add_metrics, draw_truth, write_report
from retinanet.report.plots import (
    plot_evaluation,
    plot_object_sizes,
    plot_running,
    plot_training,
)

__all__ = [
    "Page",
    "add_metrics",
    "draw_truth",
    "plot_evaluation",
    "plot_object_sizes",
    "plot_running",
    "plot_training",
    "write_report",
]
