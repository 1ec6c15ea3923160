"""``retinanet.train``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from retinanet.config import Recipe, load_recipe
from retinanet.data.dataset import Dataset
from retinanet.errors import ConfigError
from retinanet.training.events import EventCallback
from retinanet.training.trainer import Run
from retinanet.training.trainer import train as train_by_recipe


def train(
    data: str | Path | Mapping[str, Dataset],
    *,
    out: str | Path,
    recipe: str | Path | Recipe = "quick",
    settings: Iterable[str] = (),
    device: str = "auto",
    init: str | Path | None = None,
    on_event: EventCallback | None = None,
) -> Run:
    """Train a RetinaNet on labelled images, or resume a run that was stopped.

    Args:
        data: a folder or file of any format of :mod:`retinanet.data.formats`, or splits by name.
        out: the run folder; an unfinished run of the same recipe and data in it is resumed.
        recipe: a name, a TOML file, or a recipe from :func:`retinanet.load_recipe`.
        settings: overrides of the recipe, such as ``"train.lr=0.005"``.
        device: ``auto`` or a torch device.
        init: a checkpoint to start from.
        on_event: callback for progress events.

    Raises:
        ConfigError: an unknown setting or recipe, or `settings` given with a built recipe.
        RetinaNetError: as :func:`retinanet.training.trainer.train`.
    """
    if isinstance(settings, str):
        settings = [settings]
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, settings)
    elif list(settings):
        raise ConfigError("settings cannot override a built recipe; pass them to load_recipe")
    return train_by_recipe(recipe, data, out, device=device, init=init, on_event=on_event)
