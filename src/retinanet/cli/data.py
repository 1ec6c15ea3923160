"""``retinanet data``: check, convert and draw labelled data, and compute the anchor recall."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retinanet.cli.console import count, note, print_json, progress, say, table
from retinanet.cli.settings import Json, LabelledData, RecipeOptions, option
from retinanet.cli.training import choose_for, show_choices
from retinanet.config import setting_text

if TYPE_CHECKING:
    from retinanet.config import Recipe
    from retinanet.data import AnchorRecall, CheckReport, Dataset, LabelledImage, Statistics

MAX_DECODED = 5000  # images that are decoded without --decode
_SHOWN_PROBLEMS = 10  # per kind
_SHOWN_CLASSES = 30
_ENOUGH_RECALL = 0.99  # the rest is mostly faulty labels
_MIN_GAIN = 0.02  # a smaller gain in recall is not worth more pixels


@dataclass(frozen=True)
class FormatOptions:
    """The format of the data."""

    format: str | None = option(
        "Format of the data, such as coco, voc or yolo (docs/data.md).", shown="detected"
    )


@dataclass(frozen=True)
class SplitOptions(FormatOptions):
    """A split of the data."""

    split: str = option("Split: train, val, test, all, ...", "train")

    def read(self, data: Path, config: Recipe) -> Dataset:
        """Read the split."""
        from retinanet.data import read_dataset
        from retinanet.training.data import recipe_anchors

        recipe_anchors(config)  # errors in them come first
        dataset = read_dataset(
            data,
            self.split,
            format=self.format,
            seed=config.split_seed,
            val_fraction=config.data.val_fraction,
        )
        for line in dataset.description:
            note(line)
        return dataset


@dataclass(frozen=True)
class CheckOptions(FormatOptions):
    """The check."""

    fix: Path | None = option("Write a corrected copy; the data are never modified.", metavar="DIR")
    all: bool = option("Print every problem.", False)
    decode: bool = option(
        "Decode every image, to find damaged pixels and equal ones in two splits; always for up "
        f"to {MAX_DECODED} images and with --fix.",
        False,
    )


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(FormatOptions):
    """The conversion."""

    to: str = option("Format: coco, voc, yolo, csv or webdataset.", ...)
    images: str = option("copy, hardlink or symlink.", "copy")
    shard_size: str | None = option(
        "Maximum images (1000) or bytes (256MB) per WebDataset shard.",
        shown="256MB",
        metavar="N|MB",
    )
    seed: int = option("Random seed of a validation split.", 0)
    val_fraction: float = option(
        "Fraction of the images for val, if the data has no val split.", 0.2
    )


@dataclass(frozen=True)
class ShowOptions(SplitOptions):
    """The drawings."""

    out: Path = option("Output folder.", Path("shown"))
    count: int = option("Number of images; 0: all.", 20, min=0)
    anchors: bool = option("Also draw the anchors matched to each object.", False)
    augmented: bool = option("Draw the images as training loads them: augmented.", False)
    seed: int = option("Random seed of the choice of images, or of the augmentation.", 0)


def check(
    data: LabelledData, recipe: RecipeOptions, *, options: CheckOptions, json: Json = False
) -> None:
    """Check labels and images, and print statistics.

    The exit code is 1 if problems were found, 0 if there are none or --fix wrote a copy.
    """
    from retinanet.data import check_datasets, read_splits, write_fixed

    config = recipe.load()
    splits = read_splits(
        data, format=options.format, seed=config.split_seed, val_fraction=config.data.val_fraction
    )
    for line in next(iter(splits.values())).description:
        note(line)
    num_images = sum(map(len, splits.values()))
    decode = options.decode or options.fix is not None or num_images <= MAX_DECODED
    with progress("opening images") as update:
        report = check_datasets(splits, decode=decode, progress=update)
    if not decode:
        note(f"read the headers of {num_images} images; --decode also checks their pixels")
    from retinanet.data.tiling import recommend_tile
    from retinanet.training.settings_from_data import values  # torch

    recall, choices = None, []
    if any(split.objects for split in report.statistics.values()):
        known = _with_known_size(splits, report)
        choices = choose_for(config, known)
        if config.matching.assignment == "iou":
            recall = _recall(known, config.choose(values(choices)))
    chosen = config.choose(values(choices)).data
    of_train = report.statistics.get("train") or next(iter(report.statistics.values()))
    tile = recommend_tile(of_train, chosen.image_size, chosen.max_size)
    written = None
    if options.fix is not None:
        with progress("writing") as update:
            written = write_fixed(splits, report, options.fix, progress=update)
    if json:
        result = {
            **report.to_dict(),
            "anchors": recall and recall.to_dict(),
            "recommended_tile": tile,
            "choices": [asdict(choice) for choice in choices],
        }
        if written is not None:
            result["fixed"] = {"folder": written.folder, "objects": written.objects}
        print_json(result)
    else:
        _show_problems(report, data, None if options.all else _SHOWN_PROBLEMS)
        _show_statistics(report.statistics)
        if choices:
            show_choices([asdict(choice) for choice in choices])
        if recall is not None:
            _show_recall(recall, chosen.tile)
        if tile is not None:
            say(
                f"objects are small against their images: train on tiles, data.tile={tile} "
                "(docs/tiles.md)"
            )
        if written is not None:
            objects, images = sum(written.objects.values()), sum(written.images.values())
            say(f"wrote a corrected copy to {written.folder}: {objects} objects in {images} images")
    if report.problems and written is None:
        raise typer.Exit(1)


def convert(
    source: Annotated[Path, typer.Argument(help="A labelled folder or file.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    *,
    options: ConvertOptions,
    json: Json = False,
) -> None:
    """Convert labelled data to another format."""
    from retinanet.config import check_choice
    from retinanet.data import convert as convert_data
    from retinanet.data import read_splits

    check_choice("--images", options.images, ("copy", "hardlink", "symlink"))
    values = dict(vars(options))
    reading = {name: values.pop(name) for name in ("format", "seed", "val_fraction")}
    splits = read_splits(source, **reading)
    with progress("writing") as update:
        written = convert_data(splits, target, progress=update, **values)
    for line in next(iter(splits.values())).description:
        note(line)
    if json:
        print_json({name: getattr(written, name) for name in written.__slots__})
        return
    table(
        f"{written.folder}: {written.format}",
        ["split", "origin", "images", "objects"],
        [
            (name, written.origins[name], images_, written.objects[name])
            for name, images_ in written.images.items()
        ],
        left=2,
    )
    for what, number in written.lost.items():
        say(f"left out: {number} {what}")


def show(
    data: LabelledData, recipe: RecipeOptions, *, options: ShowOptions, json: Json = False
) -> None:
    """Draw labelled images; with --anchors at the network's size, with their matched anchors.

    Anchors are white. An object without a matched anchor cannot be learned, and is marked. With
    --augmented the first images of training are drawn, with the recipe's augmentation.
    """
    from retinanet.cli.drawing import draw_augmented, draw_labels
    from retinanet.data.formats.writing import check_apart
    from retinanet.errors import ConfigError

    if options.anchors and options.augmented:
        raise ConfigError("--anchors and --augmented draw different images: give one of them")
    dataset = options.read(data, recipe.load())
    check_apart(options.out, [dataset.source])  # or the drawings would be images of the data
    config = _with_choices(recipe.load(), data, options, dataset)
    if options.anchors:
        _check_assignment(config)
    draw: Any = draw_augmented if options.augmented else draw_labels
    with progress("drawing") as update:
        drawn = draw(
            dataset,
            options.out,
            count=options.count,
            seed=options.seed,
            recipe=config if options.augmented or options.anchors else None,
            progress=update,
        )
    if json:
        print_json({"out": options.out, **vars(drawn)})
    else:
        images = count(drawn.images, "image")
        say(f"{images} of {dataset.split} with {drawn.objects} objects, in {options.out}")
        if options.anchors:
            say(
                f"{drawn.anchors} anchors are matched to them; "
                f"{drawn.unmatched} objects have none and cannot be learned"
            )
    for reason in drawn.failures:
        note(f"error: {reason}", style="red")
    if drawn.failures:
        raise typer.Exit(1)


def anchors(
    data: LabelledData, recipe: RecipeOptions, *, options: SplitOptions, json: Json = False
) -> None:
    """Print the anchor recall, and that of other settings.

    The anchor recall is the fraction of objects with an anchor of an IoU of .5 or more.
    """
    from retinanet.data import usable
    from retinanet.errors import DataError

    dataset, _ = usable(options.read(data, recipe.load()))
    if not any(image.has_object for image in dataset.images):
        raise DataError(
            f"{data}: no usable object in the {len(dataset)} images of {options.split}; "
            "see retinanet data check"
        )
    _check_assignment(recipe.load())
    config = _with_choices(recipe.load(), data, options, dataset)
    results: list[tuple[str, list[str], AnchorRecall]] = []
    for words, changes in _candidates(config):
        settings = [f"{name}={setting_text(value)}" for name, value in changes.items()]
        recall = _recall({options.split: dataset}, config.override(changes))
        results.append((words, settings, recall))
    # Candidates are in the order of their cost: suggest the first that is nearly as good as any.
    enough = min(_ENOUGH_RECALL, max(result.recall for _, _, result in results) - _MIN_GAIN)
    suggested = next(changes for _, changes, result in results if result.recall >= enough)
    if json:
        tried = [{"settings": changes, **result.to_dict()} for _, changes, result in results]
        print_json({"tried": tried, "suggested": suggested})
        return
    _show_recall(results[0][2], config.data.tile)
    table(
        "Anchor recall of other settings, cheapest first",
        ["pixels", "anchors", "all", *results[0][2].by_size, "mean IoU"],
        [
            (
                result.image_size,
                words,
                f"{result.recall:.1%}",
                *_size_recalls(result).values(),
                f"{result.mean_iou:.2f}",
            )
            for words, _, result in results
        ],
        left=2,
    )
    say(f"suggested: {shlex.join(suggested)}" if suggested else "the settings are sufficient")


def _candidates(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield settings to compare, in words and by name; the first is the recipe itself."""
    half = {"model.p2": False, "anchors.sizes": [16, 32, 64, 128, 256]}
    wide = half | {"anchors.aspect_ratios": [0.25, 0.5, 1.0, 2.0, 4.0]}
    p2 = {"model.p2": True, "anchors.sizes": None}
    both = {"model.p2": True, "anchors.sizes": [8, 16, 32, 64, 128, 256]}
    sides = ("data.image_size", "data.max_size")
    for factor in (1.0, 1.5, 2.0):
        size = {name: round(factor * recipe.value(name)) for name in sides if factor > 1}
        yield "the recipe's", size
        yield "from 16 px on", size | half
        yield "from 16 px on, 1:4 to 4:1", size | wide
        yield "from 16 px on, with P2", size | p2
        yield "from 8 px on, with P2", size | both


