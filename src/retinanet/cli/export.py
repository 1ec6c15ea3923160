"""``retinanet export``: write a model for another engine and validate the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retinanet.cli.console import note, print_json, say, table
from retinanet.cli.settings import (
    ClassAgnostic,
    DetectionsPerImage,
    NmsThreshold,
    ScoreThreshold,
    thresholds_of,
)

if TYPE_CHECKING:
    from retinanet.exporters import Agreement, ExportReport


Model = Annotated[
    str, typer.Argument(help="A run folder, a checkpoint, torchvision/NAME or hf://OWNER/NAME.")
]
Out = Annotated[
    Path | None,
    typer.Option(help="Output file.", show_default="model.onnx, .xml or .pt2 in the run folder"),
]
Int8 = Annotated[
    bool, typer.Option("--int8", help="OpenVINO: quantise to int8; needs --calibrate.")
]
Calibrate = Annotated[
    str | None,
    typer.Option(help="Calibration images for int8: a data set (its training images) or a folder."),
]
Fp16 = Annotated[bool, typer.Option("--fp16", help="OpenVINO: float16 weights, half the size.")]
NoNms = Annotated[
    bool,
    typer.Option("--no-nms", help="Output boxes and scores of all anchors, for an external NMS."),
]
Aot = Annotated[
    bool,
    typer.Option(
        "--aot", help="torch: compile for this CPU with AOTInductor; needs a C++ compiler."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Labelled images to compare the file and the model on, also by AP.",
        show_default="the run's validation images, without AP",
    ),
]
Split = Annotated[
    str | None, typer.Option(help="Split of --data.", show_default="val, or that of a label file")
]
Images = Annotated[int, typer.Option(min=1, help="Number of images to compare on.")]
Tolerances = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=NUMBER",
        help="Allowed difference: score=, box= (pixels), apart= (share of boxes), ap=.",
        show_default="the precision's own",
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(help="Shorter side in pixels, built into the file.", show_default="the model's"),
]


def export(
    model: Model,
    *,
    to: Annotated[str, typer.Option(help="onnx, openvino or torch.")],
    out: Out = None,
    int8: Int8 = False,
    calibrate: Calibrate = None,
    fp16: Fp16 = False,
    no_nms: NoNms = False,
    aot: Aot = False,
    data: Data = None,
    split: Split = None,
    images: Images = 20,
    tolerance: Tolerances = None,
    image_size: ImageSize = None,
    score_threshold: ScoreThreshold = None,
    nms_threshold: NmsThreshold = None,
    class_agnostic: ClassAgnostic = False,
    detections_per_image: DetectionsPerImage = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Export a model to another engine's format and validate the file against the model.

    Thresholds and the image size are built into the file. The comparison is written to
    FILE.report.json. The exit code is 1 if the file is beyond the tolerance.
    """
    from retinanet.errors import ConfigError
    from retinanet.exporters.run import export as export_model

    if int8 and fp16:
        raise ConfigError("--int8 and --fp16 are both given: choose one")
    if aot and to != "torch":
        raise ConfigError(f"--aot is for --to torch, got --to {to}")
    report = export_model(
        model,
        "aotinductor" if aot else to,
        out=out,
        precision="int8" if int8 else "fp16" if fp16 else "float32",
        calibrate=calibrate,
        nms=not no_nms,
        data=data,
        split=split,
        images=images,
        tolerance=tolerance or (),
        image_size=image_size,
        progress=note,
        **thresholds_of(
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            class_agnostic=class_agnostic,
            detections_per_image=detections_per_image,
        ),
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
    rows: list[tuple[str, Any]] = [
        ("images", lambda side: side.images),
        ("boxes of the network", lambda side: side.boxes),
        ("boxes of the file", lambda side: side.found),
        ("matched", lambda side: side.matched),
        ("unmatched at a threshold", lambda side: side.at_a_threshold),
        ("unmatched", lambda side: side.unmatched),
        ("matched, beyond the tolerance", lambda side: side.beyond),
        ("score: largest difference", lambda side: f"{side.score:.5f}"),
        ("score: median", lambda side: f"{side.score_median:.6f}"),
        ("box: largest difference, pixels", lambda side: f"{side.box:.3f}"),
        ("box: median", lambda side: f"{side.box_median:.4f}"),
    ]
    sides: list[Agreement] = [report.network_size, report.whole]
    table(
        f"Comparison with the network on {report.images}",
        ["", "network's size", "whole images"],
        [(name, *(value(side) for side in sides)) for name, value in rows],
    )
    if report.ap is not None and report.ap_file is not None:
        say(f"AP: network {report.ap:.4f}, file {report.ap_file:.4f}")
    elif report.precision == "int8":
        say("AP not compared: give --data to see what int8 costs")
    verdict = "matches the network" if report.passed else "does NOT match the network"
    say(f"{report.file} ({report.bytes / 1e6:.1f} MB, {report.precision}): {verdict}")
