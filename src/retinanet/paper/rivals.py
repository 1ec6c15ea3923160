"""Other detectors on our backbone: Faster R-CNN with a pyramid (two stages), and SSD (one).

Lin et al. 2017, Table 2, sets RetinaNet against the published figures of such detectors. Here they
are trained on the same images for as many steps (:mod:`retinanet.paper.rival_training`), so that
the claim can be tested anywhere. Proposals, heads, matching, sampling, losses and post-processing
are torchvision's (``torchvision.models.detection``); around them stand our backbone with our
weights, our batches and our :class:`~retinanet.structures.Detections`. torchvision counts the
background as class 0: labels are shifted in :func:`as_torchvision` and in ``detect``, nowhere else.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from retinanet.config import Recipe, check_choice
from retinanet.data.loading import DIVISOR
from retinanet.errors import ConfigError, WeightsError
from retinanet.files import readable_folder, write_atomic
from retinanet.inference.backends import to_original
from retinanet.losses.detection import Losses
from retinanet.model.backbone import Backbone, build_backbone, check_state
from retinanet.model.retinanet import build_retinanet
from retinanet.structures import Batch, Detections, Targets

WEIGHTS_FILE = "rival.safetensors"
TEXT_FILE = "rival.json"
FORMAT = "retinanet rival"
FORMAT_VERSION = 1

_PAPER_SHARE = 32 / 600
"""Side of the paper's smallest anchors as a share of the image's; SSD's go with it."""

# SSD512 as trained on COCO (Liu et al. 2016, arXiv:1512.02325, Sec. 3.4, and its published code):
# sides of the default boxes as shares of the image's. The first level has one of its own; from
# the second to the last they rise evenly, and a further one belongs to the last level's larger
# square.
_SSD_FIRST = 0.04
_SSD_SECOND = 0.1
_SSD_LAST = 0.9
_SSD_BEYOND = 1.06

SSD_MAPS = 3
"""Maps of the backbone that SSD looks at: C3, C4 and C5, strides 8 to 32 as SSD512."""


