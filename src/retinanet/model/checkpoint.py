"""Checkpoints: a folder with ``model.safetensors`` and a readable ``model.json``.

Loading a checkpoint runs no code: the tensors are safetensors, and the text is validated before a
network is built from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from retinanet.config import ModelSpec, explain, is_own, repeated_names
from retinanet.errors import ConfigError, MissingExtraError, WeightsError
from retinanet.files import readable_folder, replace_folder, write_atomic
from retinanet.model.backbone import check_state
from retinanet.model.foreign_weights import (
    IMAGE_SIZE,
    MAX_SIZE,
    SUFFIXES,
    Loaded,
    fetch_torchvision,
    load_foreign,
    published_name,
)
from retinanet.model.hub import fetch_hub, hub_source, is_hub_name
from retinanet.model.retinanet import RetinaNet, to_channels_last

WEIGHTS_FILE = "model.safetensors"
TEXT_FILE = "model.json"
FORMAT = "retinanet checkpoint"
FORMAT_VERSION = 1

PREPROCESSING = ("pixel_mean", "pixel_std")
ANCHORS = ("sizes", "scales", "aspect_ratios", "rounding")
# backbone_weights does not matter to a network whose weights are in the checkpoint.
NETWORK = tuple(
    key
    for key in ModelSpec.model_fields
    if key not in (*PREPROCESSING, *ANCHORS, "backbone_weights")
)

# Settings that older files of version 1 lack: their defaults are what those networks have.
ADDED = ("p7_relu", "stride_in_1x1", "head", "box_bins")


@dataclass(frozen=True)
class Checkpoint:
    """A model and all that is needed to use it.

    Attributes:
        model: the network.
        classes: names, in the order of its labels 0..K-1.
        category_ids: the data's own id of each class.
        image_size: shorter side of its input, pixels.
        max_size: maximum of the longer side.
        info: plain values, such as ``detect`` (a mapping with score_threshold, topk_candidates,
            nms_threshold, detections_per_image, class_agnostic_nms) and the origin of the model.
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
    """Write a checkpoint atomically; all previous content of the folder is replaced.

    Raises:
        WeightsError: `folder` is not empty and not a checkpoint, or cannot be written.
    """
    folder = Path(folder)
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not empty and not (folder / TEXT_FILE).is_file():
        raise WeightsError(f"{folder} exists and is no checkpoint: choose another folder")
    try:
        return replace_folder(folder, lambda draft: write_checkpoint(draft, checkpoint))
    except OSError as error:
        raise WeightsError(f"cannot write the checkpoint {folder}: {error}") from None


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the two files into an existing folder, for use in ``replace_folder``."""
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in checkpoint.model.state_dict().items()
    }
    save_file(state, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    _write_text(folder, checkpoint_text(checkpoint))


def update_info(folder: Path, info: Mapping[str, Any]) -> None:
    """Replace ``info`` in the model.json of a checkpoint, atomically."""
    values = json.loads((folder / TEXT_FILE).read_text("utf-8"))
    try:
        _write_text(folder, {**values, "info": dict(info)})
    except OSError as error:
        raise WeightsError(f"cannot write {folder / TEXT_FILE}: {error.strerror}") from None


def _write_text(folder: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False)
    # Lists of plain values on one line; inside a JSON string there is no line break.
    text = re.sub(
        r"\[\n *([^\[\]{}]*?)\n *\]", lambda m: "[" + re.sub(r"\n *", " ", m[1]) + "]", text
    )
    write_atomic(folder / TEXT_FILE, text + "\n")


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a checkpoint; the model is in eval mode.

    Args:
        path: a run folder (its best, else its last), a checkpoint folder, a ``model.safetensors``
            in one, ``coco`` (short for ``torchvision/retinanet_resnet50_fpn_v2``),
            ``torchvision/retinanet_resnet50_fpn``, or ``hf://OWNER/NAME`` on the Hugging Face Hub,
            optionally with ``@REVISION`` (both are downloaded once and cached); or a .pth or .pkl
            file of a RetinaNet of torchvision, detectron2 or mmdetection.
        device: of the model.

    Raises:
        WeightsError: there is no such checkpoint, or it is damaged or of another kind.
        MissingExtraError: its backbone needs timm, or the Hub huggingface_hub.
    """
    if published := published_name(path):
        if any((folder / TEXT_FILE).is_file() for folder in _candidates(Path(path))):
            raise WeightsError(
                f"{path} names both a local checkpoint and {published}: give "
                f"{Path(path).resolve()} or {published}"
            )
        checkpoint = _of_library(fetch_torchvision(published), published)
    elif is_hub_name(path):
        folder = fetch_hub(path, (WEIGHTS_FILE, TEXT_FILE))
        checkpoint = _read(folder)
        checkpoint.info["source"] = hub_source(path, folder)
    elif Path(path).suffix.lower() in SUFFIXES and not Path(path).is_dir():
        checkpoint = _of_library(load_foreign(Path(path)), str(path))
    else:
        checkpoint = _read(find_checkpoint(Path(path)))
    checkpoint.model.to(device).eval()
    return checkpoint


