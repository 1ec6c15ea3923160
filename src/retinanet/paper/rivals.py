"""Other detectors on this package's backbone: Faster R-CNN with FPN, SSD, torchvision's RetinaNet.

Lin et al. 2017, Table 2, compares RetinaNet with the published values of such detectors. Here they
are trained on the same images for as many steps (:mod:`retinanet.paper.rival_training`). The
detectors are torchvision's (``torchvision.models.detection``) with our backbone and weights, our
batches and our :class:`~retinanet.structures.Detections`. In torchvision label 0 is the background:
labels are shifted in :func:`as_torchvision` and in :meth:`RivalNetwork.detect` only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper

from retinanet.config import DetectConfig, ModelSpec, Recipe, check_choice
from retinanet.data.loading import DIVISOR
from retinanet.errors import ConfigError, WeightsError
from retinanet.files import readable_folder, write_atomic
from retinanet.inference.backends import to_original
from retinanet.losses.detection import Losses
from retinanet.model.backbone import build_backbone, check_state
from retinanet.model.networks import Backbone
from retinanet.model.precision import autocast
from retinanet.model.retinanet import RetinaNet, build_retinanet
from retinanet.structures import Batch, Detections, Targets

RIVALS = ("faster_rcnn", "ssd", "torchvision_retinanet")
"""Names of the detectors."""

WEIGHTS_FILE = "rival.safetensors"
INFO_FILE = "rival.json"

SSD_MAPS = 3
"""Maps of the backbone that SSD uses: C3, C4 and C5, strides 8 to 32 as SSD512."""

# Box sides of SSD512 for COCO as fractions of the image's (Liu et al. 2016, arXiv:1512.02325, Sec.
# 3.4, and its published code): first and second level, last level, and the size beyond it.
_SSD_FIRST, _SSD_SECOND, _SSD_LAST, _SSD_BEYOND = 0.04, 0.1, 0.9, 1.06
_SMALLEST_ANCHOR = 32 / 600  # of the paper, as a fraction of the image's side


class RivalSettings(BaseModel):
    """All that builds a rival: ``rival.json``.

    `spec` is that of the RetinaNet whose backbone, weights, channels and anchor sizes it has;
    `image_size`, the shorter side in pixels, is what SSD's boxes are fractions of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rival: Literal["faster_rcnn", "ssd", "torchvision_retinanet"]
    classes: tuple[str, ...]
    spec: ModelSpec
    detect: DetectConfig
    image_size: int = Field(ge=1)
    max_size: int = Field(ge=1)

    @property
    def sizes(self) -> tuple[float, ...]:
        """Anchor sizes in pixels, of P2 to P6."""
        assert self.spec.sizes is not None
        return tuple(self.spec.sizes[:5])


