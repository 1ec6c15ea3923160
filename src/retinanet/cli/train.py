"""``retinanet train``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retinanet.cli.console import print_json, say
from retinanet.cli.settings import Device, ImageSize, Json, Settings, resolve_recipe
from retinanet.cli.training import describe_metrics, run_overfit, run_training, write_report

if TYPE_CHECKING:
    from retinanet.training.overfit import OverfitResult

Data = Annotated[
    Path | None,
    typer.Argument(
        metavar="DATA",
        help="A labelled folder or file: COCO, VOC, YOLO, CSV, WebDataset shards, ...",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Run folder; an unfinished run in it is resumed.", show_default="runs/NAME of DATA"
    ),
]
RecipeName = Annotated[
    str, typer.Option("--recipe", help="Recipe: quick, paper_1x, paper_table2, demo, or a file.")
]
Backbone = Annotated[
    str | None,
    typer.Option(help="Backbone: resnet18 to resnet152, mobilenet_v2, timm/NAME, ..."),
]
BackboneWeights = Annotated[
    str | None,
    typer.Option(help="Backbone weights: a file, default (ImageNet, downloaded), or none."),
]
Init = Annotated[
    str | None,
    typer.Option(
        help="Detector to start from: a run, a checkpoint, torchvision/NAME or hf://OWNER/NAME."
    ),
]
Epochs = Annotated[float | None, typer.Option(min=0, help="Exact number of epochs.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Exact number of steps.")]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Images per step; the learning rate is scaled with it."),
]
Precision = Annotated[
    str | None, typer.Option(help="Training precision: auto, float32, bf16 or fp16.")
]
Seed = Annotated[int | None, typer.Option(help="Random seed.")]
Overfit = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Learn N images without augmentation to test the whole pipeline; exit code 1 if they "
        "are not learned.",
    ),
]
ShowRecipe = Annotated[
    bool, typer.Option("--show-recipe", help="Print all settings as TOML and exit.")
]


def train(
    data: Data = None,
    settings: Settings = None,
    *,
    out: Out = None,
    recipe: RecipeName = "quick",
    backbone: Backbone = None,
    backbone_weights: BackboneWeights = None,
    init: Init = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    image_size: ImageSize = None,
    device: Device = "auto",
    precision: Precision = None,
    seed: Seed = None,
    overfit: Overfit = None,
    show_recipe: ShowRecipe = False,
    json: Json = False,
) -> None:
    """Train a detector on your images.

    Ctrl-C stops after the current step; the same command resumes the run.
    """
    from retinanet.config import to_toml

    options = {
        "model.backbone": backbone,
        "model.backbone_weights": backbone_weights,
        "train.batch_size": batch_size,
        "train.precision": precision,
        "train.seed": seed,
    }
    chosen = resolve_recipe(
        recipe, settings, given=options, epochs=epochs, steps=steps, image_size=image_size
    )
    if show_recipe:
        sys.stdout.write(to_toml(chosen))
        return
    if data is None:
        raise typer.BadParameter("name the data to train on: retinanet train DATA")
    if overfit is not None:
        verdict = run_overfit(chosen, data, out, overfit, steps=steps, device=device, init=init)
        _show_overfit(verdict, json=json)
        raise typer.Exit(verdict.exit_code)
    folder = out or Path("runs") / (data.resolve().stem or "run")
    run = run_training(chosen, data, folder, device=device, init=init)
    report = write_report(run)
    if json:
        print_json({"folder": run.folder, "model": run.model, "metrics": run.metrics})
        return
    if run.metrics:
        say(f"result   {describe_metrics(run.metrics)}, on the split val")
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