def _of_library(loaded: Loaded, source: str) -> Checkpoint:
    model, classes, ids, detect = loaded
    info = {"source": source, "detect": detect}
    return Checkpoint(to_channels_last(model), classes, ids, IMAGE_SIZE, MAX_SIZE, info)


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint folder of a run folder, a checkpoint folder or a file in it."""
    folder = path.parent if path.name in (WEIGHTS_FILE, TEXT_FILE) else path
    for candidate in _candidates(folder):
        if (candidate / TEXT_FILE).is_file() or (candidate / WEIGHTS_FILE).is_file():
            return candidate
    if path.is_file():
        raise WeightsError(
            f"{path} is not a checkpoint: give the folder that holds {WEIGHTS_FILE} and "
            f"{TEXT_FILE}; weights of a backbone alone are --backbone-weights (backbone_weights)"
        )
    if path.is_dir():
        raise WeightsError(f"{path} holds no {TEXT_FILE}, and neither do its best/ and last/")
    raise WeightsError(f"there is no checkpoint {path}: give a run or checkpoint folder")


def _candidates(folder: Path) -> Iterator[Path]:
    """Yield the folders in which a run or checkpoint folder may have its checkpoint."""
    yield from map(readable_folder, (folder, folder / "best", folder / "last"))


def _read(folder: Path) -> Checkpoint:
    for name in (TEXT_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise WeightsError(f"incomplete checkpoint {folder}: it has no {name}")
        try:
            (folder / name).open("rb").close()  # safetensors reports any failure as a missing file
        except OSError as error:
            raise WeightsError(f"{folder / name} cannot be read: {error.strerror}") from None
    file = folder / TEXT_FILE
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} is not JSON: {error}") from None
    text = parse_text(values, file, FORMAT, FORMAT_VERSION)
    try:
        state = load_file(str(folder / WEIGHTS_FILE))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{folder / WEIGHTS_FILE} is no safetensors file: {error}") from None
    try:
        # Built without memory, so that a text that asks for too much is rejected first. (timm
        # computes tables while it builds a network, which need memory.)
        on_meta = not text.spec.backbone.startswith("timm/") and not any(
            map(is_own, (text.spec.backbone, text.spec.head))
        )
        with torch.device("meta" if on_meta else "cpu"):
            model = RetinaNet(len(text.classes), text.spec)
    except MissingExtraError:
        raise
    except (ConfigError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{file}: invalid model configuration: {error}") from None
    check_state(model.state_dict(), state, f"weights of {folder}")
    model.load_state_dict(state, strict=False, assign=True)
    model.float()
    model.set_pixel_statistics()
    return Checkpoint(
        to_channels_last(model),
        text.classes,
        text.category_ids,
        text.image_size,
        text.max_size,
        text.info,
    )


def checkpoint_text(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of model.json; the number of classes follows from their names."""
    spec = checkpoint.model.spec.model_dump()
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
        "network": {key: spec[key] for key in NETWORK},
        "info": checkpoint.info,
    }


class CheckpointText(NamedTuple):
    """The validated content of model.json; attributes as of :class:`Checkpoint`."""

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    image_size: int
    max_size: int
    spec: ModelSpec
    info: dict[str, Any]


class _Preprocessing(BaseModel):
    image_size: PositiveInt
    max_size: PositiveInt
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]


class _Text(BaseModel):
    model_config = ConfigDict(strict=True)

    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    category_ids: tuple[int, ...]
    preprocessing: _Preprocessing
    anchors: dict[str, Any]
    network: dict[str, Any]
    info: dict[str, Any]


