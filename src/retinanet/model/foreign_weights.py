"""RetinaNets of torchvision, detectron2 and mmdetection: published ones, and files of their own.

Names and shapes of the tensors determine the network. The libraries differ in more than names:

- torchvision rounds anchors, and has 91 classes, of which 11 (the background, class 0, and ten ids
  that COCO does not use) are never trained; v1 was published with batch norm without epsilon.
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
from retinanet.model.backbone import IMAGENET_MEAN, check_state, fetch_state
from retinanet.model.retinanet import RetinaNet
from retinanet.model.weight_files import TensorFile, read_tensors

SUFFIXES = (".pth", ".pt", ".pkl")
"""Of files that :func:`load_foreign` reads."""

V1 = "torchvision/retinanet_resnet50_fpn"
V2 = "torchvision/retinanet_resnet50_fpn_v2"
PUBLISHED = {
    V1: "RetinaNet_ResNet50_FPN_Weights.COCO_V1",
    V2: "RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1",
}
"""torchvision's weights entries by name."""

SHORT_NAMES = {"coco": V2, "COCO_V1": V2, **{entry: name for name, entry in PUBLISHED.items()}}
"""Other names: short, and torchvision's of its entries."""

# torchvision's settings of its transform and its post-processing.
IMAGE_SIZE, MAX_SIZE = 800, 1333
DETECT: dict[str, Any] = {
    "score_threshold": 0.05,
    "topk_candidates": 1000,
    "nms_threshold": 0.5,
    "detections_per_image": 300,
    "class_agnostic_nms": False,
}

# A tensor that only a RetinaNet of this library has.
_SIGNS = {
    "torchvision": "head.classification_head.cls_logits.weight",
    "detectron2": "head.cls_score.weight",
    "mmdetection": "bbox_head.retina_cls.weight",
}
# Names of detectron2's buffers, whose values are read before.
_BUFFERS = re.compile(r"pixel_mean|pixel_std|anchor_generator\..*|.*num_batches_tracked")

# Our names of the tensors that determine the network and its input, and their dimensions.
_NEEDED = {
    "backbone.conv1.weight": 4,
    "backbone.bn1.running_var": 1,
    "backbone.layer1.0.conv2.weight": 4,
    "pyramid.lateral.0.weight": 4,
    "pyramid.p6.weight": 4,
    "class_head.last.bias": 1,
    "box_head.last.bias": 1,
}
# Names there and here. In older files of torchvision a block is one module less deep.
_TORCHVISION = (
    (r"backbone\.body\.(.+)", r"backbone.\1"),
    (r"backbone\.fpn\.inner_blocks\.(\d+)(?:\.0)?\.(weight|bias)", r"pyramid.lateral.\1.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d+)(?:\.0)?\.(weight|bias)", r"pyramid.output.\1.\2"),
    (r"backbone\.fpn\.extra_blocks\.(p6|p7)\.(weight|bias)", r"pyramid.\1.\2"),
    (r"head\.classification_head\.conv\.(\d+)\.([01])\.(\w+)", r"class_head.tower.\1.\2.\3"),
    (r"head\.regression_head\.conv\.(\d+)\.([01])\.(\w+)", r"box_head.tower.\1.\2.\3"),
    (r"head\.classification_head\.cls_logits\.(\w+)", r"class_head.last.\1"),
    (r"head\.regression_head\.bbox_reg\.(\w+)", r"box_head.last.\1"),
)
# In these the heads' convolutions have the even positions of their sequence.
_OLD_TOWER = re.compile(r"head\.(classification|regression)_head\.conv\.(\d+)\.(weight|bias)")
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


Loaded = tuple[RetinaNet, tuple[str, ...], tuple[int, ...], dict[str, Any]]
"""A model of another library, the names and ids of its classes, and its post-processing."""


def published_name(name: str | Path) -> str | None:
    """Return ``torchvision/NAME`` of a published detector; None: `name` names none."""
    text = name if isinstance(name, str) else name.as_posix()
    return SHORT_NAMES.get(text, text if text.startswith("torchvision/") else None)


def weights_entry(name: str) -> Any:
    """Return torchvision's weights entry of a key of ``PUBLISHED``."""
    import torchvision  # slow: it imports torch's compiler

    return torchvision.models.get_weight(PUBLISHED[name])


def fetch_torchvision(name: str) -> Loaded:
    """Download torchvision's COCO model, with the 80 classes in use of COCO's 91 ids.

    Raises:
        WeightsError: there is no such model, or it cannot be downloaded.
    """
    if name not in PUBLISHED:
        raise WeightsError(f"there is no {name}: choose {' or '.join(PUBLISHED)}")
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    state = fetch_state(
        weights_entry(name),
        f"download it where there is internet, and put the file into {cache} or give its path in "
        "place of the name",
    )
    return _with_classes(TensorFile(state, {}, {}), f"weights of {name}", is_v1=name == V1)


def load_foreign(file: Path) -> Loaded:
    """Load a RetinaNet of another library.

    The classes are COCO's where there are 80 (torchvision: 91), or those that mmdetection's file
    names; else their numbers.

    Raises:
        WeightsError: it is no such file, or its network is not one of :class:`RetinaNet`.
    """
    content = read_tensors(file, f"weights {file}")
    is_v1 = _library(content.state) == "torchvision" and _is_published(file, V1)
    return _with_classes(content, f"weights {file}", is_v1=is_v1)


