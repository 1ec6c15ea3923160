"""Settings: names, defaults, limits, and the recipes that override them.

The defaults are the paper's (Lin et al. 2017; the section is on the line) or, where the paper is
silent, those of Detectron, with which its authors trained. Recipes override them and give reasons.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, Literal, Self, SupportsFloat, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)

from retinanet.errors import ConfigError

_UNITS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

Rounding = Literal["none", "torchvision"]
NmsKind = Literal["hard", "soft", "wbf"]
Tracker = Literal[
    "tensorboard", "wandb", "mlflow", "aim", "clearml", "comet_ml", "dvclive", "swanlab", "trackio"
]

_OTHER_NAMES = {
    "train.lr": ("learning_rate", "lr0", "base_lr", "initial_lr"),
    "train.batch_size": ("batch", "ims_per_batch", "samples_per_gpu"),
    "train.steps": ("max_iter", "iterations", "num_steps", "max_steps_total"),
    "train.epochs": ("max_epochs", "num_epochs"),
    "train.time": ("max_time", "time_limit"),
    "train.early_stop": ("patience", "early_stopping"),
    "train.warmup_steps": ("warmup_iters", "warmup_epochs", "warmup"),
    "train.milestones": ("lr_steps", "lr_step", "milestone"),
    "train.schedule": ("lr_scheduler", "lr_policy", "scheduler", "cos_lr"),
    "train.clip_norm": ("grad_clip", "clip_grad", "max_norm", "clip_gradients"),
    "train.accumulate": ("accumulation_steps", "gradient_accumulation_steps", "nbs"),
    "train.precision": ("amp", "mixed_precision", "fp16", "half", "dtype"),
    "train.validate_every": ("eval_period", "val_interval", "eval_interval"),
    "train.save_every": ("checkpoint_period", "save_period", "checkpoint_interval"),
    "train.weight_decay": ("wd",),
    "train.ema": ("ema_decay", "model_ema"),
    "train.init": ("load_from",),
    "data.image_size": ("imgsz", "img_size", "min_size", "min_size_train", "img_scale"),
    "data.max_size": ("max_size_train", "longest_side"),
    "data.horizontal_flip": ("fliplr", "hflip", "flip_ratio", "flip"),
    "data.vertical_flip": ("flipud", "vflip"),
    "data.workers": ("num_workers", "workers_per_gpu"),
    "data.colour": ("color", "hsv_h", "hsv_s", "hsv_v", "color_jitter"),
    "data.scale_jitter": ("scale", "scale_range"),
    "data.mosaic": ("mosaic_prob", "mosaic_p"),
    "data.mixup": ("mixup_prob", "mix_up"),
    "data.copy_paste": ("copypaste", "simple_copy_paste"),
    "data.close_augmentation": ("close_mosaic", "no_aug_epochs", "num_last_epochs"),
    "data.rotation": ("degrees", "rotate", "max_rotate_degree"),
    "data.rotate90": ("rot90", "random_rotate90"),
    "data.aspect_ratio_grouping": ("aspect_grouping", "aspect_ratio_group_factor", "rect"),
    "data.shear": ("max_shear_degree",),
    "data.translate": ("max_translate_ratio", "shift"),
    "data.erase": ("erasing", "random_erasing", "cutout"),
    "data.transform": ("transforms", "albumentations", "augmentations", "augment"),
    "data.single_class": ("single_cls",),
    "data.balance": ("sampler_train",),
    "data.balance_threshold": ("repeat_threshold", "oversample_thr"),
    "data.tile": ("tile_size", "slice_size", "slice_height", "slice_width", "patch_size"),
    "data.tile_overlap": ("overlap_height_ratio", "overlap_width_ratio"),
    "model.backbone": ("arch", "depth"),
    "model.backbone_weights": ("pretrained", "weights_backbone", "weights"),
    "model.norm": ("norm_layer", "norm_cfg", "sync_bn", "syncbn"),
    "model.box_bins": ("reg_max",),
    "model.frozen_stages": ("freeze", "freeze_at", "trainable_layers"),
    "anchors.sizes": ("anchor_sizes", "anchor_size"),
    "anchors.aspect_ratios": ("ratios", "anchor_ratios"),
    "matching.foreground_iou": ("fg_iou_thresh", "pos_iou_thr"),
    "matching.background_iou": ("bg_iou_thresh", "neg_iou_thr"),
    "loss.alpha": ("focal_loss_alpha", "focal_alpha"),
    "loss.gamma": ("focal_loss_gamma", "focal_gamma", "fl_gamma"),
    "loss.distribution_weight": ("dfl", "loss_dfl", "dfl_weight"),
    "loss.box_beta": ("smooth_l1_beta", "smooth_l1_loss_beta"),
    "detect.score_threshold": ("conf", "score_thresh", "score_thr", "score_thresh_test"),
    "detect.nms": ("nms_type", "nms_method"),
    "detect.nms_sigma": ("soft_nms_sigma", "sigma"),
    "detect.flip_tta": ("tta", "test_time_augmentation"),
    "detect.nms_threshold": ("iou", "nms_thresh", "iou_threshold", "nms_thresh_test"),
    "detect.detections_per_image": ("max_det", "max_per_img", "detections_per_img"),
    "detect.topk_candidates": ("nms_pre", "topk_candidates_test"),
    "detect.class_agnostic_nms": ("agnostic_nms", "class_agnostic"),
}
"""Names of a setting in torchvision, detectron2, mmdetection and Ultralytics."""


_NO_KEYWORDS = {
    "resume": ": the same call resumes a run, more_epochs extends a finished one",
    "callbacks": ": give a function of events as on_event",
}


def parse_seconds(text: str) -> float:
    """Parse a duration such as ``90s``, ``20min`` or ``1.5h``."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]+)\s*", text.lower())
    if found is None or found[2] not in _UNITS or float(found[1]) == 0:
        raise ValueError(f"{text!r} is not a duration over 0, such as 90s, 20min or 2h")
    return float(found[1]) * _UNITS[found[2]]


