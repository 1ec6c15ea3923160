"""``retinanet.train``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from retinanet.config import Recipe, load_with_keywords
from retinanet.data.dataset import Dataset
from retinanet.data.memory import Reader, from_torch
from retinanet.data.splits import split_word
from retinanet.errors import ConfigError
from retinanet.training.events import EventCallback
from retinanet.training.trainer import Run
from retinanet.training.trainer import train as train_by_recipe


def train(
    data: str | Path | Reader | Mapping[str, Any] | Any,
    *,
    out: str | Path,
    recipe: str | Path | Recipe = "quick",
    settings: str | Iterable[str] | Mapping[str, Any] = (),
    device: str = "auto",
    init: str | Path | None = None,
    more_epochs: float | None = None,
    on_event: EventCallback | None = None,
    classes: Sequence[str] | None = None,
    **keywords: Any,
) -> Run:
    """Train a RetinaNet on labelled images, resume a run that was stopped, or extend it.

    ``rn.train("cells/", out="runs/cells", epochs=3, batch_size=8, lr=0.001, backbone="resnet18")``

    Args:
        data: a folder or file of any format of :mod:`retinanet.data.formats`; a function that
            yields images with their boxes and class names
            (:func:`retinanet.data.memory.read_with`); or splits by name, each a :class:`Dataset` or
            a map-style data set of ``(image, {"boxes", "labels"})``; one alone is ``train``.
        out: the run folder; an unfinished run of the same recipe and data in it is resumed.
        recipe: a name, a TOML file, or a recipe from :func:`retinanet.load_recipe`.
        settings: overrides of the recipe, such as ``"train.lr=0.005"``, or a mapping.
        device: ``auto`` or a torch device, such as ``cpu``, ``cuda:1`` or ``mps``.
        init: a detector to start from, whose network is taken over unless `settings` name
            another: ``coco`` (torchvision's, downloaded once), a run, a checkpoint, or a .pth file.
            Classes of the same name keep their rows (``train.class_map`` for other names).
        more_epochs: train the finished run in `out` so much further, by its settings, with a
            schedule of its own.
        on_event: callback for progress events (:class:`retinanet.training.events.Event`); if it
            returns ``"stop"``, training stops after the current step, and the same call resumes it.
        classes: names by label of map-style data sets; None: their ``classes``, else numbers. (To
            train on some classes only: ``settings={"data.classes": ["car"]}``.)
        keywords: settings by the last part of their names, as on the command line: ``epochs``
            (exact), ``steps``, ``time`` (limit of the whole call: seconds, or ``"20min"``), ``lr``,
            ``batch_size`` (``"auto"``: the recipe's, in parts that fit into memory),
            ``image_size``, ``seed``, ``backbone``, ... Classes and functions of your own are
            values of ``backbone``, ``head``, ``classification``, ``box``, ``assignment`` and
            ``transform``.

    Raises:
        ConfigError: an unknown setting, keyword or recipe; settings given twice, with a built
            recipe, or in contradiction; `classes` given for data that name their own; `device` is
            not available; the time is too short; `out` contains another run or is in use; or
            memory is not sufficient.
        DataError: the data has no image or no object to train on, more than a tenth of the images
            cannot be read, or no anchor matched an object in the first steps.
        NonFiniteLossError: the loss or its gradient is NaN or Inf; the step is saved.
        WeightsError: `init` or the backbone's weights cannot be used.
    """
    if isinstance(settings, str):
        settings = [settings]
    started = monotonic()
    overrides = [*(settings.items() if isinstance(settings, Mapping) else settings)]
    if not isinstance(recipe, Recipe):
        recipe = load_with_keywords(recipe, overrides, keywords)
    elif overrides or keywords:
        raise ConfigError(
            "settings and keywords cannot override a built recipe; pass them to load_recipe"
        )
    data = _by_split(data, classes)
    return train_by_recipe(
        recipe,
        data,
        out,
        device=device,
        init=init,
        on_event=on_event,
        started=started,
        more_epochs=more_epochs,
    )


def _by_split(data: Any, classes: Sequence[str] | None) -> Any:
    """Return map-style data sets as splits by name; a path or a reader as it is."""
    if not isinstance(data, str | Path | Mapping) and not callable(data):
        is_map = isinstance(data, Dataset) or hasattr(data, "__getitem__")
        if not is_map or isinstance(data, tuple | list):
            raise ConfigError(
                f"data is a {type(data).__name__}: give a path, a map-style data set, or data sets "
                'by split, {"train": .., "val": ..}'
            )
        data = {"train": data}
    if classes is not None and not isinstance(data, Mapping):
        raise ConfigError(
            "classes are the names of map-style data sets, and these data have their own: to train "
            'on some of them give settings={"data.classes": [..]}'
        )
    if not isinstance(data, Mapping):
        return data
    return {
        split_word(name) or name: part
        if isinstance(part, Dataset)
        else from_torch(part, classes, split=name)
        for name, part in data.items()
    }
