"""Backbones: images to feature maps C2..C5, and where their ImageNet weights come from.

Source: Lin et al. 2017, Sec. 4 (ResNet on ImageNet); the networks are torchvision's, or timm's as
an extra. C2..C5 are the last feature maps at strides 4, 8, 16 and 32.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from retinanet.config import nearest
from retinanet.errors import ConfigError, MissingExtraError, WeightsError

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
"""What torchvision's ImageNet weights were trained with, as 0..255 RGB."""

CHOICES = (
    "give a file (--backbone-weights FILE), or none to start from nothing "
    "(--backbone-weights none model.norm=group)"
)


class Backbone(nn.Module):
    """Feature maps of an image.

    Attributes:
        channels: of C2, C3, C4, C5; 0 for a C2 that the network does not have.
    """

    channels: tuple[int, int, int, int]

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """(B, 3, H, W) normalised to C2..C5: (B, channels[i], H / s, W / s), s = 4, 8, 16, 32."""
        raise NotImplementedError

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        """Parameters of the stem and of the stages that make C2, C3, C4 and C5."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """As any module, but batch norm whose weights are frozen keeps its statistics too."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and not _is_trained(module):
                module.eval()
        return self


def _is_trained(norm: _BatchNorm) -> bool:
    return norm.weight is not None and norm.weight.requires_grad


