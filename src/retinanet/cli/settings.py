"""Options as fields of dataclasses, which several commands can share.

A command takes such a group as one parameter; :func:`expand_groups` gives it one option per field.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from retinanet.config import load_with_keywords, parse_seconds, recipe_names
from retinanet.errors import ConfigError

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
Model = Annotated[
    str,
    typer.Argument(
        help="A run folder, a checkpoint, an exported file, coco, torchvision/NAME or "
        "hf://OWNER/NAME."
    ),
]
LabelledData = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="A labelled folder or file of any format (docs/data.md), or a reader as "
        "module:function.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def option(help: str, default: Any = None, *, shown: str | bool = True, **settings: Any) -> Any:
    """Declare a field of a group.

    Args:
        help: the help text.
        default: ``...`` if the option is required.
        shown: the default in the help; True: `default` itself.
        settings: of ``typer.Option``.
    """
    metadata = {"help": help, "show_default": shown, **settings}
    return field(default=MISSING if default is ... else default, metadata=metadata)


def expand_groups(function: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of a dataclass type by the fields of the dataclass, as options."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint):
            groups[parameter.name] = hint
            parameters += _group_parameters(hint)
        else:
            parameters.append(parameter.replace(annotation=hint, kind=parameter.KEYWORD_ONLY))

    @wraps(function)
    def command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{item.name: values.pop(item.name) for item in fields(group)})
        function(**values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _group_parameters(group: Any) -> Iterator[inspect.Parameter]:
    types = get_type_hints(group, include_extras=True)
    for item in fields(group):
        kind = types[item.name]
        if item.metadata:
            # Without its name a bool would get an option --no-NAME too.
            names = [f"--{item.name.replace('_', '-')}"] if kind is bool else []
            kind = Annotated[kind, typer.Option(*names, **item.metadata)]
        default = inspect.Parameter.empty if item.default is MISSING else item.default
        yield inspect.Parameter(
            item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
        )


@dataclass(frozen=True)
class SuppressionOptions:
    """Non-maximum suppression; what is not given is the model's."""

    nms: str | None = option(
        "Kind of NMS: hard, soft, or wbf (weighted box fusion).", shown="the model's"
    )
    nms_threshold: float | None = option("IoU threshold for NMS.", shown="the model's, .5")
    flip_tta: bool | None = option(
        "Run the network on the mirrored image too.", shown="the model's"
    )

    def given(self) -> dict[str, Any]:
        """Return the given thresholds by the names that a detector has for them."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class ThresholdOptions(SuppressionOptions):
    """Post-processing; what is not given is the model's."""

    score_threshold: float | None = option(
        "Drop boxes with a lower score.", shown="by class, best F1 in validation; else .3"
    )
    class_agnostic: bool = option("Class-agnostic NMS.", False)
    detections_per_image: int | None = option(
        "Maximum number of boxes per image.", shown="the model's, 100"
    )

    def given(self) -> dict[str, Any]:
        """Return the given thresholds by the names that a detector has for them."""
        values = super().given()
        values["class_agnostic_nms"] = values.pop("class_agnostic") or None  # None: the model's
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class DeviceOptions:
    """The device."""

    device: str = option("Device: auto, cpu, cuda, cuda:1, mps.", "auto")


@dataclass(frozen=True)
class EngineOptions(DeviceOptions):
    """The inference engine."""

    precision: str = option("Precision: auto, float32, bf16, fp16 or int8.", "auto")
    backend: str = option("Inference engine: auto, torch, compile or openvino.", "auto")
    calibrate: str | None = option(
        "Calibration images for int8; not those of an evaluation. detect calibrates on its "
        "sources by default."
    )


@dataclass(frozen=True)
class DetectorOptions(EngineOptions):
    """The inference engine and the size of its input."""

    image_size: int | None = option(
        "Shorter image side in pixels; larger detects smaller objects.", shown="the model's"
    )


def parse_duration(option: str, text: str) -> float:
    """Return the seconds of a duration such as ``20min``; `option` names it in the error."""
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise ConfigError(f"{option} {error}") from None


def split_names(text: str) -> list[str]:
    """Split names at commas; a name that contains a comma is quoted."""
    import csv

    names = [name.strip() for row in csv.reader([text], skipinitialspace=True) for name in row]
    if not all(names) or not names:
        raise ConfigError(f"--classes {text!r} has no or an empty name: give person,car, say")
    return names


@dataclass(frozen=True)
class ClassOptions:
    """The classes."""

    classes: str | None = option("Only these classes: names separated by commas.", shown="all")

    def given(self) -> dict[str, Any]:
        """Return the argument of a detector or an evaluation, if it is given."""
        return {} if self.classes is None else {"classes": split_names(self.classes)}


@dataclass(frozen=True)
class TileOptions:
    """Detection in tiles."""

    tile: str | None = option(
        "Detect also in tiles of this many pixels, or auto: for huge images; or none.",
        shown="those of the model's training, or none",
    )
    overlap: float | None = option(
        "Overlap of adjacent tiles, share of the side in [0, 1).", shown="the model's, .2"
    )

    def given(self) -> dict[str, Any]:
        """Return the arguments of a detector."""
        if self.overlap is not None and self.tile is None:
            raise ConfigError("--overlap is for tiles: give --tile too, or leave it out")
        tile: int | str | None = self.tile
        if self.tile not in (None, "auto", "none"):
            if not (self.tile.isascii() and self.tile.isdecimal() and int(self.tile) > 0):
                raise ConfigError(
                    f"--tile {self.tile!r} is neither a number of pixels nor auto or none"
                )
            tile = int(self.tile)
        return {"tile": tile, "overlap": self.overlap}


@dataclass(frozen=True)
class SplitOptions:
    """The split of an evaluation."""

    split: str | None = option(
        "Split of the data: train, val, test, all, or another one.",
        shown="val, or that of a label file",
    )


RECIPE_HELP = f"Recipe: {', '.join(recipe_names())}, or a file."
"""Help of the option ``--recipe``."""


@dataclass(frozen=True)
class RecipeOptions:
    """A recipe, and settings that override it."""

    settings: Settings = None
    recipe: str = option(RECIPE_HELP, "quick")
    image_size: int | None = option("Shorter image side in pixels.", shown="the recipe's", min=32)

    def load(self, **keywords: Any) -> Recipe:
        """Load the recipe, and override it with `keywords`, the image size and the settings."""
        values = {**keywords, "image_size": self.image_size}
        given = {name: value for name, value in values.items() if value is not None}
        return load_with_keywords(self.recipe, self.settings or [], given)


def run_folder(model: str | Path) -> Path | None:
    """Return the run folder of a model, or None if it has none."""
    path = Path(model)
    folders = (path, path.parent, path.parent.parent) if path.exists() else ()
    return next((folder for folder in folders if (folder / "config.toml").is_file()), None)
