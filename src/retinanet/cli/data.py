"""``retinanet data``: check, convert and show labelled data, and how far the anchors reach."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retinanet.cli.console import note, print_json, progress, say, table
from retinanet.cli.settings import Settings, resolve_recipe

if TYPE_CHECKING:
    from retinanet.config import Recipe
    from retinanet.data import AnchorReach, CheckReport, Dataset, Statistics

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
        help="coco, voc, yolo, csv, webdataset, cvat or labelstudio.",
        show_default="found by itself",
    ),
]
RecipeName = Annotated[
    str, typer.Option("--recipe", help="Whose image size and anchors are looked at.")
]
ImageSize = Annotated[
    int | None,
    typer.Option(min=32, help="Shorter side in pixels.", show_default="the recipe's"),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

_SHOWN_PROBLEMS = 10  # of a kind
_SHOWN_CLASSES = 30
_ENOUGH = 0.99  # of the objects reached: the rest is mostly faulty labels
_NEARLY = 0.02  # less than this is not worth more pixels


def check(
    data: Data,
    settings: Settings = None,
    *,
    fix: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a corrected copy; the original is never touched."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Print every problem.")] = False,
    format: Format = None,
    recipe: RecipeName = "quick",
    image_size: ImageSize = None,
    json: Json = False,
) -> None:
    """Find what is wrong with labels and images, and count what there is.

    The exit code is 1 where problems were found, 0 where there are none or --fix wrote a copy.
    """
    from retinanet.data import anchor_reach, check_datasets, read_splits, write_fixed
    from retinanet.training.data import recipe_anchors

    chosen = resolve_recipe(recipe, settings, image_size=image_size)
    splits = read_splits(data, format=format, seed=chosen.split_seed, held_out=chosen.data.held_out)
    with progress("opening images") as show:
        report = check_datasets(splits, progress=show)
    reach = None
    if any(one.objects for one in report.statistics.values()):
        readable = _readable(splits, report)
        reach = anchor_reach(
            readable,
            recipe_anchors(chosen),
            chosen.data.image_size,
            chosen.data.max_size,
            foreground_iou=chosen.matching.foreground_iou,
        )
    written = None
    if fix is not None:
        with progress("writing") as show:
            written = write_fixed(splits, report, fix, progress=show)
    if json:
        answer = report.to_dict() | {"anchors": reach.to_dict() if reach else None}
        if written is not None:
            answer["fixed"] = {"folder": written.folder, "objects": written.objects}
        print_json(answer)
    else:
        _show_problems(report, data, None if every else _SHOWN_PROBLEMS)
        _show_statistics(report.statistics)
        if reach is not None:
            _show_reach(reach)
        if written is not None:
            say(f"a corrected copy is in {written.folder}: {_total(written.objects)} objects in "
                f"{_total(written.images)} images")  # fmt: skip
    if report.problems and written is None:
        raise typer.Exit(1)


def convert(
    source: Annotated[Path, typer.Argument(help="A labelled folder or file.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    *,
    to: Annotated[str, typer.Option(help="coco, voc, yolo, csv or webdataset.")],
    format: Format = None,
    images: Annotated[str, typer.Option(help="copy, hardlink or symlink.")] = "copy",
    shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|MB",
            help="Of webdataset: images (1000) or bytes (256MB) of a shard.",
            show_default="256MB",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split, where the data has none.")] = 0,
    held_out: Annotated[float, typer.Option(help="Share for val, where the data has none.")] = 0.2,
    json: Json = False,
) -> None:
    """Write labelled data in another format."""
    from retinanet.config import check_choice
    from retinanet.data import convert as write

    check_choice("--images", images, ("copy", "hardlink", "symlink"))
    with progress("writing") as show:
        written = write(
            source,
            target,
            to,
            format=format,
            seed=seed,
            held_out=held_out,
            images=images,  # type: ignore[arg-type]  # looked at above
            shard_size=shard_size,
            progress=show,
        )
    if json:
        print_json({name: getattr(written, name) for name in written.__slots__})
        return
    table(
        f"{written.folder}: {written.format}",
        ["split", "made by", "images", "objects"],
        [
            (name, written.origins[name], count, written.objects[name])
            for name, count in written.images.items()
        ],
        left=2,
    )
    for what, count in written.lost.items():
        if count:
            say(f"left out: {count} {what}")


def show(
    data: Data,
    settings: Settings = None,
    *,
    out: Annotated[Path, typer.Option(help="Where the images go.")] = Path("shown"),
    split: Annotated[str, typer.Option(help="train, val, test, all, ...")] = "train",
    count: Annotated[int, typer.Option(min=0, help="Images, drawn by the seed; 0: all.")] = 20,
    with_anchors: Annotated[
        bool, typer.Option("--anchors", help="Also the anchors that answer for each object.")
    ] = False,
    format: Format = None,
    recipe: RecipeName = "quick",
    image_size: ImageSize = None,
    seed: Annotated[int, typer.Option(help="Which images.")] = 0,
    json: Json = False,
) -> None:
    """Draw labelled images, with --anchors as the network meets them.

    Anchors are drawn in white; an object that none answers for cannot be learned, and is marked.
    """
    from retinanet.cli.drawing import draw_labels
    from retinanet.data import read_dataset
    from retinanet.training.data import recipe_anchors

    chosen = resolve_recipe(recipe, settings, image_size=image_size)
    dataset = read_dataset(
        data, split, format=format, seed=chosen.split_seed, held_out=chosen.data.held_out
    )
    spec = recipe_anchors(chosen) if with_anchors else None
    with progress("drawing") as update:
        drawn = draw_labels(dataset, out, count=count, seed=seed, spec=spec, recipe=chosen,
                            progress=update)  # fmt: skip
    if json:
        print_json({"out": out, **drawn.to_dict()})
    else:
        say(f"{drawn.images} images of {dataset.split} with {drawn.objects} objects, in {out}")
        if with_anchors:
            say(
                f"{drawn.anchors} anchors answer for them; "
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
    split: Annotated[str, typer.Option(help="train, val, test, all, ...")] = "train",
    format: Format = None,
    recipe: RecipeName = "quick",
    image_size: ImageSize = None,
    json: Json = False,
) -> None:
    """Say which share of the objects the anchors reach, and what would reach more.

    An object is reached where an anchor overlaps it enough to answer for it (an IoU of .5).
    """
    from retinanet.data import anchor_reach, read_dataset, usable
    from retinanet.training.data import recipe_anchors

    chosen = resolve_recipe(recipe, settings, image_size=image_size)
    whole = read_dataset(
        data, split, format=format, seed=chosen.split_seed, held_out=chosen.data.held_out
    )
    dataset, _ = usable(whole)
    tried: list[tuple[_Candidate, AnchorReach]] = []
    for candidate in _candidates(chosen):
        other = resolve_recipe(
            recipe, [*(settings or []), *candidate.settings], image_size=image_size
        )
        reach = anchor_reach(
            {split: dataset},
            recipe_anchors(other),
            other.data.image_size,
            other.data.max_size,
            foreground_iou=other.matching.foreground_iou,
        )
        tried.append((candidate, reach))
    # The candidates come in the order of their cost: the first that is nearly as good as any.
    enough = min(_ENOUGH, max(one.share for _, one in tried) - _NEARLY)
    best = next(candidate for candidate, one in tried if one.share >= enough)
    if json:
        print_json(
            {
                "tried": [{"settings": one.settings, **reach.to_dict()} for one, reach in tried],
                "suggested": best.settings,
            }
        )
        return
    _, reach = tried[0]
    _show_reach(reach)
    missed = [(name, hit, of) for name, (hit, of) in reach.by_class.items() if hit < of]
    missed.sort(key=lambda one: one[1] / one[2])
    if missed:
        table(
            "Classes with objects out of reach, the worst first",
            ["class", "objects", "reached"],
            [(name, of, _share(hit, of)) for name, hit, of in missed[:_SHOWN_CLASSES]],
        )
    table(
        "What would reach how many; each row costs more than the one above",
        ["pixels", "anchors", "all", *reach.by_size, "mean IoU"],
        [
            (
                f"{one.image_size}",
                candidate.words,
                f"{one.share:.1%}",
                *(_share(*one.by_size[name]) for name in reach.by_size),
                f"{one.mean_iou:.2f}",
            )
            for candidate, one in tried
        ],
        left=2,
    )
    if best.settings:
        say(f"suggested: {shlex.join(best.settings)}")
    else:
        say("the anchors reach enough as they are")


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Settings to try, and what they are in words."""

    words: str
    settings: tuple[str, ...]


