"""Backbones: images to feature maps C2..C5, and their ImageNet weights.

Source: Lin et al. 2017, Sec. 4 (ResNet on ImageNet). The networks are torchvision's
(:mod:`retinanet.model.networks`) or, with an extra, timm's. C2..C5 are the last feature maps at
strides 4, 8, 16 and 32.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retinanet.config import check_choice, is_own, nearest
from retinanet.errors import ConfigError, WeightsError, import_extra
from retinanet.model.networks import Backbone, Bottleneck, Maps, MobileNetV2, NormLayer, ResNet
from retinanet.model.norms import (
    FrozenBatchNorm2d,
    adapt_timm,
    adapt_torchvision,
    group_norm,
    replace_batch_norm,
)
from retinanet.model.weight_files import read_tensors
from retinanet.own import build_module
from retinanet.structures import is_eager

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
"""Statistics of 0..255 RGB with which torchvision's ImageNet weights were trained."""

CHOICES = (
    "give a file (--backbone-weights FILE), or none to train from scratch "
    "(--backbone-weights none model.norm=group)"
)


class OwnBackbone(Backbone):
    """A network of the user, whose feature maps are selected by their strides.

    Args:
        net: a module with ``channels`` and ``strides``, a number per feature map (or timm's
            ``feature_info``), whose forward returns the maps as a list, a tuple or a dict.
        name: for messages.

    Raises:
        ConfigError: the module does not state channels and strides, or lacks stride 8, 16 or 32.
    """

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        info = getattr(net, "feature_info", None)
        strides = getattr(net, "strides", None) if info is None else info.reduction()
        widths = getattr(net, "channels", None) if info is None else info.channels()
        if strides is None or widths is None or len(strides) != len(widths):
            raise ConfigError(
                f"backbone {name!r} states strides {strides} and channels {widths}; give it "
                "attributes strides and channels, with a number per feature map"
            )
        last = {int(stride): index for index, stride in enumerate(strides)}
        if missing := [stride for stride in (8, 16, 32) if stride not in last]:
            raise ConfigError(
                f"backbone {name!r} has feature maps at strides {sorted(last)}; "
                f"{missing} are needed"
            )
        self.net = net
        self.count = len(strides)
        self.indices = [last.get(stride, -1) for stride in (4, 8, 16, 32)]
        two, three, four, five = (int(widths[i]) if i >= 0 else 0 for i in self.indices)
        self.channels = (two, three, four, five)

    def forward(self, images: Tensor) -> Maps:
        """Map images to C2..C5."""
        maps = self.net(images)
        maps = list(maps.values()) if isinstance(maps, Mapping) else maps
        if len(maps) != self.count:
            raise ValueError(f"the backbone returned {len(maps)} maps for {self.count} strides")
        two, three, four, five = self.indices
        found = maps[two] if two >= 0 else None, maps[three], maps[four], maps[five]
        if not isinstance(images, Tensor) or not is_eager():  # traced: without fixed sides
            return found
        for x, channels, stride in zip(found, self.channels, (4, 8, 16, 32), strict=True):
            if x is None:
                continue
            sides = [images.shape[2] // stride, images.shape[3] // stride]
            if [*x.shape[1:]] != [channels, *sides]:
                raise ValueError(
                    f"the backbone returned a map {tuple(x.shape)} for {channels} channels and "
                    f"stride {stride} of images {tuple(images.shape)}; correct its attributes "
                    "channels and strides, or its forward"
                )
        return found

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        """Raise ConfigError: the stages of the module are unknown."""
        raise ConfigError(
            "the stages of an own backbone are unknown: set frozen_stages=0 and freeze its "
            "parameters (requires_grad_(False)) in its constructor"
        )


class Timm(OwnBackbone):
    """A timm network that returns feature maps."""

    def __init__(self, name: str, norm: str) -> None:
        timm = import_extra("timm", "timm")
        short = name.removeprefix("timm/")
        # For a name with a slash or a colon timm would look on the internet.
        if not re.fullmatch(r"[\w.]+", short) or not timm.is_model(short):
            raise ConfigError(f"backbone {name!r}: timm has no {short!r}; see timm.list_models()")
        try:
            net = timm.create_model(short, features_only=True, pretrained=False)
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise ConfigError(
                f"backbone {name!r} has no feature maps: {_first_line(error)}"
            ) from None
        super().__init__(net, name)
        if norm == "group":
            replace_batch_norm(net, group_norm)
        adapt_timm(
            self,
            padded=timm.layers.Conv2dSame,
            # Images are multiples of 32: below stride 32 every side is even.
            constant=max(net.feature_info.reduction()) <= 32,
            frozen=norm == "frozen",
        )

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        """Return the parameters of the stages, whose last modules are known by name."""
        info: Any = self.net.feature_info
        strides = dict(zip(info.module_name(), info.reduction(), strict=True))
        # timm may flatten stages.0 to a child stages_0.
        strides |= {name.replace(".", "_"): stride for name, stride in strides.items()}
        ends: dict[int, int] = {}
        before = 0
        for name, module in self.net.named_modules():
            if name in strides:
                ends[strides[name]] = before + len(list(module.parameters()))
            before += len(list(module.parameters(recurse=False)))
        if not all(ends.get(stride) for stride in (8, 16, 32)):
            raise ConfigError(
                "the stages of this timm backbone are unknown: set model.frozen_stages=0"
            )
        parameters = list(self.net.parameters())
        stem = min(ends.get(2, 0), ends[8])
        bounds = [0, stem, max(stem, ends.get(4, stem)), ends[8], ends[16], len(parameters)]
        return [parameters[start:end] for start, end in pairwise(bounds)]


BACKBONES: dict[str, Callable[[str, NormLayer], Backbone]] = {
    **dict.fromkeys(ResNet.blocks, ResNet),
    "mobilenet_v2": MobileNetV2,
}


def build_backbone(
    name: str,
    *,
    norm: str = "frozen",
    frozen_stages: int = 0,
    norm_eps: float = 1e-5,
    stride_padding: str = "symmetric",
    stride_in_1x1: bool = False,
) -> Backbone:
    """Build a backbone with random weights.

    Args:
        name: a name in ``BACKBONES``, ``timm/NAME``, or ``module:NAME`` of an imported module: a
            class of ``torch.nn.Module`` without arguments, or a function that returns one
            (:class:`OwnBackbone`). Its norms, padding and weights are its own: the other arguments
            do not apply.
            Networks of timm that pad as TensorFlow does (``timm/tf_...``) are for images whose
            sides are multiples of 32, as in RetinaNet: with others their maps are shifted against
            timm's.
        norm: "frozen": batch norm with fixed statistics, scale and offset; "trained": batch norm as
            usual; "sync": the same, but with statistics over all processes of a training on several
            GPUs (Peng et al. 2018, MegDet, Sec. 3.2); "group": group norm (Wu and He 2018).
        frozen_stages: number (0..5) of the stem, C2, C3, C4, C5 that are not trained.
        norm_eps: of batch norm; only for torchvision's networks.
        stride_padding: of stride-2 convolutions: "symmetric" (torch), or "same": at the right and
            the bottom, which is TensorFlow's SAME for even sizes.
        stride_in_1x1: put the stride of a bottleneck into its first convolution (He et al. 2015,
            and their published weights), not into its 3x3 convolution (torchvision).

    Raises:
        ConfigError: an argument is invalid, or the network lacks the feature maps.
        MissingExtraError: the backbone is timm's, which is not installed.
    """
    check_choice("norm", norm, ("frozen", "trained", "sync", "group"))
    check_choice("stride_padding", stride_padding, ("symmetric", "same"))
    if not 0 <= frozen_stages <= 5:
        raise ConfigError(f"frozen_stages is 0 to 5 (the stem and C2 to C5), got {frozen_stages}")
    backbone: Backbone
    if is_own(name):
        net = build_module("backbone", name)
        backbone = net if isinstance(net, Backbone) else OwnBackbone(net, name)
        if frozen_stages:
            backbone.stage_parameters()
        return backbone.train()
    if name.startswith("timm/"):
        backbone = Timm(name, norm)
    elif name in BACKBONES:
        kind = FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d
        layer = group_norm if norm == "group" else partial(kind, eps=norm_eps)
        backbone = BACKBONES[name](name, layer)
    else:
        known = ", ".join(BACKBONES)
        hint = nearest(name, BACKBONES)
        raise ConfigError(
            f"there is no backbone {name!r}: choose {known}, timm/NAME or module:NAME{hint}"
        )
    if stride_in_1x1:
        blocks = [module for module in backbone.modules() if isinstance(module, Bottleneck)]
        if not blocks:
            raise ConfigError(f"stride_in_1x1 is for ResNets with bottlenecks, got {name!r}")
        for block in blocks:
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    if not isinstance(backbone, Timm):
        adapt_torchvision(backbone, same_padding=stride_padding == "same")
    if norm == "frozen":
        for module in backbone.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
    if frozen_stages:
        for stage in backbone.stage_parameters()[:frozen_stages]:
            for parameter in stage:
                parameter.requires_grad_(False)
    return backbone.train()


def has_c2(name: str) -> bool:
    """Return True if a backbone has a feature map at stride 4."""
    return name in BACKBONES or bool(build_backbone(name).channels[0])


class BackboneWeights(NamedTuple):
    """Weights for a backbone and what their file states about the input; None: nothing stated."""

    state: dict[str, Tensor]
    source: str
    pixel_mean: tuple[float, float, float] | None = None
    pixel_std: tuple[float, float, float] | None = None
    stride_padding: str | None = None
    keep_frozen: bool = False
    timm: str | None = None


def find_weights(name: str, weights: str | Path) -> BackboneWeights | None:
    """Find ImageNet weights of a backbone.

    Args:
        name: of the backbone.
        weights: "default": torchvision's IMAGENET1K_V1 (timm's own for timm), downloaded once and
            cached; another of torchvision's entries by name (IMAGENET1K_V2, or with its class,
            ResNet50_Weights.IMAGENET1K_V2); "none"; or a .safetensors or torch .pth file in
            torchvision's layout, with or without the classifier. Opening a file runs no code.
    """
    if str(weights) == "none":
        return None
    if _ENTRY.fullmatch(str(weights)):
        entry = _find_entry(name, str(weights))
        return BackboneWeights(fetch_state(entry, CHOICES), entry.url)
    if str(weights) != "default":
        return _read_weights(Path(weights))
    if name.startswith("timm/"):
        return _fetch_timm(name)
    if name not in BACKBONES:
        return None  # build_backbone raises the error
    # torchvision's first weights are the nearest to He et al.'s, which the paper uses.
    entry = _find_entry(name, "IMAGENET1K_V1")
    return BackboneWeights(fetch_state(entry, CHOICES), entry.url)


def check_weights_file(weights: str) -> None:
    """Raise a WeightsError where weights are neither a name nor a file that exists."""
    is_name = weights in ("none", "default") or _ENTRY.fullmatch(weights)
    if not is_name and not Path(weights).is_file():
        _read_weights(Path(weights))


_ENTRY = re.compile(r"(?:(?P<kind>\w+_Weights)\.)?(?P<entry>[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*_V\d+)")


def _find_entry(name: str, entry: str) -> Any:
    """Return a torchvision weights entry of a backbone by name."""
    import torchvision  # slow: it imports torch's compiler

    is_known = name in BACKBONES and name in torchvision.models.list_models()
    entries = list(torchvision.models.get_model_weights(name)) if is_known else []
    if name in BACKBONES and not entries:
        raise WeightsError(f"there are no ImageNet weights of {name}; {CHOICES}")
    known = {known for item in entries for known in (item.name, str(item))}
    check_choice(f"weights of {name}", entry, sorted(known) or ["default", "none", "a file"])
    return next(item for item in entries if entry in (item.name, str(item)))


def fetch_state(entry: Any, otherwise: str) -> dict[str, Tensor]:
    """Return the tensors of a torchvision weights entry, from torch's cache or the internet."""
    try:
        state: dict[str, Tensor] = entry.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location="cpu"
        )
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise WeightsError(f"cannot fetch {entry.url}: {_first_line(error)}; {otherwise}") from None
    return state


