"""``retinanet data``: check, convert and draw labelled data, and compute the anchor recall."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retinanet.cli.console import note, print_json, progress, say, table
from retinanet.cli.settings import ImageSize, Json, Settings, resolve_recipe

if TYPE_CHECKING:
    from retinanet.config import Recipe
    from retinanet.data import AnchorRecall, CheckReport, Dataset, Statistics

Data = Annotated[
    Path,
    typer.Argument(
        help="A labelled folder or file: COCO, VOC, YOLO, CSV, WebDataset shards, or CVAT's or "
        "Label Studio's export."
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Format of the data: coco, voc, yolo, csv, webdataset, cvat or labelstudio.",
        show_default="detected",
    ),
]
RecipeName = Annotated[
    str, typer.Option("--recipe", help="Recipe whose image size and anchors are used.")
]
Split = Annotated[str, typer.Option(help="Split: train, val, test, all, ...")]

_SHOWN_PROBLEMS = 10  # per kind
_SHOWN_CLASSES = 30
_ENOUGH_RECALL = 0.99  # the rest is mostly faulty labels
_MIN_GAIN = 0.02  # a smaller gain in recall is not worth more pixels


def check(
    data: Data,
    settings: Settings = None,
    *,
    fix: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a corrected copy; the data are never modified."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Print every problem.")] = False,
    format: Format = None,
    recipe: RecipeName = "quick",
    image_size: ImageSize = None,
    json: Json = False,
) -> None:
    """Check labels and images, and print statistics.

    The exit code is 1 if problems were found, 0 if there are none or --fix wrote a copy.
    """
    from retinanet.data import check_datasets, read_splits, write_fixed

    config = resolve_recipe(recipe, settings, image_size=image_size)
    splits = read_splits(
        data, format=format, seed=config.split_seed, val_fraction=config.data.val_fraction
    )
    with progress("opening images") as update:
        report = check_datasets(splits, progress=update)
    recall = None
    if any(split.objects for split in report.statistics.values()):
        recall = _recall(_with_known_size(splits, report), config)
    written = None
    if fix is not None:
        with progress("writing") as update:
            written = write_fixed(splits, report, fix, progress=update)
    if json:
        result = report.to_dict() | {"anchors": recall.to_dict() if recall else None}
        if written is not None:
            result["fixed"] = {"folder": written.folder, "objects": written.objects}
        print_json(result)
    else:
        _show_problems(report, data, None if every else _SHOWN_PROBLEMS)
        _show_statistics(report.statistics)
        if recall is not None:
            _show_recall(recall)
        if written is not None:
            objects, images = sum(written.objects.values()), sum(written.images.values())
            say(f"wrote a corrected copy to {written.folder}: {objects} objects in {images} images")
    if report.problems and written is None:
        raise typer.Exit(1)


def convert(
    source: Annotated[Path, typer.Argument(help="A labelled folder or file.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    *,
    to: Annotated[str, typer.Option(help="Format: coco, voc, yolo, csv or webdataset.")],
    format: Format = None,
    images: Annotated[str, typer.Option(help="copy, hardlink or symlink.")] = "copy",
    shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|MB",
            help="Maximum images (1000) or bytes (256MB) per WebDataset shard.",
            show_default="256MB",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of a validation split.")] = 0,
    val_fraction: Annotated[
        float, typer.Option(help="Fraction of the images for val, if the data has no val split.")
    ] = 0.2,
    json: Json = False,
) -> None:
    """Convert labelled data to another format."""
    from retinanet.config import check_choice
    from retinanet.data import convert as convert_data

    check_choice("--images", images, ("copy", "hardlink", "symlink"))
    with progress("writing") as update:
        written = convert_data(
            source,
            target,
            to,
            format=format,
            seed=seed,
            val_fraction=val_fraction,
            images=images,  # type: ignore[arg-type]  # checked above
            shard_size=shard_size,
            progress=update,
        )
    if json:
        print_json({name: getattr(written, name) for name in written.__slots__})
        return
    table(
        f"{written.folder}: {written.format}",
        ["split", "origin", "images", "objects"],
        [
            (name, written.origins[name], count, written.objects[name])
            for name, count in written.images.items()
        ],
        left=2,
    )
    for what, count in written.lost.items():
        say(f"left out: {count} {what}")


def show(
    data: Data,
    settings: Settings = None,
    *,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("shown"),
    split: Split = "train",
    count: Annotated[int, typer.Option(min=0, help="Number of images; 0: all.")] = 20,
    with_anchors: Annotated[
        bool, typer.Option("--anchors", help="Also draw the anchors matched to each object.")
    ] = False,
    format: Format = None,
    recipe: RecipeName = "quick",
    image_size: ImageSize = None,
    seed: Annotated[int, typer.Option(help="Random seed of the choice of images.")] = 0,
    json: Json = False,
) -> None:
    """Draw labelled images; with --anchors at the network's size, with their matched anchors.

    Anchors are white. An object without a matched anchor cannot be learned, and is marked.
    """
    from retinanet.cli.drawing import draw_labels
    from retinanet.training.data import recipe_anchors

    config = resolve_recipe(recipe, settings, image_size=image_size)
    dataset = _read_split(data, split, format, config)
    spec = recipe_anchors(config) if with_anchors else None
    with progress("drawing") as update:
        drawn = draw_labels(
            dataset, out, count=count, seed=seed, spec=spec, recipe=config, progress=update
        )
    if json:
        print_json({"out": out, **drawn.to_dict()})
    else:
        say(f"{drawn.images} images of {dataset.split} with {drawn.objects} objects, in {out}")
        if with_anchors:
            say(
                f"{drawn.anchors} anchors are matched to them; "
                f"{drawn.unmatched} objects have none and cannot be learned"
            )
    for reason in drawn.failures:
        note(f"error: {reason}", style="red")
    if drawn.failures:
        raise typer.Exit(1)


def anchors(
    data: Data,
    settings: Settings = None,
    *,
    split: Split = "train",
    format: Format = None,
    recipe: RecipeName = "quick",
    image_size: ImageSize = None,
    json: Json = False,
) -> None:
    """Print the anchor recall, and that of other settings.

    The anchor recall is the fraction of objects with an anchor of an IoU of .5 or more.
    """
    from retinanet.data import usable

    config = resolve_recipe(recipe, settings, image_size=image_size)
    dataset, _ = usable(_read_split(data, split, format, config))
    results = [
        (words, changes, _recall({split: dataset}, resolve_recipe(
            recipe, [*(settings or []), *changes], image_size=image_size)))
        for words, changes in _candidates(config)
    ]  # fmt: skip
    # Candidates are in the order of their cost: suggest the first that is nearly as good as any.
    enough = min(_ENOUGH_RECALL, max(found.recall for _, _, found in results) - _MIN_GAIN)
    suggested = next(changes for _, changes, found in results if found.recall >= enough)
    if json:
        tried = [{"settings": changes, **found.to_dict()} for _, changes, found in results]
        print_json({"tried": tried, "suggested": suggested})
        return
    current = results[0][2]
    _show_recall(current)
    missed = [(name, hit, of) for name, (hit, of) in current.by_class.items() if hit < of]
    missed.sort(key=lambda row: row[1] / row[2])
    if missed:
        table(
            "Classes of the lowest anchor recall",
            ["class", "objects", "recall"],
            [(name, of, _ratio(hit, of)) for name, hit, of in missed[:_SHOWN_CLASSES]],
        )
    table(
        "Anchor recall of other settings, cheapest first",
        ["pixels", "anchors", "all", *current.by_size, "mean IoU"],
        [
            (
                found.image_size,
                words,
                f"{found.recall:.1%}",
                *(_ratio(*counts) for counts in found.by_size.values()),
                f"{found.mean_iou:.2f}",
            )
            for words, _, found in results
        ],
        left=2,
    )
    if suggested:
        say(f"suggested: {shlex.join(suggested)}")
    else:
        say("the current settings are sufficient")


def _candidates(recipe: Recipe) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Return settings to compare, in words and as `key=value`; the first is the recipe itself."""
    half = "anchors.sizes=[16,32,64,128,256]"
    wide = "anchors.aspect_ratios=[0.25,0.5,1.0,2.0,4.0]"
    p2 = "model.p2=true"
    for factor in (1.0, 1.5, 2.0):
        size: tuple[str, ...] = ()
        if factor > 1:
            sides = {"image_size": recipe.data.image_size, "max_size": recipe.data.max_size}
            size = tuple(f"data.{name}={round(factor * side)}" for name, side in sides.items())
        yield "the recipe's", size
        yield "from 16 px on", (*size, "model.p2=false", half)
        yield "from 16 px on, 1:4 to 4:1", (*size, "model.p2=false", half, wide)
        yield "from 16 px on, with P2", (*size, p2, "anchors.sizes=none")
        yield "from 8 px on, with P2", (*size, p2, "anchors.sizes=[8,16,32,64,128,256]")