class RivalNetwork(nn.Module):
    """A detector of torchvision with our backbone, images and labels; random weights.

    Faster R-CNN: Ren et al. 2015 (arXiv:1506.01497) with FPN (Lin et al. 2017, arXiv:1612.03144,
    Sec. 4 and 5): levels P2 to P6 with one anchor size each; the rest as in torchvision.

    SSD: Liu et al. 2016 (arXiv:1512.02325), with the losses, box sizes and aspect ratios of SSD512,
    except: our backbone instead of VGG-16, no L2 norm of the first map, images that keep their
    aspect ratio, and our augmentation. Levels are added, each half as large as the one before,
    until one cell covers an image (:func:`ssd_strides`).

    torchvision_retinanet: as ``torchvision.models.detection.retinanet_resnet50_fpn``, on P3 to P7
    with P6 from P5, heads of depth 4, and low-quality matches.

    Attributes:
        settings: builds it again.
        pixel_mean: (3, 1, 1), RGB 0..255.
        backbone: ours.
        detector: torchvision's; it uses the backbone but does not register it.
    """

    pixel_mean: Tensor

    def __init__(self, settings: RivalSettings) -> None:
        super().__init__()
        self.settings = settings
        ours = RetinaNet(len(settings.classes), settings.spec)
        self.register_buffer("pixel_mean", ours.pixel_mean, persistent=False)
        self.backbone = ours.backbone
        build = {"faster_rcnn": _faster_rcnn, "ssd": _ssd, "torchvision_retinanet": _retinanet}
        self.detector = build[settings.rival](settings, self.backbone)
        self.detector.transform = _Normalize(settings)
        self.to(memory_format=torch.channels_last)

    def losses(self, batch: Batch, precision: str = "float32") -> Losses:
        """Compute the losses in training mode, summed over the stages.

        Samplers draw from torch's generator. Ignored objects are left out: torchvision has no such
        label. Only backbone and pyramid are in `precision`. `foreground` is the number of objects
        per image.
        """
        targets = as_torchvision(batch.targets)
        self.detector.backbone.precision = precision
        # The whole batch: in training an image may be in any corner of it.
        losses: dict[str, Tensor] = self.detector(list(batch.images.float()), targets)
        box = sum(loss for name, loss in losses.items() if "box" in name)
        classification = sum(loss for name, loss in losses.items() if "box" not in name)
        objects = (batch.targets.labels >= 0).sum(1)
        normaliser = objects.sum().clamp(min=1).float()
        return Losses(classification, box, objects, normaliser)  # type: ignore[arg-type]

    @torch.inference_mode()
    def detect(self, batch: Batch, precision: str = "float32") -> list[Detections]:
        """Detect objects in evaluation mode, boxes in pixels of the original image."""
        sizes, originals = batch.sizes.tolist(), batch.original_sizes.tolist()
        images = [
            image[:, :height, :width].float()
            for image, (height, width) in zip(batch.images, sizes, strict=True)
        ]
        self.detector.backbone.precision = precision
        return [
            Detections(to_original(raw["boxes"], size, original), raw["scores"], raw["labels"] - 1)
            for raw, size, original in zip(self.detector(images), sizes, originals, strict=True)
        ]


