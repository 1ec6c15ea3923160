"""Values that packages exchange: the outputs of the model, its targets, batches, detections.

Letters in shapes: B images, L levels, A anchors per cell, R anchors in total, K classes, N boxes,
M objects, H and W rows and columns. Boxes are always (x1, y1, x2, y2) in pixels, width = x2 - x1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, NamedTuple, Self, overload

import torch
from torch import Tensor
from torch.nn import functional as F

BACKGROUND = -1
"""Label or match of an anchor without an object; as the label of an object: padding."""

IGNORED = -2
"""Label or match that is neither object nor background: a crowd, an IoU in between."""

_SHOWN_OBJECTS, _SHOWN_CLASSES = 10, 5  # of detections that are printed


class Outputs(NamedTuple):
    """Outputs of the network for a batch, by level in the heads' layout.

    ``logits[l]``: (B, A * K, H_l, W_l), channel ``a * K + k``; ``deltas[l]``: (B, A * 4, H_l, W_l),
    channel ``a * 4 + i``; with ``box_bins`` n also ``distributions[l]``: (B, A * 4 * (n + 1), H_l,
    W_l), channel ``(a * 4 + side) * (n + 1) + bin``, the logits whose expectation the deltas are,
    which only the loss needs. In channels_last memory :func:`flatten_level` is a view, not a copy.
    """

    logits: tuple[Tensor, ...]
    deltas: tuple[Tensor, ...]
    distributions: tuple[Tensor, ...] = ()


def flatten_level(level: Tensor, last: int) -> Tensor:
    """Reshape (B, A * last, H, W) to (B, H * W * A, last), in the order of the anchors."""
    batch = level.shape[0]
    return level.permute(0, 2, 3, 1).reshape(batch, -1, last)


def flatten_levels(levels: tuple[Tensor, ...] | list[Tensor], last: int) -> Tensor:
    """Join levels (B, A * last, H_l, W_l) to (B, R, last), in the order of the anchors."""
    return torch.cat([flatten_level(level, last) for level in levels], dim=1)


@dataclass(frozen=True, slots=True)
class Targets:
    """The objects of a batch, padded to the largest number per image.

    Attributes:
        boxes: (B, M, 4) float32 pixels of the network's input; padding rows are zero.
        labels: (B, M) int64: class 0..K-1; IGNORED for a region that is neither object nor
            background (a crowd); BACKGROUND for padding.
    """

    boxes: Tensor
    labels: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Targets:
        """Return the targets on `device`."""
        return Targets(
            self.boxes.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
        )


def pad_targets(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Targets:
    """Pad boxes (M_i, 4) and labels (M_i,) of each image to :class:`Targets`.

    Raises:
        ValueError: images, boxes and labels differ in number.
    """
    if len(boxes) != len(labels):
        raise ValueError(f"boxes of {len(boxes)} images, and labels of {len(labels)}")
    objects = max(map(len, labels), default=0)
    padded_boxes = torch.zeros(len(labels), objects, 4, dtype=torch.float32)
    padded_labels = torch.full((len(labels), objects), BACKGROUND, dtype=torch.int64)
    for i, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
        if len(image_boxes) != len(image_labels):  # one box would be broadcast
            raise ValueError(f"image {i}: {len(image_boxes)} boxes, {len(image_labels)} labels")
        padded_boxes[i, : len(image_labels)] = image_boxes
        padded_labels[i, : len(image_labels)] = image_labels
    return Targets(padded_boxes, padded_labels)


@dataclass(frozen=True, slots=True)
class Batch:
    """Input of the network: images and their objects.

    Attributes:
        images: (B, 3, H, W) uint8 RGB, padded at the right and the bottom.
        targets: objects in the pixels of `images`.
        sizes: (B, 2) int64 height and width of each image before padding.
        original_sizes: (B, 2) int64 height and width of the upright image on disk.
        indices: (B,) int64 index of each image in its dataset.
    """

    images: Tensor
    targets: Targets
    sizes: Tensor
    original_sizes: Tensor
    indices: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch with images and targets on `device`; sizes and indices stay."""
        return Batch(
            self.images.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
            self.sizes,
            self.original_sizes,
            self.indices,
        )

    def pin_memory(self) -> Batch:
        """Copy to pinned memory (for the DataLoader), so that copies to a GPU can overlap."""
        pinned = Targets(self.targets.boxes.pin_memory(), self.targets.labels.pin_memory())
        return Batch(
            self.images.pin_memory(), pinned, self.sizes, self.original_sizes, self.indices
        )