def _with_classes(content: TensorFile, where: str, *, is_v1: bool) -> Loaded:
    model = convert(content, where, **({"norm_eps": 0.0} if is_v1 else {}))
    library = _library(content.state)
    classes, ids = _classes(library, content, model.num_classes)
    if len(ids) < model.num_classes:
        model = keep_classes(model, list(ids))
    limit = DETECT["detections_per_image"] if library == "torchvision" else 100
    return model, classes, ids, DETECT | {"detections_per_image": limit}


def convert(content: TensorFile, where: str, **settings: Any) -> RetinaNet:
    """Build the network of a file of another library, with all its classes.

    Args:
        content: the file.
        where: name of the file in messages.
        settings: fields of the network that the tensors do not determine.

    Raises:
        WeightsError: it is no such file, or its network is not one of :class:`RetinaNet`.
    """
    library = _library(content.state)
    if library is None:
        raise WeightsError(
            f"{where}: no RetinaNet of torchvision, detectron2 or mmdetection: no "
            f"{', '.join(_SIGNS.values())}; found {', '.join(list(content.state)[:3])}, ..."
        )
    version = str(content.meta.get("mmdet_version", ""))
    if version.startswith(("0.", "1.")):
        raise WeightsError(f"{where}: of mmdetection {version}, whose anchors are others")
    state = _rename(library, content.state)
    settings = {**_network(state, where), **settings}
    num_classes = state["class_head.last.bias"].numel() // 9
    with torch.device("meta"):  # shapes before values: those below are of the right shape
        check_state(RetinaNet(max(1, num_classes), **settings).state_dict(), state, where)
    if library == "torchvision":
        settings["rounding"] = "torchvision"
    else:
        settings |= _input(library, content.state, state, where)
        settings["p7_relu"] = library == "detectron2"
    if library == "detectron2":
        _order_by_ratio(state)
    model = RetinaNet(num_classes, **settings)
    model.load_state_dict(state, strict=False)
    return model


def keep_classes(model: RetinaNet, kept: list[int]) -> RetinaNet:
    """Return the same model with only the classes `kept`, in that order."""
    smaller = RetinaNet(len(kept), model.spec)
    state = model.state_dict()
    for key in ("class_head.last.weight", "class_head.last.bias"):
        rows = state[key].reshape(-1, model.num_classes, *state[key].shape[1:])
        state[key] = rows[:, kept].flatten(0, 1)
    smaller.load_state_dict(state)
    return smaller


def our_name(key: str) -> str:
    """Translate the name of a tensor of torchvision's RetinaNet."""
    if old := _OLD_TOWER.fullmatch(key):
        head = "class_head" if old[1] == "classification" else "box_head"
        return f"{head}.tower.{int(old[2]) // 2}.0.{old[3]}"
    return _translate(key, _TORCHVISION)


def _translate(key: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in names:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, ours, key)
    return key


def _library(state: Mapping[str, Tensor]) -> str | None:
    return next((name for name, sign in _SIGNS.items() if sign in state), None)


def _rename(library: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors our names."""
    if library == "torchvision":
        return {our_name(key): value.float() for key, value in state.items()}
    names = _DETECTRON2 if library == "detectron2" else _MMDETECTION
    levels = sum("lateral" in key and key.endswith("weight") for key in state)

    def rename(key: str) -> str:
        key = _translate(key, names)
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


def _network(state: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Read the settings of the network from the shapes of its tensors."""
    blocks = {match[1] for key in state if (match := re.match(r"backbone\.(layer\d\.\d+)\.", key))}
    depths = Counter(block.partition(".")[0] for block in blocks)
    convolutions = 3 if "backbone.layer1.0.conv3.weight" in state else 2
    missing = [
        name if name not in state else f"{name} of {ndim} dimensions (found {state[name].ndim})"
        for name, ndim in _NEEDED.items()
        if name not in state or state[name].ndim != ndim
    ]
    known = f"{where}: no RetinaNet on {', '.join(_RESNETS.values())}"
    if missing:
        raise WeightsError(f"{known}; missing: {', '.join(missing)}")
    groups = state["backbone.layer1.0.conv2.weight"].shape[1]
    kind = (tuple(depths[f"layer{i}"] for i in range(1, 5)), convolutions, groups)
    if kind not in _RESNETS:
        raise WeightsError(f"{known}: blocks {kind[0]}, {groups} channels per group")
    per_cell = state["box_head.last.bias"].numel() // 4
    if per_cell != 9:
        raise WeightsError(
            f"{where}: {per_cell} anchors per cell; supported are 3 scales x 3 ratios"
        )
    channels = state["pyramid.lateral.0.weight"].shape[0]
    towers = {match[1] for key in state if (match := re.match(r"class_head\.tower\.(\d+)", key))}
    settings: dict[str, Any] = {
        "backbone": _RESNETS[kind],
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
    library: str, given: Mapping[str, Tensor], state: dict[str, Tensor], where: str
) -> dict[str, Any]:
    """Read how images are normalized, and turn the first convolution from BGR to RGB.

    detectron2's file may state mean and deviation. Where it does not, batch norm's variance does:
    relative to the squared weights it is near 1 for normalized images, and 58^2 times as large
    where no deviation divides them, as with the MSRA weights.
    """
    mean, std = given.get("pixel_mean"), given.get("pixel_std")
    for name, tensor in (("pixel_mean", mean), ("pixel_std", std)):
        if tensor is not None and tensor.numel() != 3:
            raise WeightsError(f"{where}: {name} has {tensor.numel()} values, not 3")
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
            f"{where}: without pixel_mean the order of the colours is not known; add "
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
    library: str | None, content: TensorFile, num_classes: int
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