class _Normalize(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Normalizes images of 0..255 and pads them to multiples of 32, without a resize."""

    def __init__(self, settings: RivalSettings) -> None:
        side, spec = settings.image_size, settings.spec
        super().__init__(side, side, spec.pixel_mean, spec.pixel_std, DIVISOR)

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target


class _Features(nn.Module):
    """The backbone's maps with more levels on top, as torchvision's detectors take them."""

    def __init__(
        self, backbone: Backbone, levels: nn.Module, out_channels: int | list[int], first: int = 0
    ) -> None:
        super().__init__()
        self._first = first  # of the backbone's maps
        self._backbone = (backbone,)  # in a tuple: registered in RivalNetwork only
        self.levels = levels
        self.out_channels = out_channels
        self.precision = "float32"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with autocast(self.precision, images.device):
            maps = self._backbone[0](images)[self._first :]
            levels = self.levels({str(i): level for i, level in enumerate(maps)})
        return {name: level.float() for name, level in levels.items()}


def _faster_rcnn(settings: RivalSettings, backbone: Backbone) -> FasterRCNN:
    channels, detect = settings.spec.channels, settings.detect
    pyramid = FeaturePyramidNetwork(list(backbone.channels), channels, LastLevelMaxPool())
    ratios = (settings.spec.aspect_ratios,) * 5
    align = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
    # torchvision infers them from the first, perhaps unpadded, images.
    align.scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    align.map_levels = initLevelMapper(2, 5)
    return FasterRCNN(
        _Features(backbone, pyramid, channels),
        len(settings.classes) + 1,
        rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in settings.sizes), ratios),
        box_roi_pool=align,
        box_score_thresh=detect.score_threshold,
        box_nms_thresh=detect.nms_threshold,
        box_detections_per_img=detect.detections_per_image,
    )


def _retinanet(settings: RivalSettings, backbone: Backbone) -> TorchvisionRetinaNet:
    channels, detect = settings.spec.channels, settings.detect
    pyramid = FeaturePyramidNetwork(
        list(backbone.channels[1:]), channels, LastLevelP6P7(channels, channels)
    )
    sizes = settings.spec.sizes or (32, 64, 128, 256, 512)
    sides = tuple(tuple(int(size * 2 ** (i / 3)) for i in range(3)) for size in sizes[-5:])
    return TorchvisionRetinaNet(
        _Features(backbone, pyramid, channels, first=1),
        len(settings.classes) + 1,
        anchor_generator=AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * len(sides)),
        score_thresh=detect.score_threshold,
        nms_thresh=detect.nms_threshold,
        detections_per_img=detect.detections_per_image,
        topk_candidates=detect.topk_candidates,
    )


def _ssd(settings: RivalSettings, backbone: Backbone) -> SSD:
    side, channels, detect = settings.image_size, settings.spec.channels, settings.detect
    strides = ssd_strides(side)
    widths = list(backbone.channels[-SSD_MAPS:])
    extra = nn.ModuleList()
    for _ in strides[SSD_MAPS:]:
        extra.append(_halving(widths[-1], channels))
        widths.append(channels)
    return SSD(
        _Features(backbone, _SSDLevels(extra), widths),
        _DefaultBoxes(strides, side, settings.sizes[0] / side),
        (side, side),
        len(settings.classes) + 1,
        score_thresh=detect.score_threshold,
        nms_thresh=detect.nms_threshold,
        detections_per_img=detect.detections_per_image,
        topk_candidates=detect.topk_candidates,
    )


class _SSDLevels(nn.Module):
    """C3 to C5 and the levels on top of them."""

    def __init__(self, extra: nn.ModuleList) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        levels = list(maps.values())[-SSD_MAPS:]
        # In float32: on a map with one cell the bfloat16 gradient of a stride-2 convolution is
        # wrong on CPUs.
        with torch.autocast(levels[-1].device.type, enabled=False):
            level = levels[-1].float()
            for block in self.extra:
                level = block(level)
                levels.append(level)
        return {str(i): level for i, level in enumerate(levels)}


class _DefaultBoxes(DefaultBoxGenerator):  # type: ignore[misc]
    """Default boxes of a square image with sides of `image_size`, whatever the padding.

    Feature maps are rounded up, so the cells of a level reach beyond the image: each level is
    shifted to be centred on it, so that all centres are inside.
    """

    def __init__(self, strides: Sequence[int], image_size: int, smallest: float) -> None:
        padded = math.ceil(image_size / DIVISOR) * DIVISOR
        cells = [math.ceil(padded / stride) for stride in strides]
        # Less than the stride only where the padding alone is more than a cell of a fine level.
        steps = [
            min(stride, image_size / max(1, count - 1))
            for stride, count in zip(strides, cells, strict=True)
        ]
        super().__init__(
            [[2], *[[2, 3]] * (len(strides) - 3), [2], [2]],
            scales=ssd_scales(len(strides), smallest),
            steps=steps,
        )
        self._side = image_size
        self._shifts = [(image_size - n * step) / 2 for n, step in zip(cells, steps, strict=True)]

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        square = ImageList(torch.empty(self._side, self._side, device="meta"), images.image_sizes)
        boxes: list[Tensor] = super().forward(square, maps)
        counts = zip(maps, self.num_anchors_per_location(), self._shifts, strict=True)
        shifts = [torch.full((level[0, 0].numel() * n, 1), shift) for level, n, shift in counts]
        shift = torch.cat(shifts).to(boxes[0].device, non_blocking=True)
        return [of_image + shift for of_image in boxes]


def ssd_strides(image_size: int) -> list[int]:
    """Return SSD's strides in pixels: 8, 16, 32, then doubled until one covers the image.

    The coarsest level has a single cell, as in SSD300 and SSD512.
    """
    strides = [8, 16, 32]
    while strides[-1] < image_size:
        strides.append(2 * strides[-1])
    return strides


def ssd_scales(levels: int, smallest: float) -> list[float]:
    """Return box sides as fractions of the image's, of each level and beyond the last.

    The first two are SSD512's, scaled so that the smallest box is 3/4 of RetinaNet's smallest
    anchor (`smallest` of the image's side), as in the two papers (.04 x 600 px and 32 px). The last
    is SSD512's, so that one box is as large as the image; those between increase evenly.
    """
    factor = smallest / _SMALLEST_ANCHOR
    # Not decreasing if the smallest anchor is nearly as large as the image.
    first, second = (min(factor * scale, _SSD_LAST) for scale in (_SSD_FIRST, _SSD_SECOND))
    step = (_SSD_LAST - second) / (levels - 2)
    return [first, *(second + step * i for i in range(levels - 1)), _SSD_BEYOND]


def _halving(width: int, channels: int) -> nn.Sequential:
    """Build one of SSD's additional levels (its Figure 2): 1x1, then 3x3 with stride 2."""
    narrow = max(1, channels // 2)
    first, second = nn.Conv2d(width, narrow, 1), nn.Conv2d(narrow, channels, 3, 2, 1)
    for layer in (first, second):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True))


def as_torchvision(targets: Targets) -> list[dict[str, Tensor]]:
    """Convert targets to torchvision's, labels 1..K, without padding and ignored objects."""
    return [
        {"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + 1}
        for boxes, labels in zip(targets.boxes, targets.labels, strict=True)
    ]


def check_rival(name: str, recipe: Recipe) -> None:
    """Check that a rival can be built with a recipe, before anything is written.

    Raises:
        ConfigError: there is no such rival or backbone, or a setting is not supported.
    """
    check_choice("rival", name, RIVALS)
    if recipe.detect.class_agnostic_nms:
        raise ConfigError(
            f"{name} has torchvision's NMS per class: set detect.class_agnostic_nms=false"
        )
    # Not on the meta device: some of timm's backbones compute with values while they are built.
    backbone = build_backbone(recipe.model.backbone)
    if name == "faster_rcnn" and backbone.channels[0] == 0:
        raise ConfigError(
            "faster_rcnn needs a feature map at stride 4, which backbone "
            f"{recipe.model.backbone!r} does not have: use another backbone"
        )


def build_rival(name: str, recipe: Recipe, classes: Sequence[str]) -> RivalNetwork:
    """Build a rival for training with a recipe.

    Its backbone, weights, frozen stages, norm and pixel statistics are what
    :func:`retinanet.model.retinanet.build_retinanet` makes of ``recipe.model``. Anchor sizes are
    ``recipe.anchors.sizes``, one level lower (P2 to P6 instead of P3 to P7, as in FPN's paper);
    with ``model.p2`` they start at P2 already.

    Raises:
        ConfigError, WeightsError: as :func:`check_rival` and ``build_retinanet``.
    """
    check_rival(name, recipe)
    # Built first, so with the random numbers that RetinaNet starts with.
    ours = build_retinanet(len(classes), recipe.model_spec)
    settings = RivalSettings(
        rival=name,
        classes=tuple(classes),
        spec=ours.spec,
        detect=recipe.detect,
        image_size=recipe.data.image_size,
        max_size=recipe.data.max_size,
    )
    network = RivalNetwork(settings)
    network.backbone.load_state_dict(ours.backbone.state_dict())
    return network


def write_rival(folder: Path, network: RivalNetwork) -> None:
    """Write ``rival.safetensors`` and ``rival.json`` into a folder that exists."""
    state = network.state_dict()
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    write_atomic(folder / INFO_FILE, network.settings.model_dump_json(indent=1) + "\n")


def load_rival(path: str | Path, device: torch.device | str = "cpu") -> RivalNetwork:
    """Load a rival in evaluation mode from a run folder (``best``, else ``last``) or a checkpoint.

    Raises:
        WeightsError: the checkpoint is missing, damaged, or of another kind.
    """
    folders = [readable_folder(Path(path) / name) for name in (".", "best", "last")]
    folder = next((folder for folder in folders if (folder / INFO_FILE).is_file()), None)
    if folder is None:
        raise WeightsError(
            f"no {INFO_FILE} in {path} or its best/ and last/: give the run folder of a rival"
        )
    try:
        text = (folder / INFO_FILE).read_text("utf-8")
        network = RivalNetwork(RivalSettings.model_validate_json(text))
        state = load_file(folder / WEIGHTS_FILE)
    except (OSError, ConfigError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{folder} is not a checkpoint of a rival: {reason}") from None
    check_state(network.state_dict(), state, f"weights of {folder}")
    network.load_state_dict(state)
    return network.to(device).eval()