def concatenate_batches(batches: Sequence[Batch]) -> Batch:
    """Join batches whose images are padded to the same height and width."""
    if len(batches) == 1:
        return batches[0]
    largest = max(batch.targets.labels.shape[1] for batch in batches)
    boxes, labels = [], []
    for batch in batches:
        missing = largest - batch.targets.labels.shape[1]
        boxes.append(F.pad(batch.targets.boxes, (0, 0, 0, missing)))
        labels.append(F.pad(batch.targets.labels, (0, missing), value=BACKGROUND))
    return Batch(
        torch.cat([batch.images for batch in batches]),
        Targets(torch.cat(boxes), torch.cat(labels)),
        torch.cat([batch.sizes for batch in batches]),
        torch.cat([batch.original_sizes for batch in batches]),
        torch.cat([batch.indices for batch in batches]),
    )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Detections:
    """Detections of an image, best first.

    ``found[found.scores > 0.5]``, ``found[:10]`` and ``found["car"]`` select objects;
    ``for box, score, label in found`` iterates over them, and ``found[0]`` is the best.

    Attributes:
        boxes: (N, 4) float32 (x1, y1, x2, y2) pixels.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64 class 0..K-1.
        classes: names by label; empty: unknown.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[tuple[Tensor, float, int]]:
        """Yield box (4,), score and label of each object."""
        return zip(self.boxes, self.scores.tolist(), self.labels.tolist(), strict=True)

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, float, int]: ...

    @overload
    def __getitem__(self, index: str | slice | Tensor | Sequence[Any]) -> Self: ...

    def __getitem__(self, index: Any) -> Self | tuple[Tensor, float, int]:
        """Return an object, as iteration does, or select some.

        Args:
            index: a position; or a slice, a mask (N,), indices, or a class name or several.

        Raises:
            KeyError: there is no class of that name, or the class names are unknown.
            IndexError: a position is out of range, or a mask has another length.
        """
        if isinstance(index, int) or (hasattr(index, "ndim") and index.ndim == 0):  # NumPy's, too
            index = int(index)
            return self.boxes[index], float(self.scores[index]), int(self.labels[index])
        names = [index] if isinstance(index, str) else index
        if isinstance(names, list | tuple) and names and all(isinstance(n, str) for n in names):
            labels = [label for name in names for label in self._labels_of(name)]
            index = torch.isin(self.labels, self.labels.new_tensor(labels))
        elif not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.scores.device)
            index = index if len(index) else index.long()
        return replace(
            self, boxes=self.boxes[index], scores=self.scores[index], labels=self.labels[index]
        )

    def _labels_of(self, name: str) -> list[int]:
        labels = [label for label, known in enumerate(self.classes) if known == name]
        if not labels:
            known = "unknown class names" if not self.classes else ", ".join(self.classes[:8])
            near = get_close_matches(name, self.classes, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "select by label: found.labels == 0"
            raise KeyError(f"no class {name!r}: found {known}; {hint}")
        return labels

    def to(self, device: torch.device | str) -> Self:
        """Return the detections with boxes, scores and labels on `device`."""
        return replace(
            self,
            boxes=self.boxes.to(device),
            scores=self.scores.to(device),
            labels=self.labels.to(device),
        )

    def name_of(self, label: int) -> str:
        """Return the name of a class, or its number where the names are unknown."""
        return self.classes[label] if self.classes else str(label)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()})"

    def summary(self) -> str:
        """Describe the detections in a few words: number, classes, range of the scores."""
        if not len(self):
            return "no objects"
        counts = Counter(map(self.name_of, self.labels.tolist())).most_common()
        named = ", ".join(f"{count} {name}" for name, count in counts[:_SHOWN_CLASSES])
        more = f", {len(counts) - _SHOWN_CLASSES} more classes" * (len(counts) > _SHOWN_CLASSES)
        low, high = self.scores.min(), self.scores.max()
        objects = "1 object" if len(self) == 1 else f"{len(self)} objects"
        return f"{objects}: {named}{more}; scores {low:.2f} to {high:.2f}"

    def __str__(self) -> str:
        lines = [repr(self)]
        for box, score, label in self[:_SHOWN_OBJECTS]:
            corners = ", ".join(f"{side:.1f}" for side in box.tolist())
            lines.append(f"  {self.name_of(label)} {score:.2f} ({corners})")
        if len(self) > _SHOWN_OBJECTS:
            lines.append(f"  and {len(self) - _SHOWN_OBJECTS} more")
        return "\n".join(lines)


def is_eager() -> bool:
    """Return False under ``torch.compile`` and inside ``torch.func`` transforms.

    There tensors may have no values, and no memory of their own.
    """
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def is_readable(values: Tensor) -> bool:
    """Return True if Python may read the values without a device sync: eager, and on the CPU."""
    return values.device.type == "cpu" and is_eager()