def _check_assignment(config: Recipe) -> None:
    """Raise a ConfigError unless anchors are matched by their IoU alone."""
    from retinanet.errors import ConfigError

    assignment = config.matching.assignment
    if assignment != "iou":
        raise ConfigError(
            f"anchors matched by IoU have no meaning with matching.assignment={assignment}, which "
            "assigns anchors to every object; give --recipe paper_quick, paper_1x, ..."
        )


def _with_choices(config: Recipe, data: Path, options: SplitOptions, dataset: Dataset) -> Recipe:
    """Return the recipe with the settings that ``train`` chooses from the train split."""
    from retinanet.training.settings_from_data import values

    if config.auto and options.split != "train":
        dataset = replace(options, split="train").read(data, config)
    return config.choose(values(choose_for(config, {"train": dataset})))


def _recall(splits: Mapping[str, Dataset], config: Recipe) -> AnchorRecall:
    from retinanet.data import anchor_recall
    from retinanet.data.tiling import tile_dataset
    from retinanet.training.data import recipe_anchors

    tile, overlap = config.data.tile, config.data.tile_overlap
    if tile is not None:
        splits = {name: tile_dataset(split, tile, overlap) for name, split in splits.items()}
    return anchor_recall(
        splits,
        recipe_anchors(config),
        config.data.image_size,
        config.data.max_size,
        foreground_iou=config.matching.foreground_iou,
    )