def is_own(name: object) -> bool:
    """Return True for an import path of the user's code, ``module:NAME`` (:mod:`retinanet.own`)."""
    return isinstance(name, str) and ":" in name and not name.startswith("timm/")


def _or_own(value: Any, check: Callable[[Any], Any]) -> Any:
    value = _plain(value)
    return value if is_own(value) else check(value)


OwnOr = WrapValidator(_or_own)
"""Accept ``module:NAME``, or the class or function itself, besides the names of a setting."""

QUALITY_LOSSES = ("quality_focal", "varifocal")
"""Classification losses whose target is a score in [0, 1] instead of 1."""

_OWN_PARTS = (
    *("model.backbone", "model.head"),
    *("matching.assignment", "loss.classification", "loss.box"),
)

EXACT_EPOCHS = {"train.min_steps": 1, "train.max_steps": 10**9}
"""Settings beside a stated number of epochs: a recipe's limits are for lengths that it computes."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _none(cls, values: Any) -> Any:
        # TOML has no null: "none" is None for a setting that may be None.
        if not isinstance(values, dict):
            return values
        return {
            key: None if value == "none" and _may_be_none(cls, key) else value
            for key, value in values.items()
        }


def _may_be_none(section: type[BaseModel], key: str) -> bool:
    info = section.model_fields.get(key)
    return info is not None and type(None) in get_args(info.annotation)


class ModelConfig(_Section):
    """The network (Sec. 4)."""

    backbone: str = "resnet50"  # Sec. 4; a name in BACKBONES, "timm/NAME" or "module:NAME"
    backbone_weights: str = "default"  # ImageNet weights: "default", "none", a file, IMAGENET1K_V2
    norm: Literal["frozen", "trained", "sync", "group"] = "frozen"  # backbone; Detectron: frozen
    frozen_stages: int = Field(2, ge=0, le=5)  # stem and C2 keep their weights (Detectron)
    p2: bool = False  # Sec. 4: levels P3 to P7
    p6_from: Literal["c5", "p5"] = "c5"  # Sec. 4
    p7_relu: bool = True  # Sec. 4, footnote 2: ReLU between P6 and P7; mmdetection has none
    channels: int = Field(256, ge=1)  # Sec. 4: of the pyramid and of the heads
    head: Annotated[Literal["conv"], OwnOr] = "conv"  # Sec. 4; or "module:NAME"
    head_depth: int = Field(4, ge=0)  # Sec. 4: 3x3 convolutions before the last, in each head
    head_norm: Literal["none", "group"] = "none"  # the paper has none
    box_bins: int = Field(0, ge=0)  # 0: deltas (Sec. 4); 16: distributions (Li et al. 2020, Sec. 3)
    prior: float = Field(0.01, gt=0, lt=1)  # Sec. 3.3: initial score of every anchor
    pixel_mean: tuple[float, float, float] | None = None  # 0..255; None: as the weights
    pixel_std: tuple[float, float, float] | None = None  # 0..255; None: as the weights
    stride_padding: Literal["symmetric", "same"] | None = None  # None: as the weights
    stride_in_1x1: bool = False  # stride of a bottleneck in its first convolution (He et al. 2015)

    @model_validator(mode="after")
    def _check_bins(self) -> Self:
        # A side is a quarter of the anchor's times 0..n away: 2 is the anchor itself.
        if 0 < self.box_bins < 4:
            raise ValueError(
                f"box_bins {self.box_bins} has no boxes of twice an anchor's side: set 4 or more "
                "(16: Li et al. 2020), or 0 for deltas"
            )
        return self


class AnchorConfig(_Section):
    """Anchors (Sec. 4): areas 32^2 to 512^2 on P3 to P7, 3 octave scales, 3 aspect ratios."""

    sizes: tuple[float, ...] | None = None  # square root of area per level; None: 4 x stride
    scales: tuple[float, ...] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # Sec. 4: 3 per octave
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    rounding: Rounding = "none"  # torchvision rounds to whole pixels

    @model_validator(mode="after")
    def _check_positive(self) -> Self:
        for name in ("sizes", "scales", "aspect_ratios"):
            numbers = getattr(self, name)
            if numbers is not None and not (numbers and min(numbers) > 0):
                raise ValueError(f"{name} {numbers} must be one or more positive numbers")
        return self


class ModelSpec(ModelConfig, AnchorConfig):
    """Everything but the number of classes that determines a network: ``model`` and ``anchors``."""

    norm_eps: float = Field(1e-5, ge=0)  # of batch norm; torchvision's v1 weights have 0


class MatchingConfig(_Section):
    """Matching of anchors to ground-truth boxes (Sec. 4)."""

    foreground_iou: float = Field(0.5, gt=0, le=1)  # Sec. 4: IoU from which an anchor is positive
    background_iou: float = Field(0.4, gt=0, le=1)  # Sec. 4: IoU under which it is background
    low_quality_matches: bool = False  # not in the paper; on in torchvision and detectron2
    assignment: Annotated[Literal["iou", "atss", "task_aligned"], OwnOr] = (
        "iou"  # Sec. 4; see docs/losses.md; or "module:NAME"
    )
    candidates: int = Field(9, ge=1)  # of atss: cells per level (Zhang et al. 2020, Sec. 3.3)
    task_topk: int = Field(13, ge=1)  # of task_aligned: anchors per object (Feng et al. 2021)
    task_beta: float = Field(6.0, ge=0)  # of task_aligned: exponent of the IoU (the same, Sec. 4)
    task_warmup: float = Field(1 / 3, ge=0, le=1)  # share of the steps with atss first (the same)

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.background_iou > self.foreground_iou:
            raise ValueError(
                f"background_iou {self.background_iou} is over foreground_iou {self.foreground_iou}"
            )
        return self


class LossConfig(_Section):
    """The losses (Sec. 3, 4.1 and 5.1)."""

    classification: Annotated[
        Literal["focal", "cross_entropy", "focal_star", "hinge", "quality_focal", "varifocal"],
        OwnOr,
    ] = "focal"  # Sec. 3.2; Appendix A; hinge: Sec. 5.1; or "module:NAME"
    alpha: float | tuple[float, ...] | None = 0.25  # Table 1b; of other losses: none
    gamma: float = Field(2.0, ge=0)  # Table 1b
    beta: float = 0.0  # of focal_star (Table 3)
    margin: float = Field(0.5, gt=0, le=1)  # of hinge (Sec. 5.1, which gives no number)
    mining: Literal["none", "ohem", "ohem_1_3"] = "none"  # Sec. 5.1
    mining_size: int = Field(128, ge=1)  # Sec. 5.1: anchors kept per image (Table 1d: 128 to 512)
    mining_nms: float = Field(0.7, gt=0, le=1)  # Sec. 5.1: IoU of the NMS (Table 1d: .7 and .5)
    box: Annotated[Literal["smooth_l1", "l1", "giou", "diou", "ciou"], OwnOr] = (
        "smooth_l1"  # Sec. 4.1; or "module:NAME"
    )
    box_beta: float = Field(0.11, gt=0)  # paper silent; Detectron .11
    box_weight: float = Field(1.0, ge=0)  # Sec. 4.1: the plain sum
    distribution_weight: float = Field(0.25, ge=0)  # with model.box_bins; Li et al. 2020: 1/4
    normalizer: Literal["image", "batch", "running"] = "image"  # Sec. 4.1: an image's own anchors

    @model_validator(mode="after")
    def _check_alpha(self) -> Self:
        values = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)
        if any(value is not None and not 0 <= value <= 1 for value in values):
            raise ValueError(f"alpha {self.alpha} is not in [0, 1]")
        if self.classification == "focal_star" and self.gamma == 0:
            raise ValueError("focal_star divides by gamma, which is 0")
        if self.mining != "none" and self.classification in QUALITY_LOSSES:
            raise ValueError(f"mining {self.mining} needs labels, {self.classification} has scores")
        if is_own(self.classification) and self.alpha is not None:
            raise ValueError(f"alpha {self.alpha} has no effect on {self.classification}: omit it")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _dependent_defaults(cls, values: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, dict):
            return build(values)
        stated = values.keys()
        # Sec. 5.1: OHEM trains with plain cross entropy.
        if values.get("mining", "none") != "none":
            values = {"classification": "cross_entropy", **values}
        # .25 is the best alpha with gamma 2 (Table 1b), and a bad one without it (Table 1a).
        # 1 - .25 is varifocal's weight of negatives (Zhang et al. 2021, Sec. 4.1).
        other = values.get("classification", "focal") not in ("focal", "varifocal")
        built = build({"alpha": None, **values} if other else values)
        built.model_fields_set.intersection_update(stated)  # a default is not stated
        return built


class LossSettings(LossConfig, MatchingConfig):
    """All settings of :func:`retinanet.losses.detection_losses`: ``loss`` and ``matching``."""

    @property
    def needs_outputs(self) -> bool:
        """Whether the anchors' objects or targets depend on the network's outputs."""
        return self.assignment != "iou" or self.classification in QUALITY_LOSSES

    def at(self, share: float) -> LossSettings:
        """Return the settings after a share of the steps.

        ``task_warmup`` starts with ATSS and, in place of a loss with the IoU as its target, the
        focal loss: at first all IoUs are low, and the classes of small or rare objects would learn
        next to nothing.

        Source: Feng et al. 2021, whose published code does both in 4 of 12 epochs.
        """
        if self.assignment != "task_aligned" or share >= self.task_warmup:
            return self
        first: dict[str, Any] = {"assignment": "atss"}
        if self.classification in QUALITY_LOSSES:
            first |= {"classification": "focal", "alpha": LossConfig().alpha}
        return self.model_copy(update=first)


class DataConfig(_Section):
    """Loading and augmentation of images (Sec. 4.1)."""

    image_size: int = Field(600, ge=32)  # Sec. 5: the shorter side, pixels
    max_size: int = Field(1000, ge=32)  # the longer side at most (Detectron)
    multi_scale: tuple[int, ...] = ()  # shorter sides to draw from, per step
    horizontal_flip: float = Field(0.5, ge=0, le=1)  # Sec. 4.1: the only augmentation
    vertical_flip: float = Field(0.0, ge=0, le=1)  # probability; the paper has none
    scale_jitter: tuple[float, float] = (1.0, 1.0)  # a factor drawn log-uniformly, per image
    crop: bool | Literal["iou"] = False  # to the size before jitter; "iou": SSD (Liu et al. 2016)
    rotate90: bool = False  # by 0, 90, 180 or 270 degrees: for images without an upper side
    rotation: float = Field(0.0, ge=0, le=180)  # degrees at most; boxes: Kalra et al. 2021
    shear: float = Field(0.0, ge=0, lt=45)  # degrees at most, of each axis
    translate: float = Field(0.0, ge=0, lt=1)  # share of the size at most, of each axis
    colour: float = Field(0.0, ge=0, le=1)  # strength of brightness, contrast, saturation, hue
    erase: float = Field(0.0, ge=0, le=1)  # probability; random erasing (Zhong et al. 2020)
    mosaic: float = Field(0.0, ge=0, le=1)  # probability; Bochkovskiy et al. 2020 (YOLOv4)
    mixup: float = Field(0.0, ge=0, le=1)  # probability; Zhang et al. 2018, boxes as YOLOX
    copy_paste: float = Field(0.0, ge=0, le=1)  # probability; Ghiasi et al. 2021, but of boxes
    close_augmentation: float = Field(0.05, ge=0, le=1)  # last share without mixing; YOLOX: 15/300
    transform: str | None = None  # MODULE:FUNCTION of your own, applied last
    any_corner: bool = False  # pad at random sides, not only right and below
    aspect_ratio_grouping: bool = True  # images of a batch are of similar shape (Detectron)
    order: Literal["images", "shards"] = "images"  # shards: a few at a time, for slow disks
    shard_window: int = Field(4, ge=1)  # shards shuffled together
    workers: int | Literal["auto"] = "auto"  # processes that load images
    val_fraction: float = Field(0.2, gt=0, lt=1)  # share of "val" where the data has no splits
    split_seed: int | None = None  # which images those are; None: by train.seed
    classes: tuple[str, ...] = ()  # train on these only; (): on all of the data
    single_class: bool = False  # all objects are of one class, "object"
    balance: Literal["none", "repeat_factor"] = "none"  # the paper has none
    balance_threshold: float = Field(0.001, gt=0, le=1)  # LVIS (Gupta et al. 2019), App. B.2
    tile: int | None = Field(None, ge=32)  # side of tiles to train on, pixels; none: whole images
    tile_overlap: float = Field(0.2, ge=0, lt=1)  # share of the side; SAHI (Akyon et al. 2022)
    empty_tiles: float = Field(0.1, ge=0, le=1)  # share of the tiles without objects, per epoch
    cache: Literal["none", "ram", "disk"] = "none"  # decoded images, from the first epoch on

    @field_validator("classes", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        # data.classes=[person,car] and data.classes=person,car are not TOML, but are clear.
        if isinstance(value, str):
            value = [name.strip() for name in value.strip("[] ").split(",") if name.strip()]
        return value

    @field_validator("tile", mode="before")
    @classmethod
    def _zero_is_none(cls, value: Any) -> Any:
        return None if value == 0 and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        low, high = self.scale_jitter
        if not 0 < low <= high:
            raise ValueError(f"scale_jitter {self.scale_jitter} is not 0 < low <= high")
        if any(side < 32 for side in self.multi_scale):
            raise ValueError(f"multi_scale {self.multi_scale} has a side under 32 pixels")
        for name in ("balance", "tile"):
            value = getattr(self, name)
            if self.order == "shards" and value not in ("none", None):
                raise ValueError(
                    f"{name} {value} draws single images or tiles, and order shards reads each "
                    f"shard once per epoch: give data.order=images, or data.{name}=none"
                )
        if self.max_size < self.image_size:
            raise ValueError(
                f"max_size {self.max_size}, the longer side at most, is under image_size "
                f"{self.image_size}, the shorter side: give both"
            )
        return self


class TrainConfig(_Section):
    """Optimisation (Sec. 4.1)."""

    steps: int = Field(90_000, ge=1)  # Sec. 4.1; unused where epochs is set
    epochs: float | None = Field(None, gt=0)  # steps from the data's size instead
    time: float | None = Field(None, gt=0)  # steps from this machine's speed: seconds, or "20min"
    min_steps: int = Field(1, ge=1)  # limits of what epochs gives
    max_steps: int = Field(10**9, ge=1)  # likewise
    batch_size: int = Field(16, ge=1)  # Sec. 4.1: over all devices
    accumulate: int = Field(1, ge=0)  # micro-batches of a batch; 0: those that memory needs
    optimizer: Literal["sgd", "adamw"] = "sgd"  # Sec. 4.1
    lr: float = Field(0.01, gt=0)  # Sec. 4.1, for reference_batch images per step
    reference_batch: int = Field(16, ge=1)  # linear rule (Goyal et al. 2017): lr * batch / this
    momentum: float = Field(0.9, ge=0, lt=1)  # Sec. 4.1
    weight_decay: float = Field(1e-4, ge=0)  # Sec. 4.1
    backbone_lr_factor: float = Field(1.0, ge=0)  # factor of the backbone's learning rate
    schedule: Literal["steps", "cosine"] = "steps"  # Sec. 4.1
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)  # Sec. 4.1: 60k and 80k of 90k; lr / 10 at each
    warmup_steps: int = Field(0, ge=0)  # not in the paper
    clip_norm: float = Field(0.0, ge=0)  # largest gradient norm; 0: none, as in the paper
    ema: float = Field(0.0, ge=0, lt=1)  # decay of the averaged weights; 0: none
    precision: Literal["auto", "float32", "bf16", "fp16"] = "float32"  # auto: bf16 if in hardware
    init: str | None = None  # a detector to start from: the network follows it (training.init)
    init_partial: bool = False  # start from it even where under 90% of its tensors fit
    class_map: str | None = None  # TOML or JSON: a class of the data = its name in init
    seed: int = Field(0, ge=0, lt=2**32)  # of weights, split, order and augmentation
    deterministic: bool = False  # bit-identical results, slower
    validate_every: float = Field(0.1, gt=0)  # in steps; under 1: a share of all steps
    val_images: int | None = Field(None, ge=1)  # images to validate on; none: all
    early_stop: int = Field(0, ge=0)  # validations without a better AP; 0: never stop
    tune_detection: bool = False  # then choose NMS and temperature on val; not in the paper
    target_ap50: float = Field(0.0, ge=0, le=1)  # stop once validation AP50 reaches it; 0: never
    save_every: int = Field(500, ge=1)  # steps between two states to resume from
    trackers: tuple[Tracker, ...] = ()  # log to these too: those of accelerate

    @field_validator("batch_size", mode="before")
    @classmethod
    def _check_batch(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.isdecimal():
            raise ValueError("give a number of images, or auto")
        return value

    @field_validator("time", mode="before")
    @classmethod
    def _parse_time(cls, value: Any) -> Any:
        return parse_seconds(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps {self.min_steps} is over max_steps {self.max_steps}")
        if self.accumulate and self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        if any(not 0 < share < 1 for share in self.milestones):
            raise ValueError(f"milestones {self.milestones} are shares of the steps, in (0, 1)")
        return self


class DetectConfig(_Section):
    """Post-processing settings (Sec. 4.1, Inference)."""

    score_threshold: float = Field(0.05, ge=0, lt=1)  # Sec. 4.1; detect: .3 or more
    topk_candidates: int = Field(1000, ge=1)  # per level
    nms: NmsKind = "hard"  # soft: Bodla et al. 2017; wbf: weighted boxes, Solovyev et al. 2021
    nms_threshold: float = Field(0.5, gt=0, le=1)  # Sec. 4.1: IoU, of hard and wbf
    nms_sigma: float = Field(0.5, gt=0)  # of soft: Bodla et al. 2017, Sec. 5
    detections_per_image: int = Field(100, ge=1)  # COCO's limit
    class_agnostic_nms: bool = False  # boxes of different classes suppress each other
    score_thresholds: dict[str, Annotated[float, Field(ge=0, lt=1)]] = {}  # by class; not for AP
    temperature: float = Field(1.0, gt=0)  # of the scores: Guo et al. 2017; 1: none
    flip_tta: bool = False  # the mirrored image too; not in the paper


class Recipe(_Section):
    """All settings of a run."""

    name: str = "paper_1x"
    auto: bool = False  # choose settings from the data, but for those that the user states
    model: ModelConfig = ModelConfig()
    anchors: AnchorConfig = AnchorConfig()
    matching: MatchingConfig = MatchingConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    detect: DetectConfig = DetectConfig()

    @model_validator(mode="after")
    def _check_distribution_weight(self) -> Self:
        weight = self.loss.distribution_weight
        # The network of train.init may have bins.
        unused = not self.model.box_bins and self.train.init is None
        if unused and weight not in (0, LossConfig().distribution_weight):
            raise ValueError(
                f"loss.distribution_weight {weight} has no effect without bins: set "
                "model.box_bins=16, or omit it"
            )
        return self

    @property
    def model_spec(self) -> ModelSpec:
        """The sections `model` and `anchors` together."""
        return ModelSpec(**self.model.model_dump(), **self.anchors.model_dump())

    @property
    def loss_settings(self) -> LossSettings:
        """The sections `loss` and `matching` together."""
        return LossSettings(**self.loss.model_dump(), **self.matching.model_dump())

    @property
    def own_parts(self) -> dict[str, str]:
        """The user's classes and functions among the settings, by ``section.key``."""
        return {key: self.value(key) for key in _OWN_PARTS if is_own(self.value(key))}

    @property
    def split_seed(self) -> int:
        """Seed of the validation split, where the data has no splits."""
        return self.train.seed if self.data.split_seed is None else self.data.split_seed

    def value(self, setting: str) -> Any:
        """Return the value of ``section.key``."""
        section, key = setting.split(".")
        return getattr(getattr(self, section), key)

    def states(self, setting: str) -> bool:
        """Whether the user set ``section.key``, so that ``auto`` must not choose it.

        Stated are overrides, settings in the user's own recipe file, and arguments of a section's
        constructor; values of the package's recipes are not.
        """
        section, key = setting.split(".")
        return key in getattr(self, section).model_fields_set

    def override(self, values: Mapping[str, Any]) -> Recipe:
        """Return a recipe with settings replaced, which are stated from then on.

        Args:
            values: by ``section.key``.

        Raises:
            ConfigError: a setting is unknown or out of range.
        """
        settings = self.model_dump()
        for key, value in values.items():
            _override(settings, key, value)
        # What the recipe has for another length or loss does not hold for this.
        if "train.steps" in values and "train.epochs" not in values:
            settings["train"]["epochs"] = None
        has_alpha = "loss.alpha" in values or self.states("loss.alpha")
        if "loss.classification" in values and not has_alpha:
            del settings["loss"]["alpha"]
        stated = {key for key in setting_names() if self.states(key)} | values.keys()
        return _with_stated(build_recipe(settings), stated)

    def choose(self, values: Mapping[str, Any]) -> Recipe:
        """Return a recipe with settings replaced that are not stated more than before.

        Args:
            values: by ``section.key``.

        Raises:
            ConfigError: a setting is unknown or out of range.
        """
        return _with_stated(self.override(values), filter(self.states, setting_names()))


