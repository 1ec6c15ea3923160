"""``retinanet export``: a trained model as a file for other engines, checked beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retinanet.cli.console import note, print_json, say, table
from retinanet.cli.settings import ClassAgnostic, thresholds_of

if TYPE_CHECKING:
    from retinanet.exporters import Agreement, ExportReport


def export(
    model: Annotated[
        str,
        typer.Argument(help="A run folder, a checkpoint, torchvision/NAME or hf://OWNER/NAME."),
    ],
    *,
    to: Annotated[str, typer.Option(help="onnx, openvino or torch.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The file.", show_default="model.onnx, .xml or .pt2 in the run folder"),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="OpenVINO: in int8, with --calibrate.")
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(help="A data set (its training images) or images to calibrate int8 on."),
    ] = None,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="OpenVINO: weights in float16, half the size.")
    ] = False,
    no_nms: Annotated[
        bool,
        typer.Option("--no-nms", help="Boxes and scores of all anchors, for another's NMS."),
    ] = False,
    aot: Annotated[
        bool,
        typer.Option("--aot", help="torch: machine code for this processor; needs a compiler."),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Labelled images to compare on, and to judge both by AP.",
            show_default="images of the run's own data, without AP",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of --data.", show_default="val, or what a file holds")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images to compare on.")] = 20,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="score=, box= (pixels), apart= (share of boxes), ap=: what is no failure.",
            show_default="the precision's own",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Shorter side in pixels, built in.", show_default="the model's"),
    ] = None,
    score_threshold: Annotated[
        float | None, typer.Option(help="Built in.", show_default="the model's, .05")
    ] = None,
    nms_threshold: Annotated[
        float | None, typer.Option(help="Built in.", show_default="the model's, .5")
    ] = None,
    class_agnostic: ClassAgnostic = False,
    detections_per_image: Annotated[
        int | None, typer.Option(help="Built in.", show_default="the model's, 100")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a model as a file for another engine, and compare the file with the model.

    The report lies beside the file, in FILE.report.json. Where the file is beyond the tolerance the
    exit code is 1.
    """
    from retinanet.exporters.run import export as write

    report = write(
        model,
        to,
        out=out,
        int8=int8,
        calibrate=calibrate,
        fp16=fp16,
        nms=not no_nms,
        aot=aot,
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
        note(f"{report.file} is there, but do not use it before you know why", style="red")
        raise typer.Exit(1)


def _show(report: ExportReport) -> None:
    rows: list[tuple[str, Any]] = [
        ("images", lambda one: one.images),
        ("boxes of the network", lambda one: one.boxes),
        ("boxes of the file", lambda one: one.found),
        ("matched", lambda one: one.matched),
        ("left out at a threshold", lambda one: one.at_a_threshold),
        ("no match", lambda one: one.unmatched),
        ("matched, beyond the tolerance", lambda one: one.beyond),
        ("score: largest difference", lambda one: f"{one.score:.5f}"),
        ("score: median", lambda one: f"{one.score_median:.6f}"),
        ("box: largest difference, pixels", lambda one: f"{one.box:.3f}"),
        ("box: median", lambda one: f"{one.box_median:.4f}"),
    ]
    sides: list[Agreement] = [report.network_size, report.whole]
    table(
        f"The file beside the network, on {report.images}",
        ["", "at the network's size", "whole images"],
        [(name, *(value(one) for one in sides)) for name, value in rows],
    )
    if report.ap is not None and report.ap_file is not None:
        say(f"AP of the network {report.ap:.4f}, of the file {report.ap_file:.4f}")
    verdict = "as the network" if report.passed else "NOT as the network"
    say(f"{report.file} ({report.bytes / 1e6:.1f} MB, {report.precision}): {verdict}")
