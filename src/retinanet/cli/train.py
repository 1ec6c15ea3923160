"""``retinanet train``: settings from the command line, the run's progress on the screen."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retinanet.cli.console import print_json, say
from retinanet.cli.settings import Settings, resolve_recipe
from retinanet.cli.training import describe_figures, run_overfit, run_training, write_report

if TYPE_CHECKING:
    from retinanet.training.overfit import OverfitResult


def train(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="A labelled folder or file: COCO, VOC, YOLO, CSV, WebDataset shards, ...",
            show_default=False,
        ),
    ] = None,
    settings: Settings = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run folder; an unfinished run in it goes on.", show_default="runs/NAME"
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="quick, paper_1x, paper_table2, demo, or a TOML file.")
    ] = "quick",
    backbone: Annotated[
        str | None, typer.Option(help="resnet18 to resnet152, mobilenet_v2, timm/NAME, ...")
    ] = None,
    backbone_weights: Annotated[
        str | None, typer.Option(help="A file, default (ImageNet, fetched), or none.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Start from this run, checkpoint, torchvision/NAME or hf://OWNER/NAME."),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(min=0, help="Exactly this many passes over the data.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Exactly this many steps.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images a step; the learning rate follows.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=32, help="Shorter side in pixels.")] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="auto, float32, bf16 or fp16.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the split, the weights and the order.")
    ] = None,
    overfit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Learn N images without augmentation, as a test of the whole pipeline; "
            "exit code 1 if they are not learned.",
        ),
    ] = None,
    show_recipe: Annotated[
        bool, typer.Option("--show-recipe", help="Print every setting as TOML and stop.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a detector on your images.

    A run that was stopped goes on where it was when the same command is given again.
    """
    from retinanet.config import to_toml

    chosen = resolve_recipe(
        recipe,
        settings,
        given={
            "model.backbone": backbone,
            "model.backbone_weights": backbone_weights,
            "train.batch_size": batch_size,
            "train.precision": precision,
            "train.seed": seed,
        },
        epochs=epochs,
        steps=steps,
        image_size=image_size,
    )
    if show_recipe:
        sys.stdout.write(to_toml(chosen))
        return
    if data is None:
        raise typer.BadParameter("name the data to train on: retinanet train DATA")
    if overfit is not None:
        result = run_overfit(
            chosen, data, out, num_images=overfit, steps=steps, device=device, init=init
        )
        _show_overfit(result, json=json)
        raise typer.Exit(result.exit_code)
    folder = out or Path("runs") / (data.resolve().stem or "run")
    run = run_training(chosen, data, folder, device=device, init=init)
    report = write_report(run)
    if json:
        print_json({"folder": run.folder, "model": run.model, "metrics": run.metrics})
        return
    if run.metrics:
        say(f"result   {describe_figures(run.metrics)}, on the images held back as val")
    say(f"model    {run.model}")
    if report is not None:
        say(f"report   {report}")
    say(f"next     retinanet detect {shlex.quote(str(run.folder))} IMAGES --out found")


def _show_overfit(result: OverfitResult, *, json: bool) -> None:
    if json:
        print_json({**asdict(result), "learned": result.learned})
        return
    loss = f"loss {result.first_loss:.3f} -> {result.last_loss:.3f}"
    say(f"overfit  {result.images} images, {result.step} steps: AP50 {result.ap50:.3f}, {loss}")
    if result.learned:
        say("verdict  learned: data, network, loss, training and evaluation work together")
    elif result.exit_code == 1:
        say(f"verdict  not learned; {result.hint}")
