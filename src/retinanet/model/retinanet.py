"""RetinaNet: backbone, pyramid and two heads.

Source: Lin et al. 2017, Sec. 4, Figure 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retinanet.anchors import AnchorSpec, anchor_spec, level_anchors
from retinanet.config import (
    LossSettings,
    ModelSpec,
    build_loss_settings,
    build_model_spec,
    check_choice,
    is_own,
    unknown_setting,
)
from retinanet.errors import ConfigError
from retinanet.losses.detection import Losses, detection_losses
from retinanet.model.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_backbone,
    find_weights,
    load_backbone,
)
from retinanet.model.heads import (
    FeaturePyramid,
    Head,
    build_head,
    distributions_to_deltas,
    last_convolution,
    prior_bias,
    start_at_anchors,
)
from retinanet.model.inputs import batch_images, batch_targets
from retinanet.own import import_own
from retinanet.postprocess import PostprocessSettings, mirror_images, postprocess
from retinanet.structures import Detections, Outputs, Targets


@contextmanager
def _default_float32() -> Iterator[None]:
    """Create modules in float32 whatever torch's default dtype is; also a decorator."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class RetinaNet(nn.Module):
    """A one-stage detector: the same outputs in training and in evaluation.

    The arguments are those of :func:`build_retinanet`; weights are random.

    Attributes:
        num_classes: K.
        anchors: of the outputs.
        strides: pixels of the input per cell, by level: 8, 16, 32, 64, 128 (with P2 4 first).
        pixel_mean, pixel_std: (3, 1, 1) of 0..255 RGB, with which images are normalized.
        spec: all settings: ``RetinaNet(model.num_classes, model.spec)`` is the same network.
        size_divisor: height and width of the images are multiples of it.
        class_layer: name of the convolution in `class_head` that computes the logits.
    """

    size_divisor = 32
    pixel_mean: Tensor
    pixel_std: Tensor

    @_default_float32()
    def __init__(self, num_classes: int, spec: ModelSpec | None = None, **settings: Any) -> None:
        super().__init__()
        spec = build_model_spec(spec, **settings)
        import_own({name: getattr(spec, name) for name in ("backbone", "head") if name in settings})
        _check_num_classes(num_classes)
        if spec.pixel_std is not None and min(spec.pixel_std) <= 0:
            raise ConfigError(f"pixel_std must be above 0, got {spec.pixel_std}")
        self.num_classes = num_classes
        self.p2 = spec.p2
        self.strides: tuple[int, ...] = (4,) * spec.p2 + (8, 16, 32, 64, 128)
        try:
            self.anchors: AnchorSpec = anchor_spec(
                self.strides,
                sizes=spec.sizes,
                scales=spec.scales,
                aspect_ratios=spec.aspect_ratios,
                rounding=spec.rounding,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.spec: ModelSpec = spec.model_copy(
            update={
                "sizes": self.anchors.sizes,
                "pixel_mean": spec.pixel_mean or IMAGENET_MEAN,
                "pixel_std": spec.pixel_std or IMAGENET_STD,
                "stride_padding": spec.stride_padding or "symmetric",
            }
        )
        self.backbone = build_backbone(
            spec.backbone,
            norm=spec.norm,
            frozen_stages=spec.frozen_stages,
            norm_eps=spec.norm_eps,
            stride_padding=self.spec.stride_padding or "symmetric",
            stride_in_1x1=spec.stride_in_1x1,
        )
        widths = self.backbone.channels[0 if spec.p2 else 1 :]
        if 0 in widths:
            raise ConfigError(
                f"backbone {spec.backbone!r} has no feature map at stride 4: set p2=false"
            )
        per_cell = self.anchors.per_cell
        self.pyramid = FeaturePyramid(widths, spec.channels, spec.p6_from, p7_relu=spec.p7_relu)
        self.class_head = build_head(spec, per_cell * num_classes)
        self.box_head = build_head(spec, per_cell * 4 * (spec.box_bins + 1))
        self.class_layer = last_convolution(self.class_head, per_cell * num_classes)
        bias = self.class_head.get_parameter(f"{self.class_layer}.bias")
        nn.init.constant_(bias, prior_bias(spec.prior))
        if spec.box_bins and isinstance(self.box_head, Head):
            start_at_anchors(self.box_head, spec.box_bins)
        self.set_pixel_statistics()

    def set_pixel_statistics(self) -> None:
        """Create pixel_mean and pixel_std on the CPU from the spec."""
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(getattr(self.spec, name), dtype=torch.float32, device="cpu")
            self.register_buffer(name, values.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, targets: None = None) -> Outputs:
        """Compute raw class logits and box deltas of every anchor.

        Args:
            images: (B, 3, H, W) RGB, uint8 or any float type with values 0..255; H and W multiples
                of 32, padded at the right and the bottom.
            targets: always None: the losses are those of :meth:`loss`.

        Returns:
            The outputs by level: (B, A * K, H_l, W_l) and (B, A * 4, H_l, W_l); with ``box_bins``
            also the distributions.

        Raises:
            ValueError: the images have another shape, or targets are given.
        """
        if targets is not None:
            raise ValueError("the network takes images only: losses = model.loss(images, targets)")
        if getattr(images, "ndim", None) != 4 or images.shape[1] != 3:
            got = tuple(images.shape) if hasattr(images, "shape") else type(images).__name__
            raise ValueError(
                f"images are (B, 3, H, W), got {got}; model.loss and model.detect take lists too"
            )
        if images.shape[2] % self.size_divisor or images.shape[3] % self.size_divisor:
            raise ValueError(
                f"height and width of images are multiples of {self.size_divisor}, got "
                f"{images.shape[2]} x {images.shape[3]}; pad at the right and the bottom"
            )
        # In float32 whatever the weights are: bfloat16 has 8 bits, and the difference needs more.
        pixels = (images.float() - self.pixel_mean.float()) / self.pixel_std.float()
        maps = self.backbone(pixels.to(next(self.pyramid.parameters()).dtype))
        levels = self.pyramid(maps if self.p2 else maps[1:])
        logits, boxes = (
            tuple(head(level) for level in levels) for head in (self.class_head, self.box_head)
        )
        if not self.spec.box_bins:
            return Outputs(logits, boxes)
        deltas = tuple(distributions_to_deltas(level, self.spec.box_bins) for level in boxes)
        return Outputs(logits, deltas, boxes)

    def freeze(self, *parts: str) -> Self:
        """Exclude parts from training; batch norm in them keeps its statistics.

        Args:
            parts: ``backbone`` (the default), ``pyramid``, ``class_head``, ``box_head``.

        Raises:
            ConfigError: there is no such part.
        """
        for part in parts or ("backbone",):
            check_choice("part", part, ("backbone", "pyramid", "class_head", "box_head"))
            self.get_submodule(part).requires_grad_(False)
        self.backbone.train(self.training)
        return self

    def loss(
        self,
        images: Tensor | Sequence[Tensor],
        targets: Targets | Sequence[Mapping[str, Any]],
        *,
        settings: LossSettings | None = None,
        running: Tensor | None = None,
        **changes: Any,
    ) -> Losses:
        """Compute the losses of a batch: ``model.loss(images, targets).total.backward()``.

        Args:
            images: (B, 3, H, W), or B tensors (3, h, w) of any sizes: RGB, uint8 or float 0..255.
                They are not resized. Values of float images are checked, a device sync on a GPU.
            targets: torchvision's ``[{"boxes": (M, 4), "labels": (M,)}, ..]``, with labels 0..K-1
                and no background class, or :class:`Targets`, which are not checked.
            settings, running: as in :func:`retinanet.losses.detection_losses`.
            changes: fields of :class:`LossSettings` without `settings`, such as ``gamma=1.5``.

        Raises:
            ValueError: shapes, values or labels are not as above.
            ConfigError: an unknown or invalid field.
        """
        if settings is None:
            settings = build_loss_settings(**changes)
        elif changes:
            raise ConfigError(f"settings and {', '.join(changes)} are given: put all in settings")
        batch, _ = batch_images(images, self.pixel_mean, self.size_divisor)
        objects = batch_targets(targets, len(batch), self.num_classes).to(batch.device)
        outputs = self(batch)
        return detection_losses(
            outputs,
            output_anchors(self, outputs),
            objects,
            num_classes=self.num_classes,
            settings=settings,
            running=running,
        )

    @torch.no_grad()
    def detect(self, images: Tensor | Sequence[Tensor], **thresholds: Any) -> list[Detections]:
        """Detect objects in a batch of images.

        Args:
            images: as in :meth:`loss`.
            thresholds: ``score_threshold`` and other options of
                :func:`retinanet.postprocess.postprocess`; ``flip_tta``: on the mirrored images too.

        Returns:
            For each image its detections, best first, in pixels of the image given.

        Raises:
            ValueError: images have another shape or other values, or batch norm is in training
                mode.
            ConfigError: an unknown option; the nearest is named.
        """
        for name in thresholds:
            if name not in (*PostprocessSettings.__annotations__, "selected", "flip_tta"):
                raise ConfigError(unknown_setting(name))
        if any(isinstance(module, _BatchNorm) and module.training for module in self.modules()):
            raise ValueError(
                "batch norm is in training mode, in which other images of the batch change the "
                "detections: call model.eval() first"
            )
        batch, sizes = batch_images(images, self.pixel_mean, self.size_divisor)
        outputs = self(batch)
        flip_tta = thresholds.pop("flip_tta", False)
        return postprocess(
            outputs,
            output_anchors(self, outputs),
            sizes,
            num_classes=self.num_classes,
            mirrored=self(mirror_images(batch, sizes)) if flip_tta else None,
            **thresholds,
        )


def output_anchors(model: RetinaNet, outputs: Outputs) -> list[Tensor]:
    """Return the anchors of outputs, by level."""
    cells = [(level.shape[-2], level.shape[-1]) for level in outputs.logits]
    return level_anchors(model.anchors, cells, outputs.logits[0].device)


def build_retinanet(num_classes: int, spec: ModelSpec | None = None, **settings: Any) -> RetinaNet:
    """Build a RetinaNet for training, with a pretrained backbone or from scratch.

    Source: Lin et al. 2017, Sec. 4 and 4.1; the defaults are the paper's.

    Args:
        num_classes: K, without a background class.
        spec: the settings of the network; None: the paper's.
        settings: fields of :class:`retinanet.config.ModelSpec` that replace those of `spec`, among
            them ``backbone`` (resnet10_half, resnet18, 34, 50, 101, 152, resnext101_32x8d,
            mobilenet_v2, timm/NAME; or a class or function of your own, or its import path
            ``module:NAME``: :class:`retinanet.model.backbone.OwnBackbone`), ``head`` (of your own
            likewise, built for classes and boxes as ``Net(channels, outputs)``),
            ``backbone_weights`` ("default": ImageNet, downloaded once; "none"; or a file), ``norm``
            of the backbone ("frozen" or "trained" batch norm, "sync" for statistics over several
            GPUs, or "group" norm for training from scratch), ``p2`` (a level at stride 4 for small
            objects; not in the paper), and ``sizes`` (square root of the anchors' area in pixels,
            per level).

    Raises:
        ConfigError: a setting is unknown, out of range or contradicts another.
        WeightsError: the weights cannot be downloaded or do not fit.
        MissingExtraError: timm is not installed.
    """
    _check_num_classes(num_classes)
    spec = build_model_spec(spec, **settings)
    import_own({"backbone": spec.backbone, "head": spec.head})
    start = spec.backbone_weights
    if is_own(spec.backbone):
        if start not in ("default", "none"):
            raise ConfigError(
                f"backbone_weights {start!r} with the own backbone {spec.backbone!r}: load them in "
                "its constructor"
            )
        return to_channels_last(RetinaNet(num_classes, spec, frozen_stages=0))
    if spec.norm == "group" and start == "default":
        raise ConfigError(
            'norm "group" trains from scratch, but backbone_weights is "default" (ImageNet, with '
            "batch norm): set backbone_weights to none, or norm to frozen or trained"
        )
    if spec.norm == "frozen" and start == "none":
        # Without statistics nothing is normalized: activations grow from block to block.
        raise ConfigError(
            'norm "frozen" keeps the statistics of pretrained weights, but backbone_weights is '
            '"none": set norm to group (model.norm=group), or to trained or sync with large '
            "batches"
        )
    weights = find_weights(spec.backbone, start)
    if weights is None:
        return to_channels_last(RetinaNet(num_classes, spec, frozen_stages=0))
    if weights.keep_frozen and spec.norm != "frozen":
        raise ConfigError(
            f"backbone weights {weights.source} have their batch norm folded away: norm is "
            f'"frozen" with them, got {spec.norm!r}'
        )
    model = RetinaNet(
        num_classes,
        spec,
        pixel_mean=spec.pixel_mean or weights.pixel_mean,
        pixel_std=spec.pixel_std or weights.pixel_std,
        stride_padding=spec.stride_padding or weights.stride_padding,
    )
    load_backbone(model.backbone, weights)
    return to_channels_last(model)


def _check_num_classes(num_classes: Any) -> None:
    is_number = isinstance(num_classes, SupportsIndex) and not isinstance(num_classes, bool)
    if not is_number or num_classes.__index__() < 1:
        raise ConfigError(f"num_classes is a whole number of at least 1, got {num_classes!r}")


def to_channels_last(model: RetinaNet) -> RetinaNet:
    """Convert the weights to channels_last memory, in which convolutions are fastest."""
    return model.to(memory_format=torch.channels_last)
