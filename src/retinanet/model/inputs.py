"""Images and targets in the forms of PyTorch programs, to the input of the network.

Values are checked here, and not in ``RetinaNet.forward``: reading them is a device sync for images
and targets on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from retinanet.structures import IGNORED, Targets, is_eager, pad_targets

_IMAGES = "images are a tensor (B, 3, H, W) or a list of tensors (3, h, w)"
_FORM = 'a list with {"boxes": (M, 4), "labels": (M,)} per image'

# Resampling overshoots 255 by less than this; 16-bit images do not.
_MAX_VALUE = 510
# Over the highest value of an image that is normalized by mean and standard deviation.
_MAX_NORMALIZED = 10


def batch_images(
    images: Tensor | Sequence[Tensor], fill: Tensor, divisor: int
) -> tuple[Tensor, Tensor]:
    """Stack images, padded at the right and the bottom.

    Args:
        images: (B, 3, H, W), or B tensors (3, h, w) of any sizes: uint8, or float 0..255, RGB.
        fill: (3, 1, 1) colour of the padding, on the device that the batch is needed on.
        divisor: height and width of the batch are multiples of it.

    Returns:
        (B, 3, H, W) on the device of `fill`, and (B, 2) int64 heights and widths before padding.
    """
    if not isinstance(images, Tensor | Sequence) or len(images) == 0:
        raise ValueError(f"{_IMAGES}: found {_describe(images)}")
    for image in images:
        if isinstance(image, Tensor) and image.dim() == 3 and len(image) == 3 and image.numel():
            continue
        found = images if isinstance(images, Tensor) else image
        if not isinstance(found, Tensor):
            advice = "convert it: torch.from_numpy(np.array(image)).permute(2, 0, 1)"
        elif found is images and found.dim() == 3:
            advice = "of a single image give image[None]"
        else:
            advice = "three channels come first, and no side is 0"
        raise ValueError(f"{_IMAGES}: found {_describe(found)}; {advice}")
    dtypes = {image.dtype for image in images}
    if len(dtypes) > 1 or not all(d == torch.uint8 or d.is_floating_point for d in dtypes):
        raise ValueError(
            f"images are all uint8 or all of a float type with values 0..255: found "
            f"{', '.join(sorted(map(str, dtypes)))}; convert them"
        )
    check_values(images)
    sizes = torch.tensor([tuple(image.shape[1:]) for image in images], dtype=torch.int64)
    height, width = (-(-side // divisor) * divisor for side in sizes.amax(dim=0).tolist())
    if isinstance(images, Tensor) and images.shape[2:] == (height, width):
        return images.to(fill.device), sizes
    colour = fill.round().to(images[0].dtype)
    batch = colour.expand(len(images), 3, height, width).clone()
    for padded, image in zip(batch, images, strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = image
    return batch.contiguous(memory_format=torch.channels_last), sizes


def _describe(value: Any) -> str:
    shape = f" {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"{type(value).__name__}{shape}"


def check_values(images: Tensor | Sequence[Tensor]) -> None:
    """Raise ValueError for float images that are not 0..255; a batch of zeros is accepted.

    Images under ``torch.compile`` and in ``torch.func`` transforms have no values to check.
    """
    if not images[0].is_floating_point() or not is_eager():
        return
    ends = torch.stack([torch.stack(image.detach().aminmax()) for image in images])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    if math.isnan(low):
        advice = "replace NaN"
    elif high > _MAX_VALUE:
        advice = "scale them to 0..255"
    elif low < 0 and high < _MAX_NORMALIZED:
        advice = "pass them before they are normalized"
    elif 0 < high <= 1:
        advice = "multiply by 255, or pass uint8"
    else:
        return
    raise ValueError(
        f"float images are RGB of 0..255: found values {low:.3g} to {high:.3g}; {advice}"
    )


def batch_targets(
    targets: Targets | Sequence[Mapping[str, Any]], num_images: int, num_classes: int
) -> Targets:
    """Convert targets of torchvision's form; :class:`Targets` are returned as they are.

    Args:
        targets: for each image a mapping with ``boxes`` (M, 4) x1, y1, x2, y2 in pixels and
            ``labels`` (M,): 0..K-1, without a background class, or IGNORED.
        num_images: B.
        num_classes: K.
    """
    if isinstance(targets, Targets):
        return targets
    if not isinstance(targets, Sequence) or not all(isinstance(t, Mapping) for t in targets):
        raise ValueError(f"targets are {_FORM}: found {type(targets).__name__}; wrap a single one")
    if len(targets) != num_images:
        raise ValueError(f"targets are {_FORM}: found {len(targets)} for {num_images} images")
    boxes, labels = [], []
    for index, target in enumerate(targets):
        missing = [name for name in ("boxes", "labels") if name not in target]
        if missing:
            raise ValueError(
                f"targets are {_FORM}: that of image {index} has no {' and no '.join(missing)}, "
                f"only {', '.join(map(str, target)) or 'nothing'}"
            )
        corners, classes = (torch.as_tensor(target[name]) for name in ("boxes", "labels"))
        if not classes.numel():
            corners, classes = corners.reshape(-1, 4), classes.long()
        if corners.shape != (*classes.shape, 4) or classes.dim() != 1:
            raise ValueError(
                f"targets are {_FORM}: that of image {index} has boxes {tuple(corners.shape)} and "
                f"labels {tuple(classes.shape)}"
            )
        if classes.is_floating_point() or classes.dtype == torch.bool:
            raise ValueError(f"labels of image {index} are integers: found {classes.dtype}")
        boxes.append(corners)
        labels.append(classes)
    if boxes:
        _check_objects(torch.cat(boxes), torch.cat(labels), num_classes)
    return pad_targets(boxes, labels)


def _check_objects(boxes: Tensor, labels: Tensor, num_classes: int) -> None:
    boxes, labels = boxes.detach().cpu(), labels.cpu()
    good = boxes.isfinite().all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    if not good.all():
        raise ValueError(
            f"boxes are x1, y1, x2, y2 with x1 < x2 and y1 < y2: found {boxes[~good][0].tolist()}; "
            "convert x, y, width, height with torchvision.ops.box_convert, and drop empty boxes"
        )
    if len(boxes) and boxes.max() <= 1:
        raise ValueError(
            f"boxes are in pixels: found none over {float(boxes.max()):.3g}; multiply fractions by "
            "width and height"
        )
    known = (labels == IGNORED) | (labels >= 0) & (labels < num_classes)
    if not known.all():
        raise ValueError(
            f"labels are 0..{num_classes - 1}: found {int(labels[~known][0])}; there is no "
            "background class, so subtract 1 from labels that start at 1"
        )