def _candidates(recipe: Recipe) -> Iterator[_Candidate]:
    """What to try, in the order of what it costs; the first is the recipe as it is."""
    half = "anchors.sizes=[16,32,64,128,256]"
    wide = "anchors.aspect_ratios=[0.25,0.5,1.0,2.0,4.0]"
    p2 = "model.p2=true"
    for factor in (1.0, 1.5, 2.0):
        size: tuple[str, ...] = ()
        if factor > 1:
            sides = {"image_size": recipe.data.image_size, "max_size": recipe.data.max_size}
            size = tuple(f"data.{name}={round(factor * side)}" for name, side in sides.items())
        yield _Candidate("the recipe's", size)
        yield _Candidate("from 16 px on", (*size, "model.p2=false", half))
        yield _Candidate("from 16 px on, 1:4 to 4:1", (*size, "model.p2=false", half, wide))
        yield _Candidate("from 16 px on, with P2", (*size, p2, "anchors.sizes=none"))
        yield _Candidate("from 8 px on, with P2", (*size, p2, "anchors.sizes=[8,16,32,64,128,256]"))


def _readable(splits: Mapping[str, Dataset], report: CheckReport) -> dict[str, Dataset]:
    """Without the images whose size neither the labels nor the file can tell."""
    from dataclasses import replace

    def has_size(image: Any) -> bool:
        return bool(image.width and image.height) or not report.image_info[image.path].failure

    return {
        name: replace(dataset, images=tuple(one for one in dataset.images if has_size(one)))
        for name, dataset in splits.items()
    }


