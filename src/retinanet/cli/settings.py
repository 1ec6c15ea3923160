"""Options that several commands share, and the recipe that they make up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from retinanet.config import Recipe

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Any setting, such as train.lr=0.005; train --show-recipe prints all.",
        show_default=False,
    ),
]

ImageSize = Annotated[
    int | None,
    typer.Option(min=32, help="Shorter image side in pixels.", show_default="the recipe's"),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

ScoreThreshold = Annotated[
    float | None,
    typer.Option(help="Drop boxes with a lower score.", show_default="the model's, .05"),
]
NmsThreshold = Annotated[
    float | None,
    typer.Option(help="IoU threshold for NMS.", show_default="the model's, .5"),
]
ClassAgnostic = Annotated[bool, typer.Option("--class-agnostic", help="Class-agnostic NMS.")]
DetectionsPerImage = Annotated[
    int | None,
    typer.Option(help="Maximum number of boxes per image.", show_default="the model's, 100"),
]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, mps.")]
Precision = Annotated[str, typer.Option(help="Precision: auto, float32, bf16, fp16 or int8.")]
Backend = Annotated[str, typer.Option(help="Inference engine: auto, torch, compile or openvino.")]


def thresholds_of(
    *,
    score_threshold: float | None,
    nms_threshold: float | None,
    class_agnostic: bool,
    detections_per_image: int | None,
) -> dict[str, Any]:
    """Return the given thresholds by the names that a detector has for them."""
    given = {
        "score_threshold": score_threshold,
        "nms_threshold": nms_threshold,
        "detections_per_image": detections_per_image,
        "class_agnostic_nms": class_agnostic or None,  # None: as the model's recipe says
    }
    return {name: value for name, value in given.items() if value is not None}


def resolve_recipe(
    name: str,
    settings: Sequence[str] | None,
    *,
    given: Mapping[str, object] | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    image_size: int | None = None,
) -> Recipe:
    """Load the recipe `name`, and override it with options, then ``key=value`` settings.

    Args:
        name: as :func:`retinanet.config.load_recipe` takes it.
        settings: such as ``train.lr=0.005``.
        given: settings that have an option of their own; None: not given.
        epochs, steps: the exact length of a run.
        image_size: the shorter side; the limit of the longer side keeps its ratio to it.

    Raises:
        ConfigError: a setting is unknown or out of range, or both `epochs` and `steps` are given.
    """
    from retinanet.config import load_recipe
    from retinanet.errors import ConfigError

    if epochs is not None and steps is not None:
        raise ConfigError("--epochs and --steps both set the length of the run: give one of them")
    options = [f"{key}={value}" for key, value in (given or {}).items() if value is not None]
    if epochs is not None:
        # An exact number: the recipe's limits are for lengths that it computes itself.
        options += [f"train.epochs={epochs}", "train.min_steps=1", "train.max_steps=1_000_000_000"]
    if steps is not None:
        options.append(f"train.steps={steps}")
    if image_size is not None:
        sides = load_recipe(name).data
        longest = round(image_size * sides.max_size / sides.image_size)
        options += [f"data.image_size={image_size}", f"data.max_size={longest}"]
    return load_recipe(name, [*options, *(settings or [])])


def tile_of(given: str | None) -> int | str | None:
    """Parse ``--tile``: None, ``auto``, or pixels.

    Raises:
        ConfigError: it is neither.
    """
    from retinanet.errors import ConfigError

    if given is None or given == "auto":
        return given
    if given.isascii() and given.isdecimal() and int(given) > 0:
        return int(given)
    raise ConfigError(f"--tile {given!r} is neither a number of pixels nor auto")