def recipe_names() -> tuple[str, ...]:
    """List the recipes of the package."""
    folder = resources.files("retinanet") / "recipes"
    return tuple(
        sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))
    )


def load_recipe(
    name_or_file: str | Path = "quick", overrides: Iterable[str | tuple[str, Any]] = ()
) -> Recipe:
    """Load a recipe by name or from a TOML file, and override settings.

    Args:
        name_or_file: one of :func:`recipe_names`, or the path of a TOML file.
        overrides: such as ``train.lr=0.005`` or ``data.multi_scale=[400, 500]``; values are TOML,
            and a value that is not TOML is taken as text. Or pairs of a setting and its value.

    Raises:
        ConfigError: there is no such recipe or setting (the nearest name is given), or a value is
            of the wrong type or out of range.
    """
    values, where = _read_recipe(str(name_or_file))
    named: dict[str, Any] = {}
    for override in overrides:
        key, value = _split_override(override) if isinstance(override, str) else override
        if key == "train.steps" and "train.epochs" not in named:
            values.get("train", {}).pop("epochs", None)  # the recipe's: steps were given
        named[key] = value
        _override(values, key, value)
    lengths = [
        f"train.{name}"
        for name in ("steps", "epochs", "time")
        if named.get(f"train.{name}") not in (None, "none")
    ]
    if len(lengths) > 1:
        raise ConfigError(
            f"{' and '.join(lengths)} each set the length of the run: give one of them"
        )
    if "loss.mining" in named and "loss.classification" not in named:
        values["loss"].pop("classification", None)  # mining alone is of plain cross entropy
    recipe = build_recipe(values, where)
    return (
        _with_stated(recipe, named.keys() - {"auto"})
        if str(name_or_file) in recipe_names()
        else recipe
    )


