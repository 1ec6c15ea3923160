"""``retinanet export``: write a model for another engine and validate the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retinanet.cli.console import note, print_json, say, table
from retinanet.cli.settings import ClassOptions, Json, SplitOptions, ThresholdOptions, option

if TYPE_CHECKING:
    from retinanet.exporters import Agreement, ExportReport


@dataclass(frozen=True)
class FormOptions:
    """The form of the file."""

    to: str = option("onnx, openvino or torch.", ...)
    out: Path | None = option("Output file.", shown="model.onnx, .xml or .pt2 in the run folder")
    int8: bool = option("OpenVINO: quantise to int8; needs --calibrate.", False)
    calibrate: str | None = option(
        "Calibration images for int8: a data set (its training images) or a folder."
    )
    fp16: bool = option("OpenVINO: float16 weights, half the size.", False)
    no_nms: bool = option("Output boxes and scores of all anchors, for an external NMS.", False)
    aot: bool = option("torch: compile for this CPU with AOTInductor; needs a C++ compiler.", False)
    image_size: int | None = option(
        "Shorter side in pixels, built into the file.", shown="the model's"
    )


@dataclass(frozen=True)
class ValidationOptions(SplitOptions):
    """The comparison of the file with the model."""

    data: Path | None = option(
        "Labelled images to compare the file and the model on, also by AP.",
        shown="the run's validation images, without AP",
    )
    images: int = option("Number of images to compare on.", 20, min=1)
    tolerance: list[str] | None = option(
        "Allowed difference: score=, box= (pixels), apart= (share of boxes), ap=.",
        shown="the precision's own",
        metavar="NAME=NUMBER",
    )


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A run folder, a checkpoint, coco, torchvision/NAME or hf://OWNER/NAME."
        ),
    ],
    *,
    form: FormOptions,
    validation: ValidationOptions,
    selection: ClassOptions,
    thresholds: ThresholdOptions,
    json: Json = False,
) -> None:
    """Export a model to another engine's format and validate the file against the model.

    Thresholds and the image size are built into the file. The comparison is written to
    FILE.report.json. The exit code is 1 if the file is beyond the tolerance.
    """
    from retinanet.errors import ConfigError
    from retinanet.exporters.run import export as export_model

    if form.int8 and form.fp16:
        raise ConfigError("--int8 and --fp16 are both given: choose one")
    if form.aot and form.to != "torch":
        raise ConfigError(f"--aot is for --to torch, got --to {form.to}")
    report = export_model(
        model,
        "aotinductor" if form.aot else form.to,
        out=form.out,
        precision="int8" if form.int8 else "fp16" if form.fp16 else "float32",
        calibrate=form.calibrate,
        form="scores" if form.no_nms else "detections",
        image_size=form.image_size,
        progress=note,
        **{**vars(validation), "tolerance": validation.tolerance or ()},
        **selection.given(),
        **thresholds.given(),
    )
    if json:
        print_json(report.to_dict())
    else:
        _show(report)
    for failure in report.failures:
        note(f"beyond the tolerance: {failure}", style="red")
    if not report.passed:
        note(f"{report.file} was written, but its outputs differ from PyTorch", style="red")
        raise typer.Exit(1)


def _show(report: ExportReport) -> None:
    def column(side: Agreement) -> dict[str, Any]:
        return {
            "images": side.images,
            "boxes of the network": side.boxes,
            "boxes of the file": side.found,
            "matched": side.matched,
            "unmatched at a threshold": side.at_a_threshold,
            "unmatched": side.unmatched,
            "matched, beyond the tolerance": side.beyond,
            "score: largest difference": f"{side.score:.5f}",
            "box: largest difference, pixels": f"{side.box:.3f}",
        }

    prepared, whole = column(report.network_size), column(report.whole)
    table(
        f"Comparison with the network on {report.images}",
        ["", "network's size", "whole images"],
        [(name, value, whole[name]) for name, value in prepared.items()],
    )
    if report.ap is not None and report.ap_file is not None:
        say(f"AP: network {report.ap:.4f}, file {report.ap_file:.4f}")
    elif report.precision == "int8":
        say("AP not compared: give --data to see what int8 costs")
    verdict = "matches the network" if report.passed else "does NOT match the network"
    say(f"{report.file} ({report.bytes / 1e6:.1f} MB, {report.precision}): {verdict}")