class ResNet(Backbone):
    """torchvision's ResNet or ResNeXt without its classifier; the names of its weights are kept."""

    def __init__(self, name: str, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        net = torchvision.models.get_model(name, weights=None, norm_layer=norm_layer, num_classes=1)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        widest = net.fc.in_features
        self.channels = (widest // 8, widest // 4, widest // 2, widest)

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        c2 = self.layer1(stem)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return c2, c3, c4, self.layer4(c4)

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        stem = [*self.conv1.parameters(), *self.bn1.parameters()]
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        return [stem, *(list(stage.parameters()) for stage in stages)]


class MobileNetV2(Backbone):
    """torchvision's MobileNetV2 without its classifier; C5 is its last, 1280-channel map."""

    ends = (2, 4, 7, 14, 19)  # of the stem, C2, C3, C4, C5 in `features`

    def __init__(self, name: str, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        net = torchvision.models.get_model(name, weights=None, norm_layer=norm_layer, num_classes=1)
        self.features = net.features
        self.channels = (24, 32, 96, 1280)

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        maps, x = [], images
        for place, block in enumerate(self.features, start=1):
            x = block(x)
            if place in self.ends[1:]:
                maps.append(x)
        c2, c3, c4, c5 = maps
        return c2, c3, c4, c5

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        starts = (0, *self.ends[:-1])
        return [
            list(self.features[start:end].parameters())
            for start, end in zip(starts, self.ends, strict=True)
        ]


class Timm(Backbone):
    """A timm network that gives feature maps at strides 8, 16 and 32."""

    def __init__(self, name: str, norm_layer: Callable[[int], nn.Module] | None) -> None:
        super().__init__()
        timm = _import_timm()
        short = name.removeprefix("timm/")
        # A name with a slash or a colon would make timm look on the internet for a description.
        if not re.fullmatch(r"[\w.]+", short) or not timm.is_model(short):
            raise ConfigError(f"backbone {name!r}: timm has no {short!r}; see timm.list_models()")
        try:
            self.net = timm.create_model(short, features_only=True, pretrained=False)
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise ConfigError(f"backbone {name!r} gives no feature maps: {_line(error)}") from None
        strides = self.net.feature_info.reduction()
        if not {8, 16, 32} <= set(strides):
            raise ConfigError(
                f"backbone {name!r} has feature maps at strides {sorted(set(strides))}; "
                "8, 16 and 32 are needed"
            )
        self.places = [
            max((i for i, one in enumerate(strides) if one == stride), default=-1)
            for stride in (4, 8, 16, 32)
        ]
        widths = self.net.feature_info.channels()
        two, three, four, five = (widths[i] if i >= 0 else 0 for i in self.places)
        self.channels = (two, three, four, five)
        if norm_layer is not None:
            _replace_batch_norm(self.net, norm_layer)

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        maps = self.net(images)
        two, three, four, five = self.places
        return maps[two] if two >= 0 else None, maps[three], maps[four], maps[five]

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        info = self.net.feature_info
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
                "it is not known where the stages of this timm backbone end: "
                "set model.frozen_stages=0"
            )
        parameters = list(self.net.parameters())
        stem = min(ends.get(2, 0), ends[8])
        bounds = [0, stem, max(stem, ends.get(4, stem)), ends[8], ends[16], len(parameters)]
        return [parameters[start:end] for start, end in pairwise(bounds)]


RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext101_32x8d",
)
BACKBONES: dict[str, Callable[[str, Callable[[int], nn.Module]], Backbone]] = {
    **dict.fromkeys(RESNETS, ResNet),
    "mobilenet_v2": MobileNetV2,
}


def build_backbone(
    name: str,
    *,
    norm: str = "frozen",
    frozen_stages: int = 0,
    norm_eps: float = 1e-5,
    stride_padding: str = "symmetric",
) -> Backbone:
    """A backbone with random weights.

    Args:
        name: one of ``BACKBONES``, or ``timm/NAME``.
        norm: "frozen": batch norm with fixed statistics, scale and offset; "trained": batch norm as
            usual; "group": group norm in its place (Wu and He 2018).
        frozen_stages: 0..5: that many of the stem, C2, C3, C4, C5 are not trained.
        norm_eps: of batch norm; torchvision's own networks alone.
        stride_padding: of stride-2 convolutions: "symmetric" (torch), or "same": at the right and
            the bottom, which is TensorFlow's SAME for even sizes.

    Raises:
        ConfigError: there is no such backbone, or it does not give the feature maps.
        MissingExtraError: timm is asked for and not installed.
    """
    if norm not in ("frozen", "trained", "group"):
        raise ConfigError(f"norm {norm!r} is none of frozen, trained, group")
    if stride_padding not in ("symmetric", "same"):
        raise ConfigError(f"stride_padding {stride_padding!r} is neither symmetric nor same")
    if not 0 <= frozen_stages <= 5:
        raise ConfigError(f"frozen_stages is 0 to 5 (the stem and C2 to C5), got {frozen_stages}")
    backbone: Backbone
    if name.startswith("timm/"):
        backbone = Timm(name, group_norm if norm == "group" else None)
    elif name in BACKBONES:
        kind = FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d
        layer = group_norm if norm == "group" else partial(kind, eps=norm_eps)
        backbone = BACKBONES[name](name, layer)
    else:
        known = ", ".join(BACKBONES)
        hint = nearest(name, BACKBONES)
        raise ConfigError(f"there is no backbone {name!r}: choose {known} or timm/NAME{hint}")
    if stride_padding == "same":
        _pad_right_and_bottom(backbone)
    if norm == "frozen":
        for module in backbone.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
        _fold_frozen_norms(backbone)
    if frozen_stages:
        for stage in backbone.stage_parameters()[:frozen_stages]:
            for parameter in stage:
                parameter.requires_grad_(False)
    return backbone.train()


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm in 32 groups, or as many as leave at least two channels in each."""
    groups = max((g for g in (32, 16, 8, 4, 2) if channels % (2 * g) == 0), default=1)
    return nn.GroupNorm(groups, channels)


def scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """(C,) each: what batch norm in eval mode does to a channel x is scale * x + shift."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = norm.weight * scale
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else norm.bias + shift


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics, scale and offset stay: an affine map a channel.

    Attributes:
        folded: the convolution before it does its work (:class:`FoldingConv2d`), so that no map is
            read, written and kept for the gradient once more. The result is the same but for
            rounding.
    """

    folded = False

    def forward(self, x: Tensor) -> Tensor:
        return x if self.folded else super().forward(x)


class FoldingConv2d(nn.Conv2d):
    """A convolution that does the work of the frozen batch norm after it, if it is told to."""

    # In a tuple, so that the norm is no child of this: names of weights stay.
    _norm: tuple[FrozenBatchNorm2d, ...] = ()

    def fold(self, norm: FrozenBatchNorm2d) -> None:
        """From now on do the work of `norm`, whose input is this convolution's output alone."""
        norm.folded = True
        self._norm = (norm,)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._norm and self._norm[0].folded:
            scale, shift = scale_and_shift(self._norm[0])
            weight = weight * scale[:, None, None, None]
            bias = shift if bias is None else bias * scale + shift
        result: Tensor = super()._conv_forward(x, weight, bias)
        return result


class SamePadConv2d(FoldingConv2d):
    """A stride-2 convolution that pads as TensorFlow's SAME does on even sizes."""

    def margins(self) -> tuple[int, int, int, int]:
        """Pixels of zeros at the left, the right, the top and the bottom.

        SAME on an even size pads kernel - 2 in all, the odd pixel of it after the image.
        """
        vertical, horizontal = self.kernel_size[0] - 2, self.kernel_size[1] - 2
        top, left = vertical // 2, horizontal // 2
        return left, horizontal - left, top, vertical - top

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(F.pad(x, self.margins()), self.weight, self.bias)


def _fold_frozen_norms(backbone: nn.Module) -> None:
    """Let each convolution of torchvision's networks do the work of the frozen norm after it.

    There a norm is always registered right after its convolution.
    """
    for conv, norm in pairwise(list(backbone.modules())):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d):
            if type(conv) is nn.Conv2d:
                conv.__class__ = FoldingConv2d  # the same, but for what it does with its weights
            cast(FoldingConv2d, conv).fold(norm)


