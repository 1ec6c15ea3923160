"""``retinanet report``: the paper's Figures 4 and 2 for your own models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retinanet.cli.console import plain, print_json, progress, say, table
from retinanet.cli.settings import (
    DetectorOptions,
    EngineOptions,
    Json,
    LabelledData,
    SplitOptions,
    option,
    run_folder,
)

if TYPE_CHECKING:
    from retinanet.report.loss_distribution import LossDistribution
    from retinanet.report.speed_accuracy import SpeedAccuracy


@dataclass(frozen=True)
class OutputOptions(SplitOptions):
    """The images and the output folder."""

    out: Path | None = option("Output folder.", shown="the run folder's reports/")


@dataclass(frozen=True)
class LossOptions(OutputOptions):
    """The loss distribution."""

    gamma: list[float] | None = option(
        "Gamma of the focal loss. May be repeated.", shown="0, .5, 1 and 2"
    )


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(OutputOptions):
    """The measurement."""

    data: Path = option("A labelled folder or file, as for data check.", ...)
    scale: list[int] | None = option(
        "Shorter side in pixels. May be repeated.",
        shown="4/6 to 8/6 of each model's, as the paper's 400 to 800",
    )
    rounds: int = option("Interleaved timing rounds.", 7, min=1)
    images: int = option("Number of images that are timed.", 8, min=1)
    batch_size: int = option("Batch size for AP; single images are timed.", 4, min=1)


def loss_distribution(
    run: Annotated[
        str, typer.Argument(help="Run folder, checkpoint, or torchvision/NAME.", metavar="RUN")
    ],
    data: LabelledData,
    *,
    options: LossOptions,
    detector: DetectorOptions,
    json: Json = False,
) -> None:
    """Plot the distribution of a model's loss over anchors (the paper's Figure 4).

    The cumulative share of the focal loss over anchors sorted by their loss, for positives and
    negatives, with each gamma.
    """
    from retinanet.report.loss_distribution import GAMMAS
    from retinanet.report.loss_distribution import loss_distribution as measure
    from retinanet.report.paper_plots import plot_loss_distribution

    gammas = GAMMAS if options.gamma is None else options.gamma
    with progress("computing losses") as update:
        result = measure(
            run, data, split=options.split, gammas=gammas, progress=update, **vars(detector)
        )
    stem = _stem(options.out, run, f"loss-distribution-{result.split}")
    content = {"model": run, **result.to_dict()}
    title = f"{_name(run)} on {result.split}"
    files = [*plot_loss_distribution(result, stem, title=title), _write_json(stem, content)]
    if json:
        print_json(content)
        return
    _print_distribution(result)
    _print_files(files)


def speed_accuracy(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Run folders, checkpoints, or torchvision/NAME."),
    ],
    *,
    options: SpeedOptions,
    engine: EngineOptions,
    json: Json = False,
) -> None:
    """Plot AP against time at several scales on this machine (the paper's Figure 2).

    The time is that of network and post-processing for one decoded and resized image.
    """
    from retinanet.bench.machine import describe_machine
    from retinanet.model.precision import choose_device
    from retinanet.report.paper_plots import plot_speed_accuracy, speed_marks
    from retinanet.report.speed_accuracy import speed_accuracy as measure

    models = name_models(runs)
    machine = describe_machine(choose_device(engine.device))
    with progress("measuring") as update:
        result = measure(
            models,
            options.data,
            split=options.split,
            scales=options.scale,
            rounds=options.rounds,
            images=options.images,
            batch_size=options.batch_size,
            machine={"name": machine.name, **asdict(machine)},
            progress=update,
            **vars(engine),
        )
    stem = _stem(options.out, runs[0], f"speed-accuracy-{result.split}")
    content = {"models": models, **result.to_dict()}
    files = [_write_json(stem, content)]
    marks = speed_marks(result)
    if marks:
        data = f"{Path(result.source).name} ({result.split}), {result.images} images"
        files = [*plot_speed_accuracy(marks, stem, data=data, machine=machine.name), *files]
    if json:
        print_json(content)
        return
    _print_speed(result)
    say(f"on {machine.name}; {result.points[0].network}")
    if not marks:
        say("no figure is drawn: the data has no ground-truth box, so AP is undefined")
    _print_files(files)


def _print_distribution(result: LossDistribution) -> None:
    for kind, curves, taken, total in (
        ("positives", result.positives, result.positives_taken, result.positive_anchors),
        ("negatives", result.negatives, result.negatives_taken, result.negative_anchors),
    ):
        parts = list(curves[0].hardest)
        share = "" if taken == total else f" of {total:,}"
        table(
            f"{kind}: {taken:,} anchors{share} in {result.images} images; "
            "share of the loss in the hardest",
            ["gamma", *(f"{part:.0%}" for part in parts), "mean loss"],
            [
                (f"{c.gamma:g}", *(f"{c.hardest[part]:.1%}" for part in parts), f"{c.mean:.3g}")
                for c in curves
            ],
        )


def _print_speed(result: SpeedAccuracy) -> None:
    columns = ("AP", "AP50", "APs", "APm", "APl")
    table(
        f"{result.images} images; {result.timed} timed singly, {result.rounds} rounds",
        ["model", "scale", *columns, "ms (quartiles)"],
        [
            (
                *(p.model, p.scale, *(p.metrics[column] for column in columns)),
                f"{p.milliseconds:.1f} ({p.milliseconds_low:.1f}-{p.milliseconds_high:.1f})",
            )
            for p in result.points
        ],
    )


def _print_files(files: Sequence[Path]) -> None:
    say(f"wrote {', '.join(file.name for file in files)} to {files[0].parent}")


def _stem(out: Path | None, run: str, name: str) -> Path:
    """Path of the files without suffix: in `out`, or in the model's run folder."""
    return (out or (run_folder(run) or Path()) / "reports") / name


def name_models(runs: Sequence[str]) -> dict[str, str]:
    """Models by name: that of the run folder where it is unique, else as given.

    Raises:
        ConfigError: a model is given twice.
    """
    from retinanet.errors import ConfigError

    twice = [run for i, run in enumerate(runs) if Path(run) in map(Path, runs[:i])]
    if twice:
        raise ConfigError(f"{twice[0]} is given twice: name each run once")
    names = [_name(run) for run in runs]
    return {
        name if names.count(name) == 1 else run: run for name, run in zip(names, runs, strict=True)
    }


def _name(run: str) -> str:
    folder = run_folder(run)
    return run if folder is None else folder.resolve().name


def _write_json(stem: Path, value: Mapping[str, Any]) -> Path:
    from retinanet.files import write_atomic

    text = dumps(plain(value), indent=1, allow_nan=False)
    return write_atomic(stem.with_name(f"{stem.name}.json"), text + "\n")
