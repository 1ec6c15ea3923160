"""RetinaNets trained with torchvision, detectron2 or mmdetection, from files of their own.

Names and shapes of the tensors determine the network. The libraries differ in more than names:

- torchvision rounds anchors, and counts the background as class 0.
- detectron2 orders a cell's anchors by scale first, and takes BGR images; with the original (MSRA)
  weights of ResNet it divides by no deviation, and a block's first convolution has the stride.
- mmdetection has no ReLU between P6 and P7; its "caffe" style is that of the MSRA weights.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retinanet.errors import WeightsError
from retinanet.model.backbone import IMAGENET_MEAN, check_state
from retinanet.model.retinanet import RetinaNet
from retinanet.model.torchvision_weights import (
    DETECT,
    IMAGE_SIZE,
    MAX_SIZE,
    TORCHVISION_MODELS,
    V1,
    V2,
    Loaded,
    keep_classes,
    our_name,
    weights_entry,
)
from retinanet.model.weight_files import TensorFile, read_tensors

SUFFIXES = (".pth", ".pt", ".pkl")
"""Of files that :func:`load_foreign` reads."""

# A tensor that only a RetinaNet of this library has.
_SIGNS = {
    "torchvision": "head.classification_head.cls_logits.weight",
    "detectron2": "head.cls_score.weight",
    "mmdetection": "bbox_head.retina_cls.weight",
}
# Names of detectron2's buffers, whose values are read before.
_BUFFERS = re.compile(r"pixel_mean|pixel_std|anchor_generator\..*|.*num_batches_tracked")

_DETECTRON2 = (
    (r"backbone\.bottom_up\.stem\.conv1\.weight", r"backbone.conv1.weight"),
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.(\w+)", r"backbone.bn1.\1"),
    (r"backbone\.bottom_up\.(res\d\.\d+\.)conv(\d)\.weight", r"backbone.\1conv\2.weight"),
    (r"backbone\.bottom_up\.(res\d\.\d+\.)conv(\d)\.norm\.(\w+)", r"backbone.\1bn\2.\3"),
    (r"backbone\.bottom_up\.(res\d\.\d+\.)shortcut\.weight", r"backbone.\1downsample.0.weight"),
    (r"backbone\.bottom_up\.(res\d\.\d+\.)shortcut\.norm\.(\w+)", r"backbone.\1downsample.1.\2"),
    (r"backbone\.fpn_(lateral|output)(\d)\.(\w+)", r"pyramid.\1.\2.\3"),
    (r"backbone\.top_block\.(p6|p7)\.(\w+)", r"pyramid.\1.\2"),
    (r"head\.cls_subnet\.(\d+)\.(\w+)", r"class_head.tower.\1.0.\2"),
    (r"head\.bbox_subnet\.(\d+)\.(\w+)", r"box_head.tower.\1.0.\2"),
    (r"head\.cls_score\.(\w+)", r"class_head.last.\1"),
    (r"head\.bbox_pred\.(\w+)", r"box_head.last.\1"),
)
_MMDETECTION = (
    (r"neck\.lateral_convs\.(\d)\.conv\.(\w+)", r"pyramid.lateral.\1.\2"),
    (r"neck\.fpn_convs\.(\d)\.conv\.(\w+)", r"pyramid.output.\1.\2"),
    (r"bbox_head\.cls_convs\.(\d+)\.conv\.(\w+)", r"class_head.tower.\1.0.\2"),
    (r"bbox_head\.cls_convs\.(\d+)\.gn\.(\w+)", r"class_head.tower.\1.1.\2"),
    (r"bbox_head\.reg_convs\.(\d+)\.conv\.(\w+)", r"box_head.tower.\1.0.\2"),
    (r"bbox_head\.reg_convs\.(\d+)\.gn\.(\w+)", r"box_head.tower.\1.1.\2"),
    (r"bbox_head\.retina_cls\.(\w+)", r"class_head.last.\1"),
    (r"bbox_head\.retina_reg\.(\w+)", r"box_head.last.\1"),
)

# Blocks of the four stages, three or two convolutions to a block, channels per group of the first.
_RESNETS: dict[tuple[tuple[int, ...], int, int], str] = {
    ((2, 2, 2, 2), 2, 64): "resnet18",
    ((3, 4, 6, 3), 2, 64): "resnet34",
    ((3, 4, 6, 3), 3, 64): "resnet50",
    ((3, 4, 23, 3), 3, 64): "resnet101",
    ((3, 8, 36, 3), 3, 64): "resnet152",
    ((3, 4, 23, 3), 3, 8): "resnext101_32x8d",
}


def load_foreign(file: Path) -> Loaded:
    """Load a RetinaNet of another library.

    The classes are COCO's where there are 80 (torchvision: 91), or those that mmdetection's file
    names; else their numbers.

    Args:
        file: a state dict, alone or within a training's file: torch's .pth or detectron2's .pkl.
    """
    content = read_tensors(file, f"weights {file}")
    library = next((name for name, sign in _SIGNS.items() if sign in content.state), None)
    if library is None:
        raise WeightsError(
            f"weights {file}: no RetinaNet of torchvision, detectron2 or mmdetection: no "
            f"{', '.join(_SIGNS.values())}; found {', '.join(list(content.state)[:3])}, ..."
        )
    version = str(content.meta.get("mmdet_version", ""))
    if version.startswith(("0.", "1.")):
        raise WeightsError(f"weights {file}: of mmdetection {version}, whose anchors are others")
    state = _rename(library, content.state)
    settings = _network(state, file)
    if library == "torchvision":
        settings["rounding"] = "torchvision"
        if "head_norm" not in settings and _is_published(file, V1):
            settings["norm_eps"] = TORCHVISION_MODELS[V1][1]["norm_eps"]
    else:
        settings |= _input(library, content.state, state, file)
        settings["p7_relu"] = library == "detectron2"
    if library == "detectron2":
        _order_by_ratio(state)
    num_classes = state["class_head.last.bias"].numel() // 9
    model = RetinaNet(num_classes, **settings)
    check_state(model.state_dict(), state, f"weights {file}")
    model.load_state_dict(state, strict=False)
    classes, ids = _classes(library, content, num_classes)
    if len(ids) < num_classes:
        model = keep_classes(model, list(ids))
    detect = DETECT if library == "torchvision" else DETECT | {"detections_per_image": 100}
    return Loaded(model, classes, ids, IMAGE_SIZE, MAX_SIZE, detect)


def _rename(library: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors our names."""
    if library == "torchvision":
        return {our_name(key): value.float() for key, value in state.items()}
    pairs = _DETECTRON2 if library == "detectron2" else _MMDETECTION
    levels = sum("lateral" in key and key.endswith("weight") for key in state)

    def rename(key: str) -> str:
        for pattern, ours in pairs:
            if re.fullmatch(pattern, key):
                key = re.sub(pattern, ours, key)
                break
        key = re.sub(r"\.res(\d)\.", lambda stage: f".layer{int(stage[1]) - 1}.", key)
        if library == "detectron2":
            # Levels count from P2 or P3, and convolutions of a head with the ReLUs between them.
            first = 6 - levels
            key = re.sub(r"(lateral|output)\.(\d)", lambda m: f"{m[1]}.{int(m[2]) - first}", key)
            return re.sub(r"tower\.(\d+)\.", lambda m: f"tower.{int(m[1]) // 2}.", key)
        extra = {f"pyramid.output.{levels + i}.": f"pyramid.p{6 + i}." for i in range(2)}
        for prefix, ours in extra.items():
            key = ours + key.removeprefix(prefix) if key.startswith(prefix) else key
        return key

    kept = {key: value.float() for key, value in state.items() if not _BUFFERS.fullmatch(key)}
    return {rename(key): value for key, value in kept.items()}