def parse_text(values: object, file: Path, kind: str, max_version: int) -> CheckpointText:
    """Validate the text of a checkpoint or an exported file."""
    if not isinstance(values, dict) or values.get("format") != kind:
        raise WeightsError(f'{file} is not a {kind}: it lacks "format": "{kind}"')
    version = values.get("version")
    if type(version) is not int or version > max_version:
        raise WeightsError(
            f"{file} has version {version!r}; this package reads up to {max_version}: upgrade it"
        )
    try:
        # As JSON, in which numbers are strictly numbers and lists may be tuples.
        text = _Text.model_validate_json(json.dumps(values))
        pixels = text.preprocessing.model_dump(include=set(PREPROCESSING))
        settings = pixels | text.anchors | text.network
        lists = {key: tuple(value) for key, value in settings.items() if isinstance(value, list)}
        spec = ModelSpec.model_validate(settings | lists, strict=True)
    except ValidationError as error:
        raise WeightsError(f"{file}: invalid model configuration: {explain(error)}") from None
    for section, keys in (("anchors", ANCHORS), ("network", NETWORK)):
        if odd := sorted((set(getattr(text, section)) | set(ADDED)) ^ (set(keys) | set(ADDED))):
            raise WeightsError(
                f"{file}: {section} has settings that are missing or unknown: {', '.join(odd)}"
            )
    if len(text.classes) != len(text.category_ids):
        raise WeightsError(
            f"{file}: {len(text.classes)} classes and {len(text.category_ids)} category_ids differ"
        )
    sizes = text.preprocessing.image_size, text.preprocessing.max_size
    return CheckpointText(text.classes, text.category_ids, *sizes, spec, text.info)


class TransferReport(NamedTuple):
    """The result of :func:`transfer_weights`.

    Attributes:
        loaded: names of the tensors that were copied whole.
        rows: classes whose rows of the class head were copied.
        lost: names of the tensors that only one of the models has, or has in another shape, and of
            the heads' last convolutions where the anchors of a cell, the channels or the head
            differ; not of rows of the class head whose class only one of them has.
    """

    loaded: tuple[str, ...]
    rows: tuple[str, ...]
    lost: tuple[str, ...]


def transfer_weights(
    model: RetinaNet,
    classes: Sequence[str],
    source: Checkpoint,
    synonyms: Mapping[str, str] | None = None,
) -> TransferReport:
    """Initialize a model with the weights of another, whose classes may differ.

    Tensors of the same name and shape are copied; where only one of the models has P2, its levels
    are those of the same stride. In the last convolution of the class head, the rows of classes
    with the same name are copied; the other classes keep their initialization.

    Args:
        model: changed in place.
        classes: its class names.
        source: the other model.
        synonyms: names in the other model of `classes` that have another name there.

    Raises:
        ValueError: the number of `classes` differs from the model's.
        WeightsError: nothing fits, or several classes of either model have the same name.
    """
    for what, names in (("the source", source.classes), ("the data", classes)):
        if repeated := repeated_names(names):
            raise WeightsError(
                f"rows of the class head are taken by class name, and {what} has several classes "
                f"named {', '.join(map(repr, repeated[:5]))}: rename or merge them"
            )
    if len(classes) != model.num_classes:
        raise ValueError(f"{len(classes)} class names for a model of {model.num_classes} classes")
    target = model.state_dict()
    shift = int(model.p2) - int(source.model.p2)
    given = {_shifted(name, shift): value for name, value in source.model.state_dict().items()}
    source_names = [(synonyms or {}).get(name, name) for name in classes]
    loaded: list[str] = []
    lost: list[str] = []
    same_anchors = _cell(model) == _cell(source.model)
    class_layer = f"class_head.{model.class_layer}."
    for name, tensor in target.items():
        is_last = name.startswith((class_layer, "box_head.last."))
        if name not in given or (is_last and not same_anchors):
            lost.append(name)
        elif name.startswith(class_layer):
            _copy_rows(tensor, given[name], source_names, source.classes)
        elif given[name].shape != tensor.shape:
            lost.append(name)
        else:
            tensor.copy_(given[name])
            loaded.append(name)
    lost += [name for name in given if name not in target]
    if not loaded:
        raise WeightsError("nothing of the source fits the model: their networks differ")
    pairs = zip(classes, source_names, strict=True) if same_anchors else ()
    rows = tuple(name for name, there in pairs if there in source.classes)
    return TransferReport(tuple(loaded), rows, tuple(lost))


def _shifted(name: str, levels: int) -> str:
    """Rename a tensor of the pyramid, whose levels count from P2 in one model and P3 in another."""
    match = re.fullmatch(r"(pyramid\.(?:lateral|output)\.)(\d+)(\..+)", name)
    return f"{match[1]}{int(match[2]) + levels}{match[3]}" if match else name


def _cell(model: RetinaNet) -> tuple[Any, ...]:
    spec = model.spec
    return model.anchors.scales, model.anchors.aspect_ratios, spec.channels, spec.head


def _copy_rows(
    target: Tensor, given: Tensor, classes: Sequence[str], source_classes: Sequence[str]
) -> None:
    """Copy rows a * K + k of the class head, whose first axis is anchors times classes."""
    to = target.view(-1, len(classes), *target.shape[1:])
    source = given.reshape(-1, len(source_classes), *given.shape[1:])
    for i, name in enumerate(classes):
        if name in source_classes:
            to[:, i] = source[:, source_classes.index(name)]