def load_backbone(backbone: Backbone, weights: BackboneWeights) -> None:
    """Load weights into a backbone: every tensor of it, exactly."""
    inner = backbone.net if isinstance(backbone, Timm) else backbone
    wanted = inner.state_dict()
    state = _without_classifier(weights.state, wanted)
    if misfits := _misfits(wanted, state):
        if (name := _backbone_of(weights)) and not isinstance(backbone, Timm):
            misfits = f"they are those of {name}: set model.backbone={name}"
        raise WeightsError(f"backbone weights {weights.source} do not fit the network: {misfits}")
    inner.load_state_dict(state, strict=False)


def backbone_of(weights: str) -> str | None:
    """Return the backbone that weights are of; None: they do not determine it.

    A file is of the network whose tensors it has, or of timm's that its metadata name as
    ``layout``; an entry of torchvision is of that in its name (ResNet50_Weights.IMAGENET1K_V2).

    Raises:
        WeightsError: the file does not exist or contains no tensors.
    """
    if weights in ("default", "none"):
        return None
    if entry := _ENTRY.fullmatch(weights):
        name = (entry["kind"] or "").removesuffix("_Weights").lower()
        return name if name in BACKBONES else None
    return _backbone_of(_read_weights(Path(weights)))


def _backbone_of(weights: BackboneWeights) -> str | None:
    if weights.timm:
        return f"timm/{weights.timm}"
    with torch.device("meta"):
        for name in BACKBONES:
            wanted = build_backbone(name, norm="trained").state_dict()
            if not _misfits(wanted, _without_classifier(weights.state, wanted)):
                return name
    return None