def _pad_right_and_bottom(backbone: nn.Module) -> None:
    for module in list(backbone.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Conv2d and child.stride == (2, 2) and min(child.kernel_size) > 2:
                same = SamePadConv2d(
                    child.in_channels,
                    child.out_channels,
                    (child.kernel_size[0], child.kernel_size[1]),
                    stride=2,
                    groups=child.groups,
                    bias=child.bias is not None,
                )
                same.weight, same.bias = child.weight, child.bias
                setattr(module, name, same)
            elif isinstance(child, nn.MaxPool2d) and child.stride == 2:
                # Zeros are as good as minus infinity here: what is pooled has passed a ReLU.
                setattr(module, name, nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2)))


def _replace_batch_norm(net: nn.Module, norm_layer: Callable[[int], nn.Module]) -> None:
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm):
                # timm's batch norm may carry the activation that follows it.
                after = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
                group = norm_layer(child.num_features)
                setattr(module, name, nn.Sequential(group, *after) if after else group)


class BackboneWeights(NamedTuple):
    """Weights for a backbone and what they say about their input; None where they say nothing."""

    state: dict[str, Tensor]
    pixel_mean: tuple[float, float, float] | None
    pixel_std: tuple[float, float, float] | None
    stride_padding: str | None
    keep_frozen: bool
    source: str


def find_weights(name: str, weights: str | Path) -> BackboneWeights | None:
    """ImageNet weights of the backbone `name`.

    Args:
        weights: "default": torchvision's IMAGENET1K_V1 (timm's own for timm), fetched once and then
            cached; "none"; or a .safetensors or torch .pth file in torchvision's layout, with or
            without the classifier. Opening a file runs no code.

    Raises:
        WeightsError: they cannot be fetched, or the file cannot be read.
    """
    if str(weights) == "none":
        return None
    if str(weights) != "default":
        return _read_weights(Path(weights))
    if name.startswith("timm/"):
        return _fetch_timm(name)
    if name not in BACKBONES:
        return None  # build_backbone says so, with the names that there are
    # The first of torchvision's: the nearest to the paper's, which are He et al.'s own.
    entry = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    return BackboneWeights(fetch_state(entry, CHOICES), None, None, None, False, entry.url)


