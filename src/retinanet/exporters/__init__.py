"""Trained models as files for other engines: ONNX, OpenVINO, torch's own packages."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retinanet.exporters.check import Agreement as Agreement
    from retinanet.exporters.check import Tolerance as Tolerance
    from retinanet.exporters.run import ExportReport as ExportReport
    from retinanet.exporters.run import check_file as check_file

__all__ = ["Agreement", "ExportReport", "Tolerance", "check_file"]

_HOMES = {"Agreement": "check", "Tolerance": "check", "ExportReport": "run", "check_file": "run"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"retinanet.exporters.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
