"""``retinanet train``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retinanet.cli.console import count, print_json, say
from retinanet.cli.settings import DeviceOptions, Json, RecipeOptions, option, split_names
from retinanet.cli.training import (
    choose_for,
    command_start,
    describe_metrics,
    run_overfit,
    run_training,
    write_report,
)
from retinanet.errors import ConfigError

if TYPE_CHECKING:
    from retinanet.config import Recipe
    from retinanet.training.overfit import OverfitResult


@dataclass(frozen=True)
class TrainingOptions:
    """Settings that have an option of their own, by the last part of their names."""

    backbone: str | None = option("Backbone: resnet18 to resnet152, mobilenet_v2, timm/NAME, ...")
    backbone_weights: str | None = option(
        "Backbone weights: a file, default (ImageNet, downloaded), none, or torchvision's "
        "IMAGENET1K_V2."
    )
    init: str | None = option(
        "Detector to start from; the network follows it: coco, torchvision/NAME, hf://OWNER/NAME, "
        "a run, a checkpoint or a .pth file."
    )
    init_partial: bool = option(
        "Start from --init even where under 90% of its tensors fit the network.", False
    )
    class_map: str | None = option(
        "TOML or JSON file of class names: NAME IN DATA = NAME IN THE DETECTOR of --init."
    )
    epochs: float | None = option("Exact number of epochs.")
    steps: int | None = option("Exact number of steps.", min=1)
    time: str | None = option(
        "Time limit of the whole command, such as 20min: as many steps as this machine can do.",
        metavar="DURATION",
    )
    classes: str | None = option(
        "Train on these classes only: names separated by commas.", shown="all"
    )
    batch_size: str | None = option(
        "Images per step, with which the learning rate is scaled; auto: the recipe's, in parts "
        "that fit into memory.",
        metavar="N",
    )
    precision: str | None = option("Training precision: auto, float32, bf16 or fp16.")
    seed: int | None = option("Random seed.")

    def keywords(self) -> dict[str, Any]:
        """Return the settings by the last part of their names."""
        if self.time is not None and self.time.isdecimal():
            raise ConfigError(
                f"--time {self.time} has no unit: give {self.time}min, or {self.time}s"
            )
        classes = None if self.classes is None else split_names(self.classes)
        return {**vars(self), "classes": classes, "init_partial": self.init_partial or None}


@dataclass(frozen=True)
class RunOptions(DeviceOptions):
    """The run."""

    out: Path | None = option(
        "Run folder; an unfinished run in it is resumed.", shown="runs/NAME of DATA"
    )
    more_epochs: float | None = option(
        "Train the finished run in --out further, with a schedule of its own."
    )
    overfit: int | None = option(
        "Learn N images without augmentation to test the whole pipeline; exit code 1 if they are "
        "not learned.",
        min=1,
        metavar="N",
    )
    show_recipe: bool = option(
        "Print all settings as TOML, with DATA those chosen from it, and exit.", False
    )


def train(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="A labelled folder or file: COCO, VOC, YOLO, CSV, WebDataset shards, ...; "
            "of a run in --out by default its own.",
            show_default=False,
        ),
    ] = None,
    *,
    recipe: RecipeOptions,
    training: TrainingOptions,
    run: RunOptions,
    json: Json = False,
) -> None:
    """Train a detector on your images.

    Ctrl-C stops after the current step; the same command resumes the run.
    """
    started = command_start()
    if data is not None and "=" in str(data) and not data.exists():  # the first setting
        recipe, data = replace(recipe, settings=[str(data), *(recipe.settings or [])]), None
    config = recipe.load(**training.keywords())
    if run.show_recipe:
        _show_recipe(config, data)
        return
    if data is None and run.out is not None:
        from retinanet.training.run_folder import RunFolder

        data = RunFolder(run.out).stored_data()
    if data is None:
        raise typer.BadParameter("name the data to train on: retinanet train DATA")
    if run.overfit is not None:
        result = run_overfit(
            config, data, run.out, run.overfit, steps=training.steps, device=run.device
        )
        _show_overfit(result, json=json)
        raise typer.Exit(result.exit_code)
    folder = run.out or Path("runs") / (data.resolve().stem or "run")
    options: dict[str, Any] = {"device": run.device, "started": started}
    options["more_epochs"] = run.more_epochs
    trained = run_training(config, data, folder, **options)
    from accelerate import PartialState  # training has imported it

    if not PartialState().is_main_process:
        return
    report = write_report(trained.folder)
    if json:
        print_json({"folder": trained.folder, "model": trained.model, "metrics": trained.metrics})
        return
    if trained.metrics:
        images = trained.metrics.get("images")
        of = "" if images is None else f"{count(images, 'image')} of "
        say(f"result   {describe_metrics(trained.metrics)}, on {of}the split val")
    say(f"model    {trained.model}")
    if report is not None:
        say(f"report   {report}")
    say(f"next     retinanet detect {shlex.quote(str(trained.folder))} IMAGES --out found")


def _show_recipe(config: Recipe, data: Path | None) -> None:
    from retinanet.config import to_toml
    from retinanet.data import read_splits

    if config.auto and data is None:
        sys.stdout.write(
            "# auto = true has no effect in a file that states all settings, as this one: "
            "retinanet train DATA --show-recipe states those chosen from the data\n"
        )
    elif config.auto and data is not None:
        from retinanet.training.settings_from_data import resolved, values

        fraction = config.data.val_fraction
        splits = read_splits(data, seed=config.split_seed, val_fraction=fraction, extras=False)
        config = resolved(config.choose(values(choose_for(config, splits))))
    sys.stdout.write(to_toml(config))


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