def fetch_state(entry: Any, otherwise: str) -> dict[str, Tensor]:
    """The tensors of a torchvision weights entry, from torch's cache or the internet.

    Raises:
        WeightsError: no internet, or a damaged download; `otherwise` says what to do instead.
    """
    try:
        state: dict[str, Tensor] = entry.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location="cpu"
        )
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise WeightsError(f"cannot fetch {entry.url}: {_line(error)}; {otherwise}") from None
    return state


def load_backbone(backbone: Backbone, weights: BackboneWeights) -> None:
    """Put `weights` into `backbone`: every one of its tensors, exactly.

    Raises:
        WeightsError: tensors are missing, unknown, or of another shape; they are listed.
    """
    inner = backbone.net if isinstance(backbone, Timm) else backbone
    wanted = inner.state_dict()
    state = {
        key: value
        for key, value in weights.state.items()
        if not key.startswith(("fc.", "classifier.", "head.")) or key in wanted
    }
    check_state(wanted, state, f"backbone weights {weights.source}")
    inner.load_state_dict(state, strict=False)


def check_state(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Raise a WeightsError that lists how `state` misses the names and shapes of `wanted`."""
    # Batch norm's count of batches serves an averaging that is not used; old files lack it.
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in wanted and not k.endswith("num_batches_tracked")]
    shapes = [
        f"{k} is {_shape(state[k])}, not {_shape(wanted[k])}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    misfits = [
        f"{len(found)} {word} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for word, found in kinds
        if found
    ]
    if misfits:
        raise WeightsError(f"{what} do not fit the network: {'; '.join(misfits)}")


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a number"


_UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError)


def _read_weights(file: Path) -> BackboneWeights:
    where = f"backbone weights {file}"
    if not file.is_file():
        raise WeightsError(f"{where}: there is no such file; {CHOICES}")
    metadata: dict[str, str] = {}
    try:
        if file.suffix == ".safetensors":
            with safe_open(str(file), framework="pt") as opened:
                metadata = opened.metadata() or {}
                loaded: Any = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise WeightsError(
            f"{where}: neither .safetensors nor a torch file of plain tensors: {_line(error)}"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise WeightsError(f"{where}: holds no state dict, that is, names with tensors")
    mean, std = _stated_input(metadata.get("input", ""), where)
    padding = "same" if re.search(r"\bSAME\b", metadata.get("padding", "")) else None
    frozen = "frozen" in metadata.get("batch_norm", "")
    state = {str(key).removeprefix("module."): value for key, value in loaded.items()}
    return BackboneWeights(state, mean, std, padding, frozen, str(file))


def _stated_input(
    text: str, where: str
) -> tuple[tuple[float, float, float] | None, tuple[float, float, float] | None]:
    """Mean and deviation from a line such as ``RGB, (x - 127.5) / 127.5``."""
    if not text:
        return None, None
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"\s*RGB\s*,\s*\(x - {number}\) / {number}\s*", text)
    if not found or float(found[2]) == 0:
        raise WeightsError(
            f"{where}: its input {text!r} is not understood; give model.pixel_mean and "
            "model.pixel_std, and take that line out of the file"
        )
    mean, std = float(found[1]), float(found[2])
    return (mean, mean, mean), (std, std, std)


def _fetch_timm(name: str) -> BackboneWeights:
    timm = _import_timm()
    try:
        net = timm.create_model(name.removeprefix("timm/"), features_only=True, pretrained=True)
    except Exception as error:  # timm's downloader has no exception of its own
        raise WeightsError(f"cannot fetch weights of {name}: {_line(error)}; {CHOICES}") from None
    settings = net.pretrained_cfg
    mean, std = (
        tuple(255.0 * value for value in settings.get(key, default))
        for key, default in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225)))
    )
    return BackboneWeights(dict(net.state_dict()), mean, std, None, False, name)


def _import_timm() -> Any:
    try:
        import timm
    except ImportError:
        raise MissingExtraError("timm", "timm") from None
    return timm


def _line(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