def _show_problems(report: CheckReport, data: Path, most: int | None) -> None:
    from retinanet.data.check import KINDS

    if not report.problems:
        say("no problems found")
    for kind, count in report.counts.items():
        say(f"{kind} ({count}): {KINDS.get(kind, '')}", style="bold")
        of_kind = [one for one in report.problems if one.kind == kind]
        for problem in of_kind[:most]:
            file = problem.file
            inside = file != data and file.is_relative_to(data)
            named = file.relative_to(data) if inside else file
            fix = f" -> {problem.fix}" if problem.fix else ""
            # Most reasons name the object; of the others it is said here.
            told = problem.object is None or str(problem.object) in problem.reason
            at = "" if told else f" object {problem.object}:"
            say(f"  {named}:{at} {problem.reason}{fix}")
        if most is not None and count > most:
            say(f"  and {count - most} more (--all prints them)")
    if report.problems:
        say()


def _show_statistics(statistics: Mapping[str, Statistics]) -> None:
    rows: list[Sequence[object]] = [
        ("images", *(one.images for one in statistics.values())),
        ("without objects", *(one.background_images for one in statistics.values())),
        ("objects", *(one.objects for one in statistics.values())),
        ("crowd or difficult", *(one.ignored for one in statistics.values())),
        *(
            (f"{size} objects", *(one.sizes[size] for one in statistics.values()))
            for size in ("small", "medium", "large")
        ),
        ("an image: median",
         *(_number(one.boxes_an_image, "median") for one in statistics.values())),
        ("an image: most", *(_number(one.boxes_an_image, "most") for one in statistics.values())),
        ("side, median px", *(_number(one.side, "50") for one in statistics.values())),
        ("side, 5% to 95% px", *(f"{_number(one.side, '5')} - {_number(one.side, '95')}"
                                 for one in statistics.values())),
    ]  # fmt: skip
    table("What there is", ["", *statistics], rows)
    for name, one in statistics.items():
        say(f"{name}: split by {one.origin}")
    classes = list(next(iter(statistics.values())).classes)
    totals = {
        name: sum(one.classes.get(name, 0) for one in statistics.values()) for name in classes
    }
    frequent = sorted(classes, key=lambda name: -totals[name])
    table(
        f"Objects of {len(classes)} classes",
        ["class", *statistics],
        [
            (name, *(one.classes.get(name, 0) for one in statistics.values()))
            for name in frequent[:_SHOWN_CLASSES]
        ],
    )
    if len(frequent) > _SHOWN_CLASSES:
        say(f"and {len(frequent) - _SHOWN_CLASSES} more classes")


def _show_reach(reach: AnchorReach) -> None:
    sizes = ", ".join(f"{name} {_share(hit, of)}" for name, (hit, of) in reach.by_size.items())
    say(
        f"anchors reach {reach.share:.1%} of {reach.objects} objects "
        f"(IoU {reach.foreground_iou:g} at {reach.image_size} px): {sizes}"
    )


def _share(hit: int, of: int) -> str:
    return f"{hit / of:.1%}" if of else "-"


def _number(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:.0f}" if name in values else "-"


def _total(counts: Mapping[str, int]) -> int:
    return sum(counts.values())