def _with_known_size(splits: Mapping[str, Dataset], report: CheckReport) -> dict[str, Dataset]:
    """Return the splits without images whose size is in neither the labels nor a readable file."""

    def is_known(image: LabelledImage) -> bool:
        return bool(image.width and image.height) or not report.image_info[image.path].failure

    return {
        name: replace(dataset, images=tuple(filter(is_known, dataset.images)))
        for name, dataset in splits.items()
    }


def _show_problems(report: CheckReport, data: Path, limit: int | None) -> None:
    from retinanet.data.check import KINDS

    if not report.problems:
        say("no problems found")
        return
    for kind, total in report.counts.items():
        say(f"{kind} ({total}): {KINDS.get(kind, '')}", style="bold")
        problems = [problem for problem in report.problems if problem.kind == kind]
        for problem in problems[:limit]:
            file = problem.file
            if file != data and file.is_relative_to(data):
                file = file.relative_to(data)
            fix = f" -> {problem.fix}" if problem.fix else ""
            is_named = problem.object is None or str(problem.object) in problem.reason
            is_named |= problem.reason.startswith("row ")  # counted from 1, objects from 0
            name = "" if is_named else f" object {problem.object}:"
            say(f"  {file}:{name} {problem.reason}{fix}")
        if limit is not None and total > limit:
            say(f"  and {total - limit} more (--all prints them)")
    say()


