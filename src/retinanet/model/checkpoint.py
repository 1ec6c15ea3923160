"""Checkpoints: a folder with ``model.safetensors`` and a readable ``model.json``.

Opening one runs no code: the tensors are safetensors, the rest is plain text that is checked before
anything is built from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from retinanet.config import ModelSpec, build_model_spec, repeated_names
from retinanet.errors import ConfigError, MissingExtraError, WeightsError
from retinanet.files import readable_folder, replace_folder, write_atomic
from retinanet.model.backbone import check_state
from retinanet.model.hub import fetch_hub, hub_source, is_hub_name
from retinanet.model.retinanet import RetinaNet, to_channels_last
from retinanet.model.torchvision_weights import fetch_torchvision

WEIGHTS_FILE = "model.safetensors"
TEXT_FILE = "model.json"
FORMAT = "retinanet checkpoint"
FORMAT_VERSION = 1

PREPROCESSING = ("pixel_mean", "pixel_std")
ANCHORS = ("sizes", "scales", "aspect_ratios", "rounding")


@dataclass(frozen=True)
class Checkpoint:
    """A model and all that is needed to use it.

    Attributes:
        model: the network.
        classes: names, in the order of its labels 0..K-1.
        category_ids: the data's own id of each class.
        image_size: shorter side of its input, pixels.
        max_size: longer side at most.
        info: plain values that go with it, such as ``detect`` (a mapping with score_threshold,
            topk_candidates, nms_threshold, detections_per_image, class_agnostic_nms) and where it
            comes from.
    """

    model: RetinaNet
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    image_size: int
    max_size: int
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = (len(self.classes), len(self.category_ids), self.model.num_classes)
        if len(set(counts)) != 1:
            raise ValueError(
                f"{counts[0]} class names, {counts[1]} category ids, "
                f"and a model of {counts[2]} classes"
            )


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` as `folder`; a kill at any time leaves the old one or the new one.

    Whatever else is in the folder goes with the old one.

    Raises:
        WeightsError: `folder` holds something that is not a checkpoint, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / TEXT_FILE).is_file() and _any_inside(folder):
        raise WeightsError(f"{folder} exists and is no checkpoint: choose another folder")
    try:
        return replace_folder(folder, lambda draft: write_checkpoint(draft, checkpoint))
    except OSError as error:
        raise WeightsError(f"cannot write the checkpoint {folder}: {error}") from None


_SPACES = re.compile(r"\n *")


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the two files into `folder`, which exists: for use inside ``replace_folder``."""
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in checkpoint.model.state_dict().items()
    }
    save_file(state, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    text = json.dumps(checkpoint_text(checkpoint), indent=2, ensure_ascii=False)
    # Lists of plain values on one line; inside a JSON string there is no line break.
    text = re.sub(r"\[\n *([^\[\]{}]*?)\n *\]", lambda m: f"[{_SPACES.sub(' ', m[1])}]", text)
    write_atomic(folder / TEXT_FILE, text + "\n")


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint; the model comes in eval mode.

    Args:
        path: a run folder (its best, else its last), a checkpoint folder, a ``model.safetensors``
            in one, ``torchvision/retinanet_resnet50_fpn`` or ``.._v2``, or ``hf://OWNER/NAME`` of
            the Hugging Face hub, maybe with ``@REVISION`` (fetched once, cached).
        device: where the model goes.

    Raises:
        WeightsError: there is no such checkpoint, or it is damaged or made for something else.
        MissingExtraError: its backbone needs timm, or the hub huggingface_hub.
    """
    if str(path).startswith("torchvision/"):
        checkpoint = _from_torchvision(str(path))
    elif is_hub_name(path):
        folder = fetch_hub(path, (WEIGHTS_FILE, TEXT_FILE))
        checkpoint = _read(folder)
        checkpoint.info["source"] = hub_source(path, folder)
    else:
        checkpoint = _read(find_checkpoint(Path(path)))
    checkpoint.model.to(device).eval()
    return checkpoint


def _any_inside(folder: Path) -> bool:
    """Whether `folder` is a file, or a folder that is not empty."""
    return not folder.is_dir() or next(folder.iterdir(), None) is not None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means."""
    folder = path.parent if path.name in (WEIGHTS_FILE, TEXT_FILE) else path
    for candidate in map(readable_folder, (folder, folder / "best", folder / "last")):
        if (candidate / TEXT_FILE).is_file() or (candidate / WEIGHTS_FILE).is_file():
            return candidate
    if path.is_file():
        raise WeightsError(
            f"{path} is not a checkpoint: give the folder that holds {WEIGHTS_FILE} and {TEXT_FILE}"
        )
    if path.is_dir():
        raise WeightsError(f"{path} holds no {TEXT_FILE}, and neither do its best/ and last/")
    raise WeightsError(f"there is no checkpoint {path}: give a run or checkpoint folder")


def _read(folder: Path) -> Checkpoint:
    for name in (TEXT_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise WeightsError(f"checkpoint {folder} has no {name}: it is not whole")
        try:
            (folder / name).open("rb").close()  # safetensors reports any failure as a missing file
        except OSError as error:
            raise WeightsError(f"{folder / name} cannot be read: {error.strerror}") from None
    text = CheckpointText(_parse(folder / TEXT_FILE), folder / TEXT_FILE)
    spec = text.spec()
    try:
        state = load_file(str(folder / WEIGHTS_FILE))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{folder / WEIGHTS_FILE} is no safetensors file: {error}") from None
    try:
        # Built without memory, so that a text that asks for too much is refused before it gets it;
        # timm computes tables while it builds, which need a place.
        on_meta = not spec.backbone.startswith("timm/")
        with torch.device("meta" if on_meta else "cpu"):
            model = RetinaNet(len(text.classes), spec)
    except MissingExtraError:
        raise
    except (ConfigError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{text.file} describes no network: {error}") from None
    check_state(model.state_dict(), state, f"weights of {folder}")
    model.load_state_dict(state, strict=False, assign=True)
    model.float()
    model.set_pixel_statistics()
    return Checkpoint(
        to_channels_last(model),
        text.classes,
        text.category_ids,
        text.whole("preprocessing", "image_size"),
        text.whole("preprocessing", "max_size"),
        text.info,
    )


def _from_torchvision(name: str) -> Checkpoint:
    loaded = fetch_torchvision(name)
    return Checkpoint(
        to_channels_last(loaded.model),
        loaded.classes,
        loaded.category_ids,
        loaded.image_size,
        loaded.max_size,
        {"source": name, "detect": dict(loaded.detect)},
    )


def checkpoint_text(checkpoint: Checkpoint) -> dict[str, Any]:
    """What model.json says; num_classes is not in it, for the classes are."""
    spec = checkpoint.model.spec.model_dump()
    elsewhere = {*PREPROCESSING, *ANCHORS, "backbone_weights"}
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "classes": list(checkpoint.classes),
        "category_ids": list(checkpoint.category_ids),
        "preprocessing": {
            "image_size": checkpoint.image_size,
            "max_size": checkpoint.max_size,
            **{key: spec[key] for key in PREPROCESSING},
        },
        "anchors": {key: spec[key] for key in ANCHORS},
        "network": {key: value for key, value in spec.items() if key not in elsewhere},
        "info": checkpoint.info,
    }


def _parse(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise WeightsError(f'{file} is not a checkpoint\'s: it lacks "format": "{FORMAT}"')
    version = values.get("version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise WeightsError(
            f"{file} has version {version!r}; this package reads up to {FORMAT_VERSION}: upgrade it"
        )
    return values


# What a network of this version is described by, and the kinds of value that JSON gives for it.
_NETWORK: dict[str, tuple[type, ...]] = {
    "backbone": (str,),
    "norm": (str,),
    "frozen_stages": (int,),
    "norm_eps": (int, float),
    "p2": (bool,),
    "p6_from": (str,),
    "channels": (int,),
    "head_depth": (int,),
    "head_norm": (str,),
    "prior": (int, float),
    "stride_padding": (str,),
}


class CheckpointText:
    """model.json, every value checked as it is read; a bad one is a WeightsError."""

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        self.values = values
        self.file = file
        self.classes: tuple[str, ...] = tuple(self._list(values, "classes", str))
        self.category_ids: tuple[int, ...] = tuple(self._list(values, "category_ids", int))
        if len(self.classes) != len(self.category_ids):
            self._refuse(
                f"{len(self.classes)} classes and {len(self.category_ids)} category_ids differ"
            )
        self.info: dict[str, Any] = self._section("info")

    def spec(self) -> ModelSpec:
        """Return the settings of the network."""
        network = self._section("network")
        if set(network) != set(_NETWORK):
            odd = sorted(set(network) ^ set(_NETWORK))
            self._refuse(f"network has settings that are missing or unknown: {', '.join(odd)}")
        for key, kinds in _NETWORK.items():
            # True is an int in Python, and not in JSON.
            if not isinstance(network[key], kinds) or (
                isinstance(network[key], bool) and bool not in kinds
            ):
                self._refuse(f"network.{key} is {network[key]!r}")
        preprocessing, anchors = self._section("preprocessing"), self._section("anchors")
        numbers = {key: tuple(self._list(preprocessing, key, float)) for key in PREPROCESSING}
        lists = {key: tuple(self._list(anchors, key, float)) for key in ANCHORS[:3]}
        try:
            settings = {**network, **numbers, **lists, "rounding": anchors.get("rounding")}
            return build_model_spec(None, **settings)
        except ConfigError as error:
            self._refuse(f"invalid model configuration: {error}")

    def whole(self, section: str, key: str) -> int:
        """A positive whole number."""
        value = self._section(section).get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self._refuse(f"{section}.{key} is {value!r}, not a positive whole number")
        return int(value)

    def _section(self, key: str) -> dict[str, Any]:
        section = self.values.get(key)
        if not isinstance(section, dict):
            self._refuse(f"it has no section {key}")
        return dict(section)

    def _list(self, values: Mapping[str, Any], key: str, kind: type) -> list[Any]:
        found = values.get(key)
        kinds = (int, float) if kind is float else (kind,)
        if (
            not isinstance(found, list)
            or not found
            or not all(isinstance(one, kinds) and not isinstance(one, bool) for one in found)
        ):
            self._refuse(f"{key} is not a list of {kind.__name__} values")
        return list(found)

    def _refuse(self, why: str) -> NoReturn:
        raise WeightsError(f"{self.file}: {why}")


class TransferReport(NamedTuple):
    """What :func:`transfer_weights` did.

    Attributes:
        loaded: names of the tensors that were taken whole.
        skipped: (name, reason) of those that were not.
        rows: classes whose rows of the class head were taken.
    """

    loaded: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    rows: tuple[str, ...]


def transfer_weights(
    model: RetinaNet, classes: Sequence[str], source: Checkpoint
) -> TransferReport:
    """Start `model` from the weights of another, maybe with other classes.

    Tensors of the same name and shape are taken. In the last convolution of the class head, the
    rows of classes that both have by name are taken; the other classes keep their start.

    Args:
        model: what to load into, in place.
        classes: its class names.
        source: where from.

    Raises:
        ValueError: `classes` are not as many as the model's.
        WeightsError: nothing fits, or several classes of either have the same name.
    """
    for what, names in (("the source", source.classes), ("the data", classes)):
        if repeated := repeated_names(names):
            raise WeightsError(
                f"rows of the class head are taken by class name, and {what} has several classes "
                f"named {', '.join(map(repr, repeated[:5]))}: rename or merge them"
            )
    if len(classes) != model.num_classes:
        raise ValueError(f"{len(classes)} class names for a model of {model.num_classes} classes")
    target, given = model.state_dict(), source.model.state_dict()
    loaded: list[str] = []
    skipped: list[tuple[str, str]] = []
    same_anchors = _shape_of_cells(model) == _shape_of_cells(source.model)
    same_levels = model.p2 == source.model.p2
    shared = [name for name in classes if name in source.classes]
    for name, tensor in target.items():
        if name not in given:
            skipped.append((name, "the source has none"))
        elif name.startswith(("class_head.last.", "box_head.last.")) and not same_anchors:
            skipped.append((name, "the anchors of a cell or the channels differ"))
        elif name.startswith(("pyramid.lateral.", "pyramid.output.")) and not same_levels:
            skipped.append((name, "with and without P2 the levels count differently"))
        elif name.startswith("class_head.last."):
            _copy_rows(tensor, given[name], classes, source.classes)
        elif given[name].shape != tensor.shape:
            skipped.append((name, f"{list(given[name].shape)} instead of {list(tensor.shape)}"))
        else:
            tensor.copy_(given[name])
            loaded.append(name)
    skipped += [(name, "the model has none") for name in given if name not in target]
    if not same_anchors:
        shared = []
    else:
        new = [name for name in classes if name not in shared]
        skipped += [(f"class_head.last: {name}", "a class that the source lacks") for name in new]
        skipped += [
            (f"class_head.last: {name}", "a class that the model lacks")
            for name in source.classes
            if name not in shared
        ]
    for key in (*PREPROCESSING, "stride_padding", "norm_eps"):
        given_value, own_value = getattr(source.model.spec, key), getattr(model.spec, key)
        if given_value != own_value:
            skipped.append((key, f"{given_value} there, {own_value} here"))
    if not loaded:
        raise WeightsError("nothing of the source fits the model: their networks differ")
    return TransferReport(tuple(loaded), tuple(skipped), tuple(shared))


def _shape_of_cells(model: RetinaNet) -> tuple[Any, ...]:
    return model.anchors.scales, model.anchors.aspect_ratios, model.spec.channels


def _copy_rows(
    target: Tensor, given: Tensor, classes: Sequence[str], source_classes: Sequence[str]
) -> None:
    """Rows a * K + k of the class head, whose first axis is anchors times classes."""
    to = target.view(-1, len(classes), *target.shape[1:])
    of = given.reshape(-1, len(source_classes), *given.shape[1:])
    for i, name in enumerate(classes):
        if name in source_classes:
            to[:, i] = of[:, source_classes.index(name)]