def _without_classifier(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    names = ("fc.", "classifier.", "head.")
    return {key: state[key] for key in state if key in wanted or not key.startswith(names)}


def check_state(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Compare names and shapes of a state dict with those that a network needs."""
    if misfits := _misfits(wanted, state):
        raise WeightsError(f"{what} do not fit the network: {misfits}")


def _misfits(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Describe the tensors that are missing, unknown, or of another shape; empty: none."""
    # Batch norm's count of batches is not used; old files lack it.
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in wanted and not k.endswith("num_batches_tracked")]
    shapes = [
        f"{k} is {_shape(state[k])}, not {_shape(wanted[k])}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    return "; ".join(
        f"{len(names)} {word} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for word, names in kinds
        if names
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a number"


def _read_weights(file: Path) -> BackboneWeights:
    where = f"backbone weights {file}"
    content = read_tensors(file, where, f"; {CHOICES}")
    mean, std = _stated_input(content.metadata.get("input", ""), where)
    timm = re.match(r"timm[ /]([\w.]+)", content.metadata.get("layout", ""))
    return BackboneWeights(
        content.state,
        str(file),
        mean,
        std,
        "same" if re.search(r"\bSAME\b", content.metadata.get("padding", "")) else None,
        "frozen" in content.metadata.get("batch_norm", ""),
        timm[1] if timm else None,
    )


def _stated_input(
    text: str, where: str
) -> tuple[tuple[float, float, float] | None, tuple[float, float, float] | None]:
    """Parse mean and standard deviation from metadata such as ``RGB, (x - 127.5) / 127.5``."""
    if not text:
        return None, None
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"\s*RGB\s*,\s*\(x - {number}\) / {number}\s*", text)
    if not match or float(match[2]) == 0:
        raise WeightsError(
            f"{where}: unknown format of its metadata input {text!r}; give model.pixel_mean and "
            "model.pixel_std, and remove that line from the file"
        )
    mean, std = float(match[1]), float(match[2])
    return (mean, mean, mean), (std, std, std)


def _fetch_timm(name: str) -> BackboneWeights:
    timm = import_extra("timm", "timm")
    try:
        net = timm.create_model(name.removeprefix("timm/"), features_only=True, pretrained=True)
    except Exception as error:  # timm's downloader has no exception of its own
        raise WeightsError(
            f"cannot fetch weights of {name}: {_first_line(error)}; {CHOICES}"
        ) from None
    mean, std = (
        tuple(255.0 * value for value in net.pretrained_cfg.get(key, default))
        for key, default in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225)))
    )
    return BackboneWeights(dict(net.state_dict()), name, mean, std)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