def _show_statistics(statistics: Mapping[str, Statistics]) -> None:
    def number(values: Mapping[str, float], name: str) -> str:
        return f"{values[name]:.0f}" if name in values else "-"

    splits = list(statistics.values())
    columns = [
        {
            "images": split.images,
            "without objects": split.background_images,
            "objects": split.objects,
            "crowd or difficult": split.ignored,
            **{f"{size} objects": split.sizes[size] for size in ("small", "medium", "large")},
            "objects per image, median": number(split.boxes_per_image, "median"),
            "objects per image, maximum": number(split.boxes_per_image, "max"),
            "side, median px": number(split.side, "50"),
            "side, 5% to 95% px": f"{number(split.side, '5')} - {number(split.side, '95')}",
        }
        for split in splits
    ]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    table("Statistics", ["", *statistics], rows)
    for name, split in statistics.items():
        say(f"{name}: split by {split.origin}")
    counts = {name: [split.classes.get(name, 0) for split in splits] for name in splits[0].classes}
    frequent = sorted(counts, key=lambda name: -sum(counts[name]))
    table(
        f"Objects of {count(len(counts), 'class')}",
        ["class", *statistics],
        [(name, *counts[name]) for name in frequent[:_SHOWN_CLASSES]],
    )
    if len(frequent) > _SHOWN_CLASSES:
        say(f"and {len(frequent) - _SHOWN_CLASSES} more classes")


def _show_recall(result: AnchorRecall, tile: int | None) -> None:
    sizes = ", ".join(f"{name} {recall}" for name, recall in _size_recalls(result).items())
    tiles = f" in tiles of {tile} px" if tile else ""
    say(
        f"anchor recall {result.recall:.1%} of {result.objects} objects{tiles} "
        f"(IoU {result.foreground_iou:g} at {result.image_size} px): {sizes}"
    )


def _size_recalls(result: AnchorRecall) -> dict[str, str]:
    return {name: f"{hit / of:.1%}" if of else "-" for name, (hit, of) in result.by_size.items()}