class RivalSettings(BaseModel):
    """All that builds a rival again: plain values, as ``rival.json`` keeps them.

    Attributes:
        rival: a name of :data:`RIVALS`.
        num_classes: K, without the background.
        backbone, norm, frozen_stages, norm_eps, stride_padding, pixel_mean, pixel_std, channels:
            as in :class:`retinanet.model.retinanet.RetinaNet`.
        sizes: square root of the anchors' area in pixels, a level from P2 to P6.
        aspect_ratios: height / width, of Faster R-CNN's anchors.
        image_size: shorter side of the images, pixels; SSD's boxes are shares of it.
        score_threshold, nms_threshold, detections_per_image: of what is found.
        topk_candidates: SSD's boxes of a class that NMS looks at.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rival: str
    num_classes: int = Field(ge=1)
    backbone: str
    norm: str
    frozen_stages: int
    norm_eps: float
    stride_padding: str
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    channels: int = Field(ge=1)
    sizes: tuple[float, float, float, float, float]
    aspect_ratios: tuple[float, ...]
    image_size: int = Field(ge=1)
    score_threshold: float
    nms_threshold: float
    detections_per_image: int
    topk_candidates: int


class RivalNetwork(nn.Module, ABC):
    """Another detector, on our backbone, images and labels.

    Attributes:
        settings: what builds it again; the weights are then random.
        num_classes: K, without the background.
        pixel_mean, pixel_std: (3, 1, 1) of 0..255 RGB, subtracted and divided by inside.
        backbone: :class:`retinanet.model.backbone.Backbone`.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, settings: RivalSettings) -> None:
        super().__init__()
        self.settings = settings
        self.num_classes = settings.num_classes
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(getattr(settings, name), dtype=torch.float32)
            self.register_buffer(name, values.view(3, 1, 1), persistent=False)
        self.backbone = build_backbone(
            settings.backbone,
            norm=settings.norm,
            frozen_stages=settings.frozen_stages,
            norm_eps=settings.norm_eps,
            stride_padding=settings.stride_padding,
        )
        self.check_backbone(settings.backbone, self.backbone)

    @classmethod
    def check_backbone(cls, name: str, backbone: Backbone) -> None:
        """That a backbone has the maps that are looked at; C3 to C5 every one has.

        Raises:
            ConfigError: it has not.
        """

    def losses(self, batch: Batch) -> Losses:
        """The losses to train with, in training mode; random samples come from torch's generator.

        Args:
            batch: as :func:`retinanet.data.loading.train_loader` makes it, on the network's device.
                Objects that are ignored are left out: torchvision's samplers know none.

        Returns:
            Classification and box losses, each summed over the stages; what is counted as
            foreground are sampled proposals (Faster R-CNN) or default boxes (SSD).

        Raises:
            ValueError: the network is in evaluation mode.
        """
        if not self.training:
            raise ValueError("losses are those of training mode: call train() first")
        return self._losses(batch)

    @torch.inference_mode()
    def detect(self, batch: Batch) -> list[Detections]:
        """What is found in each image, best first, in evaluation mode.

        Args:
            batch: as :func:`retinanet.data.loading.eval_loader` makes it, on the network's device;
                its targets are not looked at.

        Returns:
            Boxes in the pixels of the original image and within it, labels 0..K-1.

        Raises:
            ValueError: the network is in training mode.
        """
        if self.training:
            raise ValueError("detection is for evaluation mode: call eval() first")
        found = self._detect(batch)
        sizes, originals = batch.sizes.tolist(), batch.original_sizes.tolist()
        return [
            # torchvision's class 0 is the background.
            Detections(to_original(boxes, size, original), scores, labels - 1)
            for (boxes, scores, labels), size, original in zip(found, sizes, originals, strict=True)
        ]

    def normalised(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 or float 0..255 to float32, as the backbone's weights want it."""
        return (images.float() - self.pixel_mean) / self.pixel_std

    @abstractmethod
    def _losses(self, batch: Batch) -> Losses: ...

    @abstractmethod
    def _detect(self, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes in the network's pixels, scores, and torchvision's labels of each image."""


class FasterRCNNRival(RivalNetwork):
    """Faster R-CNN with a feature pyramid.

    Source: Ren et al. 2015 (arXiv:1506.01497); Lin et al. 2017 (arXiv:1612.03144), Sec. 4 and 5:
    levels P2 to P6, one anchor size a level, 2000 proposals in training and 1000 in use, 512 of
    them sampled with a quarter foreground. Whatever is not in the settings is torchvision's default
    (smooth L1 with beta 1/9, heads of two layers of 1024, RoIAlign of 7 x 7).
    """

    def __init__(self, settings: RivalSettings) -> None:
        super().__init__(settings)
        widths = list(self.backbone.channels)
        self.pyramid = FeaturePyramidNetwork(widths, settings.channels, LastLevelMaxPool())
        generator = _Anchors(
            tuple((size,) for size in settings.sizes), (settings.aspect_ratios,) * 5
        )
        per_cell = generator.num_anchors_per_location()[0]
        pieces = FasterRCNN(
            _no_backbone(settings.channels),
            settings.num_classes + 1,
            rpn_anchor_generator=generator,
            rpn_head=_ProposalHead(settings.channels, per_cell),
            box_score_thresh=settings.score_threshold,
            box_nms_thresh=settings.nms_threshold,
            box_detections_per_img=settings.detections_per_image,
        )
        self.rpn, self.roi_heads = pieces.rpn, pieces.roi_heads

    @classmethod
    def check_backbone(cls, name: str, backbone: Backbone) -> None:
        if backbone.channels[0] == 0:
            raise ConfigError(
                f"faster_rcnn looks at C2, and backbone {name!r} has no feature map at stride 4: "
                "choose another backbone"
            )

    def _losses(self, batch: Batch) -> Losses:
        # In training an image may lie in any corner of the batch, so that no size says where it
        # ends; boxes are cut to the batch.
        sizes = [_padded_size(batch)] * len(batch.images)
        targets = as_torchvision(batch.targets)
        features = self._features(batch.images)
        proposals, first = self.rpn(ImageList(batch.images, sizes), features, targets)
        proposals, _, labels, deltas = self.roi_heads.select_training_samples(proposals, targets)
        outputs = self._second_stage(features, proposals, batch)
        classification, box = fastrcnn_loss(*outputs, labels, deltas)
        return _losses_of(
            classification + first["loss_objectness"],
            box + first["loss_rpn_box_reg"],
            [(one > 0).sum() for one in labels],
        )

    def _detect(self, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        sizes = _sizes(batch)
        features = self._features(batch.images)
        proposals, _ = self.rpn(ImageList(batch.images, sizes), features)
        logits, deltas = self._second_stage(features, proposals, batch)
        found = self.roi_heads.postprocess_detections(logits, deltas, proposals, sizes)
        return list(zip(*found, strict=True))

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(self.normalised(images))
        levels: dict[str, Tensor] = self.pyramid({str(i): one for i, one in enumerate(maps)})
        return levels

    def _second_stage(
        self, features: dict[str, Tensor], proposals: list[Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """(N, K + 1) logits and (N, 4 (K + 1)) deltas of all proposals, float32."""
        # torchvision infers the levels' strides from the first sizes that it is given and keeps
        # them: those of the batch, which the maps are of, and not those of the images in it.
        pooled = self.roi_heads.box_roi_pool(features, proposals, [_padded_size(batch)])
        logits, deltas = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        return logits.float(), deltas.float()


class SSDRival(RivalNetwork):
    """SSD: default boxes on C3 to C5 and coarser levels, each with a head of its own.

    Source: Liu et al. 2016 (arXiv:1512.02325): three hard negatives for each positive, smooth L1,
    box sizes and aspect ratios of SSD512. Where it departs: our backbone instead of VGG-16 (as
    SSD513 of Fu et al. 2017 has ResNet-101), no L2 norm of the first map, images that keep their
    aspect ratio, and our augmentation. Levels, each half as large as the one before, are added
    until one cell holds an image (:func:`ssd_strides`). Default boxes are those of a square
    image with sides of ``image_size``, tiled on over whatever the batch holds, so that padding
    does not change them. The small ones go with RetinaNet's smallest anchor, the largest always
    cover the image (:func:`ssd_shares`).
    """

    def __init__(self, settings: RivalSettings) -> None:
        super().__init__(settings)
        strides = ssd_strides(settings.image_size)
        widths = list(self.backbone.channels[-SSD_MAPS:])
        self.extra = nn.ModuleList()
        for _ in strides[SSD_MAPS:]:
            self.extra.append(_halving(widths[-1], settings.channels))
            widths.append(settings.channels)
        steps, self._shifts = _centred(strides, settings.image_size)
        generator = DefaultBoxGenerator(
            [[2], *[[2, 3]] * (len(strides) - 3), [2], [2]],
            scales=ssd_shares(len(strides), settings.sizes[0] / settings.image_size),
            steps=steps,
        )
        side = settings.image_size
        classes = settings.num_classes + 1
        self.ssd = SSD(
            nn.Identity(),
            generator,
            (side, side),
            classes,
            head=SSDHead(widths, generator.num_anchors_per_location(), classes),
            score_thresh=settings.score_threshold,
            nms_thresh=settings.nms_threshold,
            detections_per_img=settings.detections_per_image,
            topk_candidates=settings.topk_candidates,
        )

    def _losses(self, batch: Batch) -> Losses:
        targets = as_torchvision(batch.targets)
        outputs, boxes = self._outputs(batch)
        matches = [
            self.ssd.proposal_matcher(box_iou(one["boxes"], default))
            if len(one["boxes"])
            else torch.full((len(default),), -1, device=default.device)
            for one, default in zip(targets, boxes, strict=True)
        ]
        losses = self.ssd.compute_loss(targets, outputs, boxes, matches)
        return _losses_of(
            losses["classification"],
            losses["bbox_regression"],
            [(one >= 0).sum() for one in matches],
        )

    def _detect(self, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        outputs, boxes = self._outputs(batch)
        found = self.ssd.postprocess_detections(outputs, boxes, _sizes(batch))
        return [(one["boxes"], one["scores"], one["labels"]) for one in found]

    def _outputs(self, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Logits (B, R, K + 1) and deltas (B, R, 4), float32, and each image's (R, 4) boxes."""
        maps = list(self.backbone(self.normalised(batch.images))[-SSD_MAPS:])
        # Small maps, in float32 whatever autocast says: on a map of a single cell torch's CPU
        # kernels have no sound bfloat16 gradient for a convolution of stride 2.
        with torch.autocast(batch.images.device.type, enabled=False):
            level = maps[-1].float()
            for block in self.extra:
                level = block(level)
                maps.append(level)
        outputs = {name: one.float() for name, one in self.ssd.head(maps).items()}
        square = torch.empty((self.settings.image_size,) * 2, device="meta")
        cells = [one.new_empty(one.shape[-2:], dtype=torch.float32) for one in maps]
        boxes = self.ssd.anchor_generator(ImageList(square, _sizes(batch)), cells)
        per_cell = self.ssd.anchor_generator.num_anchors_per_location()
        counts = [one.shape[-2] * one.shape[-1] * n for one, n in zip(maps, per_cell, strict=True)]
        shift = torch.cat(
            [torch.full((n, 1), one) for n, one in zip(counts, self._shifts, strict=True)]
        ).to(batch.images.device, non_blocking=True)
        return outputs, [one + shift for one in boxes]


def ssd_strides(image_size: int) -> list[int]:
    """Strides of SSD's levels, pixels: C3 to C5, then doubled until one reaches the image's side.

    So the coarsest level is a single cell, as SSD300's and SSD512's are.
    """
    strides = [8, 16, 32]
    while strides[-1] < image_size:
        strides.append(2 * strides[-1])
    return strides


def ssd_shares(levels: int, smallest: float) -> list[float]:
    """Sides of SSD's default boxes as shares of the image's, one a level and one beyond.

    The first two are SSD512's, scaled so that the smallest box is 3/4 of RetinaNet's smallest
    anchor, as the two papers' are (.04 x 600 px and 32 px). The last is SSD512's whatever the
    number of levels, so that one box is as large as the image; between them they rise evenly.

    Args:
        levels: at least 3.
        smallest: side of RetinaNet's smallest anchor as a share of the image's.
    """
    factor = smallest / _PAPER_SHARE
    # Never falling, where the smallest anchor is nearly as large as the image.
    first = min(factor * _SSD_FIRST, _SSD_LAST)
    second = min(factor * _SSD_SECOND, _SSD_LAST)
    rise = (_SSD_LAST - second) / (levels - 2)
    return [first, *(second + rise * i for i in range(levels - 1)), _SSD_BEYOND]


def _centred(strides: Sequence[int], side: int) -> tuple[list[float], list[float]]:
    """Steps between the default boxes of each level, and how far the level is moved, pixels.

    Maps are rounded up, so that the cells of a level reach beyond an image of `side`: they are
    moved until they stick out as far on both sides, and all their centres lie in the image.
    """
    padded = math.ceil(side / DIVISOR) * DIVISOR
    steps, shifts = [], []
    for stride in strides:
        cells = math.ceil(padded / stride)
        # Closer than the stride only where padding alone is more than a cell of a fine level.
        step = min(stride, side / max(1, cells - 1))
        steps.append(step)
        shifts.append((side - cells * step) / 2)
    return steps, shifts


RIVALS: dict[str, type[RivalNetwork]] = {
    "faster_rcnn": FasterRCNNRival,
    "ssd": SSDRival,
}
"""Rivals by name."""


def check_rival(name: str, recipe: Recipe) -> None:
    """That a rival goes with a recipe, before anything is made of them.

    Raises:
        ConfigError: there is no such rival or backbone, or a setting does not go with it.
        MissingExtraError: timm is not installed.
    """
    _check_settings(name, recipe)
    backbone = recipe.model.backbone
    # On the CPU and not on the meta device: some of timm's read numbers as they are built.
    RIVALS[name].check_backbone(backbone, build_backbone(backbone))


def build_rival(name: str, recipe: Recipe, num_classes: int) -> RivalNetwork:
    """A rival that is ready to be trained as a RetinaNet with that recipe would be.

    Its backbone, with its weights, frozen stages, norm and pixel statistics, is what
    :func:`retinanet.model.retinanet.build_retinanet` makes of ``recipe.model``. Anchor sizes are
    ``recipe.anchors.sizes``, one level lower (P2 to P6 instead of P3 to P7, as in the pyramid's
    paper; octave scales are RetinaNet's own); with ``model.p2`` they are given from P2 on already.

    Args:
        name: of :data:`RIVALS`.
        recipe: ``model``, ``anchors``, ``data.image_size`` and ``detect`` are read.
        num_classes: K, without the background.

    Raises:
        ConfigError: there is no such rival, or a setting does not go with it.
        WeightsError: the backbone's weights cannot be had or do not fit.
        MissingExtraError: timm is not installed.
    """
    # What is built first, and draws from torch's generator first, is what RetinaNet begins with.
    _check_settings(name, recipe)
    ours = build_retinanet(
        num_classes=num_classes, **recipe.model.model_dump(), **recipe.anchors.model_dump()
    )
    kept = ("backbone", "norm", "frozen_stages", "norm_eps", "stride_padding", "pixel_mean",
            "pixel_std", "channels", "aspect_ratios")  # fmt: skip
    detect = recipe.detect.model_dump(exclude={"class_agnostic_nms"})
    settings = RivalSettings(
        rival=name,
        num_classes=num_classes,
        sizes=ours.spec["sizes"][:5],
        image_size=recipe.data.image_size,
        **{key: ours.spec[key] for key in kept},
        **detect,
    )
    network = RIVALS[name](settings)
    network.backbone.load_state_dict(ours.backbone.state_dict())
    return _channels_last(network)


def _check_settings(name: str, recipe: Recipe) -> None:
    check_choice("rival", name, RIVALS)
    if recipe.detect.class_agnostic_nms:
        raise ConfigError(
            f"{name} has torchvision's NMS, class by class: set detect.class_agnostic_nms=false"
        )


def as_torchvision(targets: Targets) -> list[dict[str, Tensor]]:
    """Each image's objects as torchvision takes them, without padding and ignored ones.

    Returns:
        A dict an image: ``boxes`` (M, 4) float32 pixels and ``labels`` (M,) int64 1..K, where 0 is
        the background.
    """
    return [
        {"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + 1}
        for boxes, labels in zip(targets.boxes, targets.labels, strict=True)
    ]


@dataclass(frozen=True)
class Rival:
    """A trained rival and all that is needed to use it.

    Attributes:
        network: in evaluation mode.
        classes: names, in the order of its labels 0..K-1.
        category_ids: the data's own id of each class.
        image_size: shorter side of its input, pixels.
        max_size: longer side at most.
        split: ``seed`` and ``val_fraction``: how the data was split where it came without splits.
    """

    network: RivalNetwork
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    image_size: int
    max_size: int
    split: Mapping[str, int | float]


class _Text(BaseModel):
    """``rival.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    version: int
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    max_size: int = Field(ge=1)
    split: dict[str, int | float]
    settings: RivalSettings


def write_rival(folder: Path, rival: Rival) -> None:
    """Write ``rival.safetensors`` and ``rival.json`` into a folder that exists."""
    state = rival.network.state_dict()
    save_file(
        {name: one.detach().cpu().contiguous() for name, one in state.items()},
        str(folder / WEIGHTS_FILE),
        metadata={"format": "pt"},
    )
    text = _Text(
        format=FORMAT,
        version=FORMAT_VERSION,
        classes=rival.classes,
        category_ids=rival.category_ids,
        max_size=rival.max_size,
        split=dict(rival.split),
        settings=rival.network.settings,
    )
    write_atomic(folder / TEXT_FILE, text.model_dump_json(indent=1) + "\n")


def load_rival(path: str | Path, device: torch.device | str = "cpu") -> Rival:
    """Read a rival's checkpoint; its network comes in evaluation mode. Opening one runs no code.

    Args:
        path: a run folder (its best, else its last) or a checkpoint folder.
        device: where the network goes.

    Raises:
        WeightsError: there is no such checkpoint, or it is damaged or made for something else.
        MissingExtraError: its backbone needs timm.
    """
    folder = _find(Path(path))
    text = _read_text(folder / TEXT_FILE)
    try:
        network = RIVALS[text.settings.rival](text.settings)
    except (ConfigError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{folder / TEXT_FILE} describes no network: {error}") from None
    try:
        state = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from None
    check_state(network.state_dict(), state, f"weights of {folder}")
    network.load_state_dict(state)
    return Rival(
        _channels_last(network).to(device).eval(),
        text.classes,
        text.category_ids,
        text.settings.image_size,
        text.max_size,
        text.split,
    )


def _find(path: Path) -> Path:
    for candidate in map(readable_folder, (path, path / "best", path / "last")):
        if (candidate / TEXT_FILE).is_file():
            return candidate
    raise WeightsError(
        f"{path} holds no {TEXT_FILE}, and neither do its best/ and last/: give the run folder of "
        "a rival"
    )


def _read_text(file: Path) -> _Text:
    try:
        text = _Text.model_validate(json.loads(file.read_text("utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise WeightsError(f"{file}: {place}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} is not JSON: {error}") from None
    if text.format != FORMAT or text.version > FORMAT_VERSION:
        raise WeightsError(
            f"{file} is {text.format!r} version {text.version}; this package reads {FORMAT!r} up "
            f"to version {FORMAT_VERSION}"
        )
    if text.settings.rival not in RIVALS:
        raise WeightsError(
            f"{file}: there is no rival {text.settings.rival!r}, only {', '.join(RIVALS)}"
        )
    counts = (len(text.classes), len(text.category_ids), text.settings.num_classes)
    if len(set(counts)) != 1:
        raise WeightsError(
            f"{file}: {counts[0]} classes, {counts[1]} category_ids and a network of {counts[2]} "
            "classes"
        )
    return text


class _Anchors(AnchorGenerator):  # type: ignore[misc]
    """torchvision's, in float32 whatever the maps are in: bfloat16 holds no pixel over 256."""

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        cells = [one.new_empty(one.shape[-2:], dtype=torch.float32) for one in maps]
        anchors: list[Tensor] = super().forward(images, cells)
        return anchors


class _ProposalHead(RPNHead):  # type: ignore[misc]
    """torchvision's, whose outputs are float32 whatever autocast says."""

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(maps)
        return [one.float() for one in logits], [one.float() for one in deltas]


def _no_backbone(channels: int) -> nn.Module:
    """Stands for the backbone where torchvision's parts are made: ours is called by us."""
    stub = nn.Identity()
    stub.out_channels = channels  # type: ignore[assignment]
    return stub


def _halving(width: int, channels: int) -> nn.Sequential:
    """SSD's further levels (its Figure 2): fewer channels, then 3x3 of stride 2."""
    between = max(1, channels // 2)
    block = nn.Sequential(
        nn.Conv2d(width, between, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(between, channels, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
    )
    for layer in block:
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return block


def _padded_size(batch: Batch) -> tuple[int, int]:
    height, width = batch.images.shape[-2:]
    return height, width


def _sizes(batch: Batch) -> list[tuple[int, int]]:
    """Height and width of each image before padding."""
    return [(height, width) for height, width in batch.sizes.tolist()]


def _losses_of(classification: Tensor, box: Tensor, foreground: Sequence[Tensor]) -> Losses:
    counts = torch.stack(list(foreground))
    return Losses(classification, box, counts, counts.sum().clamp(min=1).float())


def _channels_last(network: RivalNetwork) -> RivalNetwork:
    """With weights in the memory layout in which convolutions are fastest."""
    changed: Any = network.to(memory_format=torch.channels_last)
    result: RivalNetwork = changed
    return result