def _network(state: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """Read the settings of the network from the shapes of its tensors."""
    blocks = {match[1] for key in state if (match := re.match(r"backbone\.(layer\d\.\d+)\.", key))}
    depths = Counter(block.partition(".")[0] for block in blocks)
    convolutions = 3 if "backbone.layer1.0.conv3.weight" in state else 2
    conv2 = state.get("backbone.layer1.0.conv2.weight", torch.empty(0, 0))
    kind = (tuple(depths[f"layer{i}"] for i in range(1, 5)), convolutions, conv2.shape[1])
    backbone = _RESNETS.get(kind)
    needed = ("pyramid.lateral.0.weight", "pyramid.p6.weight", "box_head.last.bias")
    if backbone is None or any(name not in state for name in needed):
        raise WeightsError(
            f"weights {file}: no RetinaNet on {', '.join(_RESNETS.values())}: blocks "
            f"{kind[0]}, {kind[2]} channels per group"
        )
    per_cell = state["box_head.last.bias"].numel() // 4
    if per_cell != 9:
        raise WeightsError(
            f"weights {file}: {per_cell} anchors per cell; supported are 3 scales x 3 ratios"
        )
    channels = state["pyramid.lateral.0.weight"].shape[0]
    towers = {match[1] for key in state if (match := re.match(r"class_head\.tower\.(\d+)", key))}
    settings: dict[str, Any] = {
        "backbone": backbone,
        "channels": channels,
        "head_depth": len(towers),
        "p2": "pyramid.lateral.3.weight" in state,
        "p6_from": "p5" if state["pyramid.p6.weight"].shape[1] == channels else "c5",
    }
    if "class_head.tower.0.1.weight" in state:
        settings["head_norm"] = "group"
    return settings


def _is_published(file: Path, name: str) -> bool:
    """Compare the file's hash with that in the name of torchvision's published file."""
    prefix = Path(weights_entry(name).url).stem.rpartition("-")[2]
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest().startswith(prefix)


def _input(
    library: str, given: Mapping[str, Tensor], state: dict[str, Tensor], file: Path
) -> dict[str, Any]:
    """Read how images are normalized, and turn the first convolution from BGR to RGB.

    detectron2's file may state mean and deviation. Where it does not, batch norm's variance does:
    relative to the squared weights it is near 1 for normalized images, and 58^2 times as large
    where no deviation divides them, as with the MSRA weights.
    """
    mean, std = given.get("pixel_mean"), given.get("pixel_std")
    first = state["backbone.conv1.weight"]
    if std is not None:
        msra = bool((std == 1).all())
    else:
        ratio = state["backbone.bn1.running_var"] / first.square().sum((1, 2, 3))
        msra = float(ratio.median()) > 10
    if library == "mmdetection" or (msra and mean is None):
        is_bgr, values = msra, IMAGENET_MEAN
    elif mean is None:
        raise WeightsError(
            f"weights {file}: without pixel_mean the order of the colours is not known; add "
            "pixel_mean and pixel_std of the configuration to the file's tensors"
        )
    else:
        is_bgr = bool(mean.flatten()[0] < mean.flatten()[2])
        red, green, blue = mean.flatten().flip(0).tolist() if is_bgr else mean.flatten().tolist()
        values = (red, green, blue)
    settings: dict[str, Any] = {"pixel_mean": values}
    if is_bgr:
        state["backbone.conv1.weight"] = first.flip(1)
    if msra:
        settings |= {"pixel_std": (1.0, 1.0, 1.0), "stride_in_1x1": True}
    elif std is not None:
        deviations = std.flatten().flip(0) if is_bgr else std.flatten()
        settings["pixel_std"] = tuple(deviations.tolist())
    return settings


def _order_by_ratio(state: dict[str, Tensor]) -> None:
    """Reorder a cell's anchors, from scales x ratios (detectron2) to ratios x scales."""
    for name in ("class_head.last", "box_head.last"):
        for leaf in ("weight", "bias"):
            rows = state[f"{name}.{leaf}"]
            anchors = rows.reshape(3, 3, -1, *rows.shape[1:])
            state[f"{name}.{leaf}"] = anchors.transpose(0, 1).reshape(rows.shape)


def _classes(
    library: str, content: TensorFile, num_classes: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return names and ids of the classes that are kept."""
    names = weights_entry(V2).meta["categories"]
    coco = {i: name for i, name in enumerate(names) if name not in ("__background__", "N/A")}
    if num_classes == (len(names) if library == "torchvision" else len(coco)):
        return tuple(coco.values()), tuple(coco)
    dataset = content.meta.get("dataset_meta", content.meta)
    stated = dataset.get("classes", dataset.get("CLASSES")) if isinstance(dataset, dict) else None
    if isinstance(stated, list | tuple) and len(stated) == num_classes:
        return tuple(map(str, stated)), tuple(range(num_classes))
    return tuple(map(str, range(num_classes))), tuple(range(num_classes))
