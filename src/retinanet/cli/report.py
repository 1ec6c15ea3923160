"""``retinanet report``: the paper's Figures 4 and 2 for a user's own models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retinanet.cli.console import plain, print_json, progress, say, table

if TYPE_CHECKING:
    from retinanet.report.loss_distribution import LossDistribution
    from retinanet.report.speed_accuracy import SpeedAccuracy

Split = Annotated[
    str | None,
    typer.Option(
        help="train, val, test, all, or another that the data has.",
        show_default="val, or what a label file holds",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Where the files go.", show_default="the run folder's reports/"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Precision = Annotated[str, typer.Option(help="auto, float32, bf16, fp16 or int8.")]
Backend = Annotated[str, typer.Option(help="auto, torch, compile or openvino.")]
Calibrate = Annotated[
    str | None, typer.Option(help="Images on which int8 is calibrated; not those judged.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the written JSON file's content.")]


def loss_distribution(
    run: Annotated[
        str, typer.Argument(help="A run folder, a checkpoint, or torchvision/NAME.", metavar="RUN")
    ],
    data: Annotated[
        Path, typer.Argument(help="A labelled folder or file, in any format that data check reads.")
    ],
    *,
    split: Split = None,
    gamma: Annotated[
        list[float] | None,
        typer.Option(help="Of the focal loss; may be given again.", show_default="0, .5, 1 and 2"),
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
    """Which anchors hold a model's loss: the paper's Figure 4.

    The share of the loss that the easiest anchors hold, objects and background apart, if the model
    were judged by the focal loss with each gamma.
    """
    from retinanet.report.loss_distribution import GAMMAS
    from retinanet.report.loss_distribution import loss_distribution as measure
    from retinanet.report.paper_plots import plot_loss_distribution

    with progress("looking at anchors") as show:
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
    answer = {"model": run, **result.to_dict()}
    written = [*files, _write_json(stem, answer)]
    if json:
        print_json(answer)
        return
    _show_distribution(result)
    _show_files(written)


def speed_accuracy(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Run folders, checkpoints, or torchvision/NAME."),
    ],
    *,
    data: Annotated[
        Path, typer.Option(help="A labelled folder or file, in any format that data check reads.")
    ],
    split: Split = None,
    scale: Annotated[
        list[int] | None,
        typer.Option(
            help="Shorter side in pixels; may be given again.",
            show_default="4/6 to 8/6 of each model's, as the paper's 400 to 800",
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often each is timed; they take turns.")
    ] = 7,
    images: Annotated[int, typer.Option(min=1, help="How many are timed.")] = 8,
    out: Out = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images at once, for AP; single ones are timed.")
    ] = 4,
    device: Device = "auto",
    precision: Precision = "auto",
    backend: Backend = "auto",
    calibrate: Calibrate = None,
    json: Json = False,
) -> None:
    """AP against time over scales on this machine: the paper's Figure 2.

    The time is that of network and post-processing for one image that is decoded and resized.
    """
    from retinanet.bench.machine import describe_machine
    from retinanet.model.precision import choose_device
    from retinanet.report.paper_plots import plot_speed_accuracy, speed_marks
    from retinanet.report.speed_accuracy import speed_accuracy as measure

    models = _named(runs)
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
    answer = {"models": models, **result.to_dict()}
    written = [_write_json(stem, answer)]
    marks = speed_marks(result)
    if marks:
        where = f"{Path(result.source).name} ({result.split}), {result.images} images"
        written = [*plot_speed_accuracy(marks, stem, where=where, machine=machine.name), *written]
    if json:
        print_json(answer)
        return
    _show_speed(result)
    say(f"on {machine.name}; {result.points[0].network}")
    if not marks:
        say("nothing is drawn: the data has no object, so there is no AP")
    _show_files(written)


def _show_distribution(result: LossDistribution) -> None:
    for kind, curves, taken, every in (
        ("positives", result.positives, result.positives_taken, result.positive_anchors),
        ("negatives", result.negatives, result.negatives_taken, result.negative_anchors),
    ):
        parts = list(curves[0].hardest)
        share = "" if taken == every else f" of {every:,}"
        table(
            f"{kind}: {taken:,} anchors{share} in {result.images} images; "
            "share of the loss held by the hardest",
            ["gamma", *(f"{part:.0%}" for part in parts), "mean loss"],
            [
                (
                    f"{one.gamma:g}",
                    *(f"{one.hardest[part]:.1%}" for part in parts),
                    f"{one.mean:.3g}",
                )
                for one in curves
            ],
        )


def _show_speed(result: SpeedAccuracy) -> None:
    table(
        f"{result.images} images; {result.timed} timed one by one, {result.rounds} rounds",
        ["model", "scale", "AP", "AP50", "APs", "APm", "APl", "ms (quartiles)"],
        [
            (
                one.model,
                one.scale,
                one.ap,
                one.ap50,
                one.ap_small,
                one.ap_medium,
                one.ap_large,
                f"{one.milliseconds:.1f} ({one.milliseconds_low:.1f}-{one.milliseconds_high:.1f})",
            )
            for one in result.points
        ],
    )


def _show_files(files: Sequence[Path]) -> None:
    names = ", ".join(file.name for file in files)
    say(f"{names} {'is' if len(files) == 1 else 'are'} in {files[0].parent}")


def _stem(out: Path | None, run: str, name: str) -> Path:
    """The files' path without suffix: in `out`, or in the run folder that the model is of."""
    if out is not None:
        return out / name
    folder = _run_folder(Path(run))
    return (Path() if folder is None else folder) / "reports" / name


def _run_folder(model: Path) -> Path | None:
    """The run folder that a checkpoint is of; None: it is of none."""
    folders = (model, model.parent, model.parent.parent)
    held = (one for one in folders if (one / "config.toml").is_file() and model.exists())
    return next(held, None)


def _name(run: str) -> str:
    """What a model is called: its run folder's name, or what was given."""
    folder = _run_folder(Path(run))
    return run if folder is None else folder.resolve().name


def _named(runs: Sequence[str]) -> dict[str, str]:
    """Models by name; where two would have the same, with the folders over them as well.

    Raises:
        ConfigError: one is given twice.
    """
    from retinanet.errors import ConfigError

    folders = [_run_folder(Path(run)) for run in runs]
    whole = [
        Path(run) if folder is None else folder.resolve()
        for run, folder in zip(runs, folders, strict=True)
    ]
    # best/ and last/ of one run are told apart by what was given.
    whole = [
        Path(run) if whole.count(path) > 1 else path for run, path in zip(runs, whole, strict=True)
    ]
    twice = [run for place, run in enumerate(runs) if whole[place] in whole[:place]]
    if twice:
        raise ConfigError(f"{twice[0]} is given twice: name each run once")
    for kept in range(1, max(len(path.parts) for path in whole) + 1):
        names = [
            run if folder is None else str(Path(*path.parts[-kept:]))
            for run, folder, path in zip(runs, folders, whole, strict=True)
        ]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, runs, strict=True))


def _write_json(stem: Path, value: Mapping[str, Any]) -> Path:
    import json

    from retinanet.files import write_atomic

    text = json.dumps(plain(value), indent=1, allow_nan=False)
    return write_atomic(stem.with_name(f"{stem.name}.json"), text + "\n")