def _read_split(data: Path, split: str, format: str | None, config: Recipe) -> Dataset:
    from retinanet.data import read_dataset

    return read_dataset(
        data, split, format=format, seed=config.split_seed, val_fraction=config.data.val_fraction
    )


def _recall(splits: Mapping[str, Dataset], config: Recipe) -> AnchorRecall:
    from retinanet.data import anchor_recall
    from retinanet.training.data import recipe_anchors

    return anchor_recall(
        splits,
        recipe_anchors(config),
        config.data.image_size,
        config.data.max_size,
        foreground_iou=config.matching.foreground_iou,
    )


def _with_known_size(splits: Mapping[str, Dataset], report: CheckReport) -> dict[str, Dataset]:
    """Return the splits without images whose size is in neither the labels nor a readable file."""
    from dataclasses import replace

    return {
        name: replace(
            dataset,
            images=tuple(
                image
                for image in dataset.images
                if (image.width and image.height) or not report.image_info[image.path].failure
            ),
        )
        for name, dataset in splits.items()
    }


def _show_problems(report: CheckReport, data: Path, limit: int | None) -> None:
    from retinanet.data.check import KINDS

    if not report.problems:
        say("no problems found")
        return
    for kind, count in report.counts.items():
        say(f"{kind} ({count}): {KINDS.get(kind, '')}", style="bold")
        problems = [problem for problem in report.problems if problem.kind == kind]
        for problem in problems[:limit]:
            file = problem.file
            if file != data and file.is_relative_to(data):
                file = file.relative_to(data)
            fix = f" -> {problem.fix}" if problem.fix else ""
            is_named = problem.object is None or str(problem.object) in problem.reason
            name = "" if is_named else f" object {problem.object}:"
            say(f"  {file}:{name} {problem.reason}{fix}")
        if limit is not None and count > limit:
            say(f"  and {count - limit} more (--all prints them)")
    say()


