"""The detector as one traceable graph: images of any size in, boxes in their pixels out.

:mod:`retinanet.data.images` and :mod:`retinanet.postprocess` define resizing and post-processing.
Here they are written for ``torch.export``: tensors of fixed rank, detections padded to a fixed
number. Tests compare the two.
"""

from __future__ import annotations

import math
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from retinanet.anchors import anchor_grid, cell_anchors
from retinanet.boxes import clip_boxes, decode_boxes
from retinanet.data.images import padding_colour
from retinanet.errors import ConfigError
from retinanet.inference.backends import Thresholds, merge_thresholds, to_original
from retinanet.inference.detector import Detector
from retinanet.inference.exported import TEXT_KEY
from retinanet.inference.openvino_backend import any_size, quiet
from retinanet.model.fused import fused_copy
from retinanet.structures import Outputs, flatten_level

PADDING_LABEL = -1
"""Label of the rows after the last detection."""

OUTPUTS = {"detections": ("boxes", "scores", "labels", "count"), "scores": ("boxes", "scores")}
"""Names of the outputs by form."""

MAX_BATCH, MAX_SIDE = 4096, 65535

_NO_SCORE = -1.0  # of an empty candidate; scores are 0 or more


class DetectorGraph(nn.Module):
    """Resizing, network and post-processing as one module."""

    colour: Tensor

    def __init__(self, detector: Detector, to: str, **thresholds: Unpack[Thresholds]) -> None:
        super().__init__()
        self.network = fused_copy(detector.model, torch.float32, pack=False)
        self.image_size, self.max_size = detector.image_size, detector.max_size
        self.size = symbolic_network_size if to == "aotinductor" else network_size
        in_engine = to in ("onnx", "openvino")
        self.suppress = suppress_by_engine if in_engine else suppress_by_torchvision
        used = merge_thresholds(detector.eval_thresholds, thresholds)
        self.topk_candidates = used["topk_candidates"]
        self.detections_per_image = used["detections_per_image"]
        threshold = used["score_threshold"]
        self.temperature = used["temperature"]
        self.min_logit = -math.inf
        if threshold:
            self.min_logit = self.temperature * math.log(threshold / (1 - threshold))
        self.suppression: dict[str, Any] = {
            "classes": 1 if used["class_agnostic_nms"] else self.network.num_classes,
            "threshold": used["nms_threshold"],
            "max_boxes": self.detections_per_image,
            "side": self.max_size,
        }
        colour = torch.tensor(padding_colour(self.network.pixel_mean), dtype=torch.float32)
        self.register_buffer("colour", colour.view(3, 1, 1), persistent=False)
        for level, root in enumerate(self.network.anchors.sizes):
            cell = cell_anchors(self.network.anchors, root).float()
            self.register_buffer(f"cell_{level}", cell, persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect objects.

        Args:
            images: (B, 3, H, W) uint8 RGB, images of one size before resizing.

        Returns:
            (B, D, 4) float32 boxes in pixels of the images, (B, D) float32 scores, (B, D) int64
            labels, best first, D = ``detections_per_image``, and (B,) int64 number of detections;
            in the rows after them boxes and scores are 0, labels :data:`PADDING_LABEL`.
        """
        padded, size, original = self.prepare(images)
        candidates = [
            best_of_level(*level, self.min_logit, self.topk_candidates)
            for level in self.levels(self.network(padded), padded)
        ]
        logits, labels, deltas, anchors = (
            torch.cat(parts, dim=1) for parts in zip(*candidates, strict=True)
        )
        boxes = clip_boxes(decode_boxes(deltas, anchors), size)
        scores = torch.where(logits > -math.inf, self.scores(logits), _NO_SCORE)
        kept = self.suppress(boxes, scores, labels, **self.suppression)
        scores = torch.where(kept, scores, _NO_SCORE)
        missing = self.detections_per_image - scores.shape[1]
        if missing > 0:  # fewer candidates than detections per image; known when tracing
            scores = F.pad(scores, (0, missing), value=_NO_SCORE)
            boxes, labels = F.pad(boxes, (0, 0, 0, missing)), F.pad(labels, (0, missing))
        scores, best = scores.topk(self.detections_per_image, dim=1)
        boxes = boxes.gather(1, best[:, :, None].expand(-1, -1, 4))
        valid = scores > _NO_SCORE
        return (
            to_original(boxes, size, original) * valid[:, :, None],
            scores.clamp(min=0),
            torch.where(valid, labels.gather(1, best), PADDING_LABEL),
            valid.sum(dim=1),
        )

    def prepare(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Resize and pad.

        Returns:
            (B, 3, h, w) float32 0..255, h and w multiples of 32; (2,) float64 height and width
            before padding; (2,) float64 height and width of the images.
        """
        height, width = images.shape[-2:]
        rows, columns = self.size(height, width, self.image_size, self.max_size)
        resized = F.interpolate(
            images, (rows, columns), mode="bilinear", align_corners=False, antialias=True
        )
        divisor = self.network.size_divisor
        # As a number of cells, so that every later shape is a simple multiple.
        padded_height, padded_width = (
            divisor * ((side + divisor - 1) // divisor) for side in (rows, columns)
        )
        margin = (0, padded_width - columns, 0, padded_height - rows)
        # F.pad takes one value: subtract the colour of each channel first. Integers stay exact.
        padded = F.pad(resized.float() - self.colour, margin) + self.colour
        return padded, _sides(rows, columns), _sides(height, width)

    def scores(self, logits: Tensor) -> Tensor:
        """Return calibrated scores."""
        return (logits if self.temperature == 1 else logits / self.temperature).sigmoid()

    def levels(self, outputs: Outputs, padded: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return logits (B, R_l, K) and deltas (B, R_l, 4), both float32, and anchors per level."""
        network = self.network
        levels = []
        for level, (logits, deltas) in enumerate(zip(outputs.logits, outputs.deltas, strict=True)):
            rows, columns = logits.shape[-2:]
            stride = network.strides[level]
            steps = (stride, stride)
            if network.anchors.rounding == "torchvision":
                steps = (padded.shape[-2] // rows, padded.shape[-1] // columns)
            cell = cast(Tensor, getattr(self, f"cell_{level}"))
            levels.append(
                (
                    flatten_level(logits, network.num_classes).float(),
                    flatten_level(deltas, 4).float(),
                    anchor_grid(cell, rows, columns, steps),
                )
            )
        return levels


class RawDetectorGraph(DetectorGraph):
    """Boxes and scores of all anchors, for engines with their own NMS."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Score every anchor.

        Returns:
            (B, R, 4) float32 boxes in pixels of the images, clipped to them, and (B, R, K) float32
            scores, level by level.
        """
        padded, size, original = self.prepare(images)
        levels = self.levels(self.network(padded), padded)
        boxes = torch.cat([decode_boxes(deltas, anchors) for _, deltas, anchors in levels], dim=1)
        scores = self.scores(torch.cat([logits for logits, _, _ in levels], dim=1))
        return to_original(clip_boxes(boxes, size), size, original), scores


def network_size(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    """Compute :func:`retinanet.data.images.network_size` in tensors.

    The shapes of the graph are then in terms of two new symbols, and a saved program cannot have
    Python's ``round``.
    """
    sides = _sides(height, width)
    # Not `shorter / sides`: torch computes a product with the reciprocal, which rounds twice.
    wanted = sides.new_tensor((shorter, longest))
    scale = (wanted / torch.stack((sides.amin(dim=0), sides.amax(dim=0)))).amin(dim=0)
    whole = (sides * scale).round().clamp(min=1).long()
    rows, columns = (cast(int, side.item()) for side in whole)  # int() would make it constant
    for side in (rows, columns):
        torch._check(side >= 1)
        torch._check(side <= longest)
    return rows, columns


def symbolic_network_size(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    """Compute :func:`network_size` from the symbols of the image's size, for AOTInductor.

    AOTInductor of torch 2.15 reads feature maps of other sizes in the wrong order.
    """
    scale = torch.sym_min(
        shorter / torch.sym_min(height, width), longest / torch.sym_max(height, width)
    )
    rows, columns = (
        cast(int, torch.sym_max(1, cast(int, round(side * scale)))) for side in (height, width)
    )
    return rows, columns


def _sides(height: int, width: int) -> Tensor:
    """(2,) float64."""
    return torch.stack([torch.scalar_tensor(side, dtype=torch.float64) for side in (height, width)])


def best_of_level(
    logits: Tensor, deltas: Tensor, anchors: Tensor, min_logit: float, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select the `k` highest logits of each image above `min_logit`; of equal ones the first.

    Returns:
        (B, k) logits, best first, padded with -inf; (B, k) labels; (B, k, 4) deltas and anchors.
    """
    count, classes = logits.shape[1:]
    logits = torch.where(logits > min_logit, logits, -math.inf)  # drops NaN
    # The best logits are in the k rows with the largest maximum.
    rows = F.pad(logits.amax(dim=2), (0, k), value=-math.inf).topk(k, dim=1).indices
    rows = rows.sort(dim=1).values
    inside = rows < count
    rows = rows.clamp(max=count - 1)
    own = logits.gather(1, rows[:, :, None].expand(-1, -1, classes))
    own = torch.where(inside[:, :, None], own, -math.inf)
    best, index = own.flatten(1).topk(k, dim=1)
    row = rows.gather(1, index // classes)
    own_deltas = deltas.gather(1, row[:, :, None].expand(-1, -1, 4))
    return best, index % classes, own_deltas, anchors[row]


def suppress_by_torchvision(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    classes: int,
    threshold: float,
    max_boxes: int,
    side: int,
) -> Tensor:
    """Suppress with torchvision, all images and classes in one call; returns (B, T) bool.

    Of boxes (B, T, 4), scores and labels (B, T); a negative score is an empty candidate. `classes`
    is 1 for class-agnostic suppression; engines need the maximum number of boxes per class; `side`
    is an upper bound of the coordinates.
    """
    images = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand_as(labels)
    groups = images if classes == 1 else images * classes + labels
    candidates = (scores >= 0).flatten().nonzero()[:, 0]
    # Two boxes in front that nothing suppresses: torchvision's nms is exported with the assertion
    # that at least two boxes are kept.
    two = torch.arange(2, device=boxes.device)
    corners = torch.cat((two.new_zeros(2, 4), boxes.flatten(0, 1)[candidates]))
    corners[:2, 2:] += 1
    # Offset the groups so that they do not overlap; float32 is too coarse for the coordinates.
    groups = torch.cat((two, groups.flatten()[candidates] + 2))
    moved = corners.double() + (groups * (side + 1))[:, None]
    own_scores = torch.cat((two.to(scores.dtype) + 1, scores.flatten()[candidates]))
    indices = nms(moved, own_scores.double(), threshold)
    kept = torch.zeros(2 + scores.numel(), dtype=torch.bool, device=boxes.device)
    kept = kept.index_fill(0, torch.cat((two, candidates + 2))[indices], True)
    return kept[2:].view_as(scores)


suppress_by_engine = torch.library.custom_op(
    "retinanet::suppress", suppress_by_torchvision, mutates_args=()
)
"""One node of the graph, ``retinanet::suppress``, that a converter translates."""


@suppress_by_engine.register_fake
def _(boxes: Tensor, scores: Tensor, labels: Tensor, *_: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def export_program(detector: Detector, to: str, form: str) -> torch.export.ExportedProgram:
    """Export a detector on the CPU, in a form of `OUTPUTS`, for any batch size and image size."""
    graph = (DetectorGraph if form == "detections" else RawDetectorGraph)(detector, to)
    # The example has another size than the network's input, and a coarsest level of more than one
    # cell if any image has: AOTInductor takes a side of 1 as constant.
    longer = min(detector.max_size, 2 * detector.image_size)
    example = torch.zeros(2, 3, detector.image_size - 7, longer - 5, dtype=torch.uint8)
    batch = torch.export.Dim("batch", max=MAX_BATCH)
    height, width = (torch.export.Dim(name, max=MAX_SIDE) for name in ("height", "width"))
    with any_size(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch and torchvision
        program = torch.export.export(
            graph, (example,), dynamic_shapes={"images": {0: batch, 2: height, 3: width}}
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def write_torch(
    program: torch.export.ExportedProgram, file: Path, text: str, *, compiled: bool
) -> None:
    """Write a program for ``torch.export.load``, with the text in ``extra/retinanet``.

    `compiled`: as machine code for this CPU, for ``aoti_load_package``; needs a C++ compiler.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch
        if not compiled:
            torch.export.save(program, file, extra_files={TEXT_KEY: text})
            return
        try:
            with quiet():
                torch._inductor.aoti_compile_and_package(program, package_path=str(file))
        except Exception as error:
            if "compiler" not in f"{type(error).__name__} {error}".lower():
                raise
            raise ConfigError(
                "--aot needs a working C++ compiler: "
                f"{str(error).strip().splitlines()[0]}; export without --aot"
            ) from None
    # Drop the generated C++ sources, which contain paths of this machine.
    stripped = file.with_suffix(".stripped")
    with zipfile.ZipFile(file) as package, zipfile.ZipFile(stripped, "w") as out:
        for entry in package.infolist():
            if not entry.filename.endswith(".cpp"):
                with package.open(entry) as source, out.open(entry.filename, "w") as target:
                    shutil.copyfileobj(source, target)
        root = package.namelist()[0].split("/")[0]
        out.writestr(f"{root}/extra/{TEXT_KEY}", text)
    stripped.replace(file)
