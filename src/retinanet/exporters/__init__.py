"""Export trained models for other engines: ONNX, OpenVINO, torch packages."""

from retinanet.exporters.validate import Agreement, ExportReport, Tolerance, validate_file

__all__ = ["Agreement", "ExportReport", "Tolerance", "validate_file"]