def keyword_settings(
    name_or_file: str | Path, keywords: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Return the settings that keywords mean, such as ``lr`` for ``train.lr``.

    ``epochs`` is exact: the limits of the recipe, which are for lengths that it computes itself, do
    not apply. ``image_size`` alone keeps the ratio of the longer side's limit to it.
    """
    own = {setting.split(".")[1]: setting for setting in setting_names()}
    pairs: dict[str, Any] = {}
    for name, value in keywords.items():
        if name not in own:
            meant = setting_of(name)
            hint = f"; did you mean {meant.split('.')[1]}?" if meant else nearest(name, own)
            hint = _NO_KEYWORDS.get(name, hint)
            raise ConfigError(f"unknown keyword {name!r}{hint}")
        section, key = own[name].split(".")
        if value is None and not _may_be_none(_sections()[section], key):
            continue  # as if it were not given
        if name == "transform" and hasattr(value, "forward"):
            raise ConfigError(
                f"transform is the name of the {type(value).__name__} at the top level of a "
                'module, "my_code:NAME": processes that load images, and a resumed run, import it'
            )
        pairs[own[name]] = _plain(value)
    if pairs.get("train.epochs") is not None:
        pairs = {**EXACT_EPOCHS, **pairs}
    if "data.image_size" in pairs and "data.max_size" not in pairs:
        sides = load_recipe(name_or_file).data
        size = pairs["data.image_size"]
        if not isinstance(size, SupportsFloat) or float(size) % 1:
            raise ConfigError(f"image_size is a whole number of pixels, got {size!r}")
        pairs["data.max_size"] = round(float(size) * sides.max_size / sides.image_size)
    return list(pairs.items())


def load_with_keywords(
    name_or_file: str | Path,
    settings: Iterable[str | tuple[str, Any]],
    keywords: Mapping[str, Any],
) -> Recipe:
    """Load a recipe with settings as :func:`load_recipe` and keywords as :func:`keyword_settings`.

    Raises:
        ConfigError: as these; or a setting is given in both ways.
    """
    settings = list(settings)
    pairs = dict(keyword_settings(name_or_file, keywords))
    keys = {s.partition("=")[0].strip() if isinstance(s, str) else s[0] for s in settings}
    for key in keys & pairs.keys():
        name = key.split(".")[1]
        if name in keywords:
            raise ConfigError(f"{key} is given twice: as a setting and by {name}; give one of them")
    return load_recipe(name_or_file, [*pairs.items(), *settings])


def build_recipe(values: Mapping[str, Any], where: str = "") -> Recipe:
    """Build a recipe from nested plain values."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}" if where else explain(error)) from None


