"""torchvision's RetinaNet weights, loaded into models of this package.

The networks differ in names, and in torchvision's choices: anchors rounded to whole pixels; 91
classes, of which 11 (the background and ten ids that COCO does not use) are never trained; v1
computes P6 from P5, and its published weights have batch norm without epsilon; v2 computes P6 from
C5 and has group norm in the heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retinanet.errors import WeightsError
from retinanet.model.backbone import check_state, fetch_state
from retinanet.model.retinanet import RetinaNet

V1 = "torchvision/retinanet_resnet50_fpn"
V2 = "torchvision/retinanet_resnet50_fpn_v2"
TORCHVISION_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    V1: (
        "RetinaNet_ResNet50_FPN_Weights.COCO_V1",
        {"p6_from": "p5", "head_norm": "none", "norm_eps": 0.0},
    ),
    V2: (
        "RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1",
        {"p6_from": "c5", "head_norm": "group", "norm_eps": 1e-5},
    ),
}
"""Name of torchvision's weights entry, and settings that differ from this package's."""
SHORT_NAMES = {
    "coco": V2,
    "COCO_V1": V2,
    **{entry: name for name, (entry, _) in TORCHVISION_MODELS.items()},
}
"""Other names: short, and torchvision's of its entries (``RetinaNet_.._V2_Weights.COCO_V1``)."""

# torchvision's settings of its transform and its post-processing.
IMAGE_SIZE, MAX_SIZE = 800, 1333
DETECT: dict[str, Any] = {
    "score_threshold": 0.05,
    "topk_candidates": 1000,
    "nms_threshold": 0.5,
    "detections_per_image": 300,
    "class_agnostic_nms": False,
}


class Loaded(NamedTuple):
    """A model of torchvision's with its classes and settings."""

    model: RetinaNet
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    image_size: int
    max_size: int
    detect: Mapping[str, Any]


def published_name(name: str | Path) -> str | None:
    """Return ``torchvision/NAME`` of a published detector; None: `name` names none."""
    text = name if isinstance(name, str) else name.as_posix()
    return SHORT_NAMES.get(text, text if text.startswith("torchvision/") else None)


def weights_entry(name: str) -> Any:
    """Return torchvision's weights entry of a key of ``TORCHVISION_MODELS``."""
    import torchvision  # slow: it imports torch's compiler

    return torchvision.models.get_weight(TORCHVISION_MODELS[name][0])


def fetch_torchvision(name: str) -> Loaded:
    """Download torchvision's COCO model with the 80 classes in use of COCO's 91 ids.

    The rows of the unused classes are dropped; the logits of the others are torchvision's.
    """
    if name not in TORCHVISION_MODELS:
        raise WeightsError(f"there is no {name}: choose {' or '.join(TORCHVISION_MODELS)}")
    entry = weights_entry(name)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    state = fetch_state(
        entry,
        f"download it where there is internet, and put the file into {cache} or give its path in "
        "place of the name",
    )
    names = entry.meta["categories"]
    model = from_torchvision(name, state, num_classes=len(names))
    ids = [i for i, label in enumerate(names) if label not in ("__background__", "N/A")]
    classes = tuple(names[i] for i in ids)
    return Loaded(keep_classes(model, ids), classes, tuple(ids), IMAGE_SIZE, MAX_SIZE, DETECT)


def from_torchvision(
    name: str, state: Mapping[str, Tensor], *, num_classes: int, norm_eps: float | None = None
) -> RetinaNet:
    """Build a model with the weights of a torchvision state dict.

    Args:
        name: key of ``TORCHVISION_MODELS``.
        state: names and tensors, as written by any release of torchvision.
        num_classes: including torchvision's background.
        norm_eps: of batch norm; None: that of torchvision's published weights. A v1 that was
            built without them has 1e-5.
    """
    settings = dict(TORCHVISION_MODELS[name][1])
    if norm_eps is not None:
        settings["norm_eps"] = norm_eps
    model = RetinaNet(num_classes, backbone="resnet50", rounding="torchvision", **settings)
    renamed = {our_name(key): value for key, value in state.items()}
    check_state(model.state_dict(), renamed, f"weights of {name}")
    model.load_state_dict(renamed, strict=False)
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


# torchvision's name -> ours. In older files a block is one module less deep, and the heads'
# convolutions have the even positions of their sequence.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"backbone\.body\.(.+)", r"backbone.\1"),
    (r"backbone\.fpn\.inner_blocks\.(\d+)(?:\.0)?\.(weight|bias)", r"pyramid.lateral.\1.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d+)(?:\.0)?\.(weight|bias)", r"pyramid.output.\1.\2"),
    (r"backbone\.fpn\.extra_blocks\.(p6|p7)\.(weight|bias)", r"pyramid.\1.\2"),
    (
        r"head\.classification_head\.conv\.(\d+)\.([01])\.(weight|bias)",
        r"class_head.tower.\1.\2.\3",
    ),
    (r"head\.regression_head\.conv\.(\d+)\.([01])\.(weight|bias)", r"box_head.tower.\1.\2.\3"),
    (r"head\.classification_head\.cls_logits\.(weight|bias)", r"class_head.last.\1"),
    (r"head\.regression_head\.bbox_reg\.(weight|bias)", r"box_head.last.\1"),
)
_OLD_TOWER = re.compile(r"head\.(classification|regression)_head\.conv\.(\d+)\.(weight|bias)")


def our_name(key: str) -> str:
    """Translate the name of a tensor of torchvision's RetinaNet."""
    if old := _OLD_TOWER.fullmatch(key):
        head = "class_head" if old[1] == "classification" else "box_head"
        return f"{head}.tower.{int(old[2]) // 2}.0.{old[3]}"
    for pattern, ours in _NAMES:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, ours, key)
    return key
