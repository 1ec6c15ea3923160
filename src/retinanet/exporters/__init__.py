"""Export trained models for other engines: ONNX, OpenVINO, torch packages."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retinanet.exporters.validate import Agreement, ExportReport, Tolerance, validate_file

__all__ = ["Agreement", "ExportReport", "Tolerance", "validate_file"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("retinanet.exporters.validate"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