def _show_statistics(statistics: Mapping[str, Statistics]) -> None:
    splits = list(statistics.values())
    rows = [
        ("images", *(split.images for split in splits)),
        ("without objects", *(split.background_images for split in splits)),
        ("objects", *(split.objects for split in splits)),
        ("crowd or difficult", *(split.ignored for split in splits)),
        *(
            (f"{size} objects", *(split.sizes[size] for split in splits))
            for size in ("small", "medium", "large")
        ),
        *(
            (f"objects per image, {name}", *(_number(s.boxes_per_image, key) for s in splits))
            for name, key in (("median", "median"), ("maximum", "max"))
        ),
        ("side, median px", *(_number(split.side, "50") for split in splits)),
        (
            "side, 5% to 95% px",
            *(f"{_number(split.side, '5')} - {_number(split.side, '95')}" for split in splits),
        ),
    ]
    table("Statistics", ["", *statistics], rows)
    for name, split in statistics.items():
        say(f"{name}: split by {split.origin}")
    classes = list(splits[0].classes)
    counts = {name: [split.classes.get(name, 0) for split in splits] for name in classes}
    frequent = sorted(classes, key=lambda name: -sum(counts[name]))
    table(
        f"Objects of {len(classes)} classes",
        ["class", *statistics],
        [(name, *counts[name]) for name in frequent[:_SHOWN_CLASSES]],
    )
    if len(frequent) > _SHOWN_CLASSES:
        say(f"and {len(frequent) - _SHOWN_CLASSES} more classes")


def _show_recall(found: AnchorRecall) -> None:
    sizes = ", ".join(f"{name} {_ratio(*counts)}" for name, counts in found.by_size.items())
    say(
        f"anchor recall {found.recall:.1%} of {found.objects} objects "
        f"(IoU {found.foreground_iou:g} at {found.image_size} px): {sizes}"
    )


def _ratio(matched: int, objects: int) -> str:
    return f"{matched / objects:.1%}" if objects else "-"


def _number(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:.0f}" if name in values else "-"
