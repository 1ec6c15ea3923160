"""``retinanet report``: the paper's Figures 4 and 2 for your own models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retinanet.cli.console import plain, print_json, progress, say, table
from retinanet.cli.settings import Backend, Device, Precision

if TYPE_CHECKING:
    from retinanet.report.loss_distribution import LossDistribution
    from retinanet.report.speed_accuracy import SpeedAccuracy

_DATA_HELP = "Labelled folder or file, in any format that data check reads."

Split = Annotated[
    str | None,
    typer.Option(
        help="Split: train, val, test, all, or another of the data.",
        show_default="val, or that of a label file",
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="Output folder.", show_default="the run folder's reports/")
]
Calibrate = Annotated[
    str | None,
    typer.Option(help="Images to calibrate int8 on; not those of the evaluation."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the content of the JSON file.")]


def loss_distribution(
    run: Annotated[
        str, typer.Argument(help="Run folder, checkpoint, or torchvision/NAME.", metavar="RUN")
    ],
    data: Annotated[Path, typer.Argument(help=_DATA_HELP)],
    *,
    split: Split = None,
    gamma: Annotated[
        list[float] | None,
        typer.Option(
            help="Gamma of the focal loss. May be repeated.", show_default="0, .5, 1 and 2"
        ),
    ] = None,
    out: Out = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=32, help="Shorter side in pixels.", show_default="the model's"),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    backend: Backend = "auto",
    calibrate: Calibrate = None,
    json: Json = False,
) -> None:
    """Plot the distribution of a model's loss over anchors (the paper's Figure 4).

    The cumulative share of the focal loss over anchors sorted by their loss, for positives and
    negatives, with each gamma.
    """
    from retinanet.report.loss_distribution import GAMMAS
    from retinanet.report.loss_distribution import loss_distribution as measure
    from retinanet.report.paper_plots import plot_loss_distribution

    with progress("computing losses") as show:
        result = measure(
            run,
            data,
            split=split,
            gammas=GAMMAS if gamma is None else gamma,
            image_size=image_size,
            device=device,
            precision=precision,
            backend=backend,
            calibrate=calibrate,
            progress=show,
        )
    stem = _stem(out, run, f"loss-distribution-{result.split}")
    files = plot_loss_distribution(result, stem, title=f"{_name(run)} on {result.split}")
    content = {"model": run, **result.to_dict()}
    written = [*files, _write_json(stem, content)]
    if json:
        print_json(content)
        return
    _print_distribution(result)
    _print_files(written)


def speed_accuracy(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Run folders, checkpoints, or torchvision/NAME."),
    ],
    *,
    data: Annotated[Path, typer.Option(help=_DATA_HELP)],
    split: Split = None,
    scale: Annotated[
        list[int] | None,
        typer.Option(
            help="Shorter side in pixels. May be repeated.",
            show_default="4/6 to 8/6 of each model's, as the paper's 400 to 800",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved timing rounds.")] = 7,
    images: Annotated[int, typer.Option(min=1, help="Number of images that are timed.")] = 8,
    out: Out = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Batch size for AP; single images are timed.")
    ] = 4,
    device: Device = "auto",
    precision: Precision = "auto",
    backend: Backend = "auto",
    calibrate: Calibrate = None,
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
    machine = describe_machine(choose_device(device))
    with progress("measuring") as show:
        result = measure(
            models,
            data,
            split=split,
            scales=scale,
            rounds=rounds,
            images=images,
            batch_size=batch_size,
            device=device,
            precision=precision,
            backend=backend,
            calibrate=calibrate,
            machine={"name": machine.name, **machine.to_dict()},
            progress=show,
        )
    stem = _stem(out, runs[0], f"speed-accuracy-{result.split}")
    content = {"models": models, **result.to_dict()}
    written = [_write_json(stem, content)]
    marks = speed_marks(result)
    if marks:
        where = f"{Path(result.source).name} ({result.split}), {result.images} images"
        written = [*plot_speed_accuracy(marks, stem, where=where, machine=machine.name), *written]
    if json:
        print_json(content)
        return
    _print_speed(result)
    say(f"on {machine.name}; {result.points[0].network}")
    if not marks:
        say("no figure is drawn: the data has no ground-truth box, so AP is undefined")
    _print_files(written)


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
    table(
        f"{result.images} images; {result.timed} timed singly, {result.rounds} rounds",
        ["model", "scale", "AP", "AP50", "APs", "APm", "APl", "ms (quartiles)"],
        [
            (
                *(p.model, p.scale, p.ap, p.ap50, p.ap_small, p.ap_medium, p.ap_large),
                f"{p.milliseconds:.1f} ({p.milliseconds_low:.1f}-{p.milliseconds_high:.1f})",
            )
            for p in result.points
        ],
    )


def _print_files(files: Sequence[Path]) -> None:
    say(f"wrote {', '.join(file.name for file in files)} to {files[0].parent}")


def _stem(out: Path | None, run: str, name: str) -> Path:
    """Path of the files without suffix: in `out`, or in the model's run folder."""
    if out is not None:
        return out / name
    return (_run_folder(run) or Path()) / "reports" / name


def _run_folder(run: str) -> Path | None:
    """Run folder of a checkpoint; None if it has none."""
    model = Path(run)
    folders = (model, model.parent, model.parent.parent)
    return next((x for x in folders if (x / "config.toml").is_file() and model.exists()), None)


def _name(run: str) -> str:
    """Name of a model: its run folder's, else the argument."""
    folder = _run_folder(run)
    return run if folder is None else folder.resolve().name


def name_models(runs: Sequence[str]) -> dict[str, str]:
    """Models by name: the run folder's, with as many parent folders as make the names unique.

    Raises:
        ConfigError: a model is given twice.
    """
    from retinanet.errors import ConfigError

    twice = [run for i, run in enumerate(runs) if Path(run) in map(Path, runs[:i])]
    if twice:
        raise ConfigError(f"{twice[0]} is given twice: name each run once")
    folders = [_run_folder(run) for run in runs]
    resolved = [folder and folder.resolve() for folder in folders]
    # best/ and last/ of a run, and models without a run folder, keep the argument as their name.
    paths = [path if path and resolved.count(path) == 1 else None for path in resolved]
    for depth in range(1, 1 + max((len(path.parts) for path in paths if path), default=1)):
        names = [
            str(Path(*path.parts[-depth:])) if path else run
            for run, path in zip(runs, paths, strict=True)
        ]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, runs, strict=True))


def _write_json(stem: Path, value: Mapping[str, Any]) -> Path:
    import json

    from retinanet.files import write_atomic

    text = json.dumps(plain(value), indent=1, allow_nan=False)
    return write_atomic(stem.with_name(f"{stem.name}.json"), text + "\n")