def _with_stated(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Return the same values, of which only `settings` are stated by the user."""
    stated: dict[str, set[str]] = {name: set() for name in _sections()}
    for setting in settings:
        section, key = setting.split(".")
        stated[section].add(key)
    sections = {
        name: kind.model_construct(stated[name], **dict(getattr(recipe, name)))
        for name, kind in _sections().items()
    }
    return recipe.model_copy(update=sections)


def build_model_spec(spec: ModelSpec | None = None, **settings: Any) -> ModelSpec:
    """Return a spec with settings replaced.

    Raises:
        ConfigError: an unknown name (the nearest is given), a wrong type or a value out of range.
    """
    values = {} if spec is None else spec.model_dump()
    given = {name: _plain(value) for name, value in settings.items()}
    if given.get("backbone_weights", "") is None:
        raise ConfigError('backbone_weights is None: give "none" (random) or "default" (ImageNet)')
    try:
        return ModelSpec.model_validate(values | given)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def build_loss_settings(**settings: Any) -> LossSettings:
    """Return the paper's loss settings with some replaced.

    Raises:
        ConfigError: an unknown name (the nearest is given), a wrong type or a value out of range.
    """
    try:
        return LossSettings.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def _plain(value: Any) -> Any:
    """Return a path, or a class or function by its import path, as text; others unchanged."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, type | FunctionType):
        return f"{_module_name(value)}:{value.__qualname__}"
    if hasattr(value, "forward"):
        name = type(value).__qualname__
        raise ConfigError(f"give the class {name}, not an instance: a checkpoint names the class")
    return value


def _module_name(value: Any) -> str:
    """Return the module of a class or function; of a script that runs, as which it is imported."""
    name, script = str(value.__module__), sys.modules["__main__"]
    if name != "__main__" or getattr(script, "__file__", None) is None:
        return name
    spec = getattr(script, "__spec__", None)
    name = Path(str(script.__file__)).stem if spec is None else spec.name
    sys.modules.setdefault(name, script)
    return name


def nearest(word: str, known: Iterable[str]) -> str:
    """Return '; did you mean X?' for the known name nearest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def unknown_setting(key: str) -> str:
    """Compose the message for a setting that does not exist, with the probable one."""
    meant = setting_of(key.split(".")[-1])
    hint = f"; did you mean {meant}?" if meant else nearest(key, setting_names())
    return f"unknown setting {key!r}{hint}"


def setting_of(name: str) -> str | None:
    """Find the setting whose last part, or whose name in another tool, is `name`."""
    name = name.lower()
    meant = [setting for setting in setting_names() if setting.split(".")[1] == name]
    meant += [setting for setting, others in _OTHER_NAMES.items() if name in others]
    return meant[0] if meant else None


def repeated_names(names: Iterable[str]) -> list[str]:
    """List the names that occur more than once, each once."""
    return [name for name, count in Counter(names).items() if count > 1]


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Join names, at most `limit` of them: ``a, b and 3 more``."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Raise a ConfigError with the nearest name unless `value` is among `known`."""
    known = tuple(known)
    if value not in known:
        raise ConfigError(
            f"{what} {value!r} is not one of {', '.join(known)}{nearest(value, known)}"
        )


def to_toml(recipe: Recipe) -> str:
    """Write the recipe as TOML that :func:`load_recipe` reads back unchanged."""
    lines = [f"{key} = {setting_text(getattr(recipe, key))}" for key in ("name", "auto")]
    for section in _sections():
        lines += ["", f"[{section}]"]
        for key, value in getattr(recipe, section):
            default = type(getattr(recipe, section)).model_fields[key].default
            if value is not None or default is not None:
                lines.append(f"{key} = {setting_text(value)}")
    return "\n".join(lines) + "\n"


def setting_names() -> tuple[str, ...]:
    """List all settings as ``section.key``."""
    return tuple(
        f"{section}.{key}" for section, kind in _sections().items() for key in kind.model_fields
    )


def _sections() -> dict[str, type[_Section]]:
    return {
        name: kind.annotation
        for name, kind in Recipe.model_fields.items()
        if isinstance(kind.annotation, type) and issubclass(kind.annotation, _Section)
    }


def _read_recipe(name: str) -> tuple[dict[str, Any], str]:
    file = Path(name)
    if name in recipe_names():
        text = (resources.files("retinanet") / "recipes" / f"{name}.toml").read_text("utf-8")
    elif file.suffix == ".toml" or file.is_file():
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe {name}: cannot be read: {error}") from None
    else:
        known = recipe_names()
        raise ConfigError(
            f"recipe {name!r} is neither a file nor one of {', '.join(known)}{nearest(name, known)}"
        )
    try:
        # The package's own are valid: there an error is in what overrides them.
        return tomllib.loads(text), "" if name in recipe_names() else f"recipe {name}"
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {name} is not TOML: {error}") from None


def _split_override(text: str) -> tuple[str, Any]:
    key, given, value = text.partition("=")
    if not given:
        raise ConfigError(f"{text!r} is not a setting: write key=value, as in train.lr=0.005")
    return key.strip(), _parse_value(value.strip())


def _parse_value(text: str) -> Any:
    # Then with zeros: TOML does not accept .5 as a number.
    for written in (text, re.sub(r"(?<![\w.])\.(?=\d)", "0.", text)):
        try:
            return tomllib.loads(f"value = {written}")["value"]
        except tomllib.TOMLDecodeError:
            continue
    return text


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    if key == "auto":
        values[key] = value
        return
    if key == "train.batch_size" and value == "auto":  # the recipe's, and as memory allows
        key, value = "train.accumulate", 0
    if key not in setting_names():
        raise ConfigError(unknown_setting(key))
    section, name = key.split(".")
    values.setdefault(section, {})[name] = value


def explain(error: ValidationError) -> str:
    """Compose a line from the first of pydantic's errors."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    if first["type"] == "extra_forbidden":
        return unknown_setting(where)
    got = first.get("input")
    shown = "" if isinstance(got, dict | BaseModel) else f" (got {got!r})"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}{': ' * bool(where)}{message}{shown}" + (
        f"; {len(error.errors()) - 1} more" if len(error.errors()) > 1 else ""
    )


def setting_text(value: Any) -> str:
    """Write a value as TOML, so that ``key=value`` and :func:`load_recipe` read it back."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # JSON's escapes are TOML's
    if isinstance(value, tuple | list):
        return "[" + ", ".join(setting_text(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = (f"{setting_text(key)} = {setting_text(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    return repr(value)
