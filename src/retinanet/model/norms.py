"""Normalization of a backbone, and the convolutions that apply it.

A frozen batch norm is an affine map per channel: the convolution before it applies it, in training
too, and its map is neither computed nor kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from retinanet.model.networks import NormLayer


def group_norm(channels: int) -> nn.GroupNorm:
    """Return group norm in 32 groups, or as many as have at least two channels each."""
    groups = max((g for g in (32, 16, 8, 4, 2) if channels % (2 * g) == 0), default=1)
    return nn.GroupNorm(groups, channels)


def scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return (C,) each, such that batch norm in eval mode is scale * x + shift."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = norm.weight * scale
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else norm.bias + shift


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with constant statistics, scale and offset: an affine map per channel.

    Attributes:
        folded: True if the convolution before it applies it (:class:`BackboneConv2d`), which saves
            reading, writing and keeping a map. The result differs by rounding only.
    """

    folded = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, unless the convolution has."""
        return x if self.folded else super().forward(x)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """timm's ``BatchNormAct2d``, an activation after its batch norm, with a frozen norm."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, unless the convolution has, and apply the activation."""
        result: Tensor = self.act(self.drop(super().forward(x)))
        return result


def contains_activation(module: nn.Module) -> bool:
    """Return True for batch norm with the activation after it, as timm has it."""
    return isinstance(module, nn.BatchNorm2d) and len(parts_after(module)) == 2


def parts_after(norm: nn.Module) -> list[nn.Module]:
    """Return what timm's batch norm applies after normalizing: dropout and activation."""
    return [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]


def same_margins(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return the zeros of SAME padding at the left, right, top and bottom.

    As torch's "same" has them and, where the sides are multiples of the stride, TensorFlow's SAME:
    (kernel - 1) * dilation + 1 - stride in all, the odd pixel of it at the right and the bottom.
    """
    vertical, horizontal = (
        max((kernel - 1) * dilation + 1 - stride, 0)
        for kernel, dilation, stride in zip(
            conv.kernel_size, conv.dilation, conv.stride, strict=True
        )
    )
    top, left = vertical // 2, horizontal // 2
    return left, horizontal - left, top, vertical - top


def fold_padding_into_kernel(
    weight: Tensor, margins: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, int]] | None:
    """Return weights with a row and a column of zeros, and the symmetric padding they need.

    They stand for the odd row and column of SAME padding, so that the input is not copied into a
    larger map: of a depthwise kernel of 3 that costs four times as much as the convolution. With
    gradients it gains nothing.
    None: the margins are not odd by one dilation.
    """
    left, right, top, bottom = margins
    if (bottom - top, right - left) != tuple(dilation):
        return None
    return F.pad(weight, (1, 0, 1, 0)), (bottom, right)


class BackboneConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding, or the frozen batch norm that follows it, or both.

    Args:
        conv: the convolution whose weights it takes over.
        norm: a batch norm that is applied to this convolution's output only.
        same_padding: pad as TensorFlow's SAME does (:func:`same_margins`).

    Attributes:
        margins: zeros added at the left, right, top and bottom before the convolution.
    """

    def __init__(
        self, conv: nn.Conv2d, norm: FrozenBatchNorm2d | None, *, same_padding: bool
    ) -> None:
        with torch.device("meta"):  # without memory and random numbers
            super().__init__(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,  # type: ignore[arg-type]
                conv.stride,  # type: ignore[arg-type]
                0 if same_padding else conv.padding,  # type: ignore[arg-type]
                conv.dilation,  # type: ignore[arg-type]
                conv.groups,
                conv.bias is not None,
                conv.padding_mode,
            )
        self.weight, self.bias = conv.weight, conv.bias
        self.margins: tuple[int, ...] = same_margins(conv) if same_padding else ()
        # In a tuple, so that the norm is not a child of this module: names of weights stay.
        self.norms = () if norm is None else (norm,)
        if norm is not None:
            norm.folded = True

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve with the weights times the norm's scale."""
        weight, bias = self.weight, self.bias
        for norm in self.norms:
            scale, shift = scale_and_shift(norm)
            weight = weight * scale[:, None, None, None]
            bias = shift if bias is None else bias * scale + shift
        is_depthwise = weight.shape[1] == 1
        trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if self.margins and is_depthwise and not trained:  # of other kernels the work would grow
            found = fold_padding_into_kernel(weight, self.margins, self.dilation)
            if found is not None:
                weight, padding = found
                return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)
        autocast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        if autocast and trained and is_depthwise and max(self.stride) > 1:
            # In float32 oneDNN computes its gradients three times as fast as in bf16.
            with torch.autocast("cpu", enabled=False):
                bias = None if bias is None else bias.float()
                result = self._padded(x.float(), weight.float(), bias)
            return result.to(torch.get_autocast_dtype("cpu"))
        return self._padded(x, weight, bias)

    def _padded(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = F.pad(x, self.margins) if self.margins else x
        result: Tensor = self._conv_forward(x, weight, bias)
        return result


def adapt_torchvision(backbone: nn.Module, *, same_padding: bool) -> None:
    """Let convolutions apply the frozen norms after them, and pad those of stride 2.

    In torchvision's networks a norm is always registered right after its convolution.
    """
    following = dict(pairwise(backbone.modules()))
    for module in list(backbone.modules()):
        for name, child in list(module.named_children()):
            halves = same_padding and getattr(child, "stride", None) in (2, (2, 2))
            if type(child) is nn.Conv2d:
                norm = following.get(child)
                norm = norm if isinstance(norm, FrozenBatchNorm2d) else None
                pads = halves and min(child.kernel_size) > 2
                if norm is not None or pads:
                    setattr(module, name, BackboneConv2d(child, norm, same_padding=pads))
            elif isinstance(child, nn.MaxPool2d) and halves:
                # Zeros are equivalent to minus infinity: the input has passed a ReLU.
                setattr(module, name, nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2)))


def adapt_timm(
    backbone: nn.Module, *, padded: type[nn.Conv2d], constant: bool, frozen: bool
) -> None:
    """Let convolutions of a timm network apply frozen norms, and pad them by constants.

    Args:
        backbone: changed; the names of its weights stay.
        padded: timm's convolution that computes TensorFlow's SAME padding from each input's size.
        constant: True if the sides of its inputs are multiples of its stride.
        frozen: batch norm is frozen.
    """
    following: Mapping[nn.Module, FrozenBatchNorm2d] = {}
    if frozen:
        for module in backbone.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = FrozenBatchNorm2d
            elif contains_activation(module):
                module.__class__ = FrozenBatchNormAct2d
        following = _norms_after(backbone)
    for module in list(backbone.modules()):
        for name, child in list(module.named_children()):
            pads = constant and type(child) is padded
            if isinstance(child, nn.Conv2d) and (pads or type(child) is nn.Conv2d):
                norm = following.get(child)
                if norm is not None or pads:
                    setattr(module, name, BackboneConv2d(child, norm, same_padding=pads))


def _norms_after(net: nn.Module) -> Mapping[nn.Module, FrozenBatchNorm2d]:
    """Return the frozen norms, by convolution, that alone use the output of one."""
    traced = trace(net)
    if traced is None:
        return {}
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    names = [node.target for node in calls]
    found = {}
    for node in calls:
        user = only_user(node)
        if user is None or names.count(node.target) != 1 or names.count(user.target) != 1:
            continue
        norm = traced.get_submodule(str(user.target))
        if isinstance(norm, FrozenBatchNorm2d):
            found[traced.get_submodule(str(node.target))] = norm
    return found


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        known = isinstance(module, nn.Conv2d | _BatchNorm)
        return known or super().is_leaf_module(module, name)


def trace(net: nn.Module) -> fx.GraphModule | None:
    """Return a network as a graph of its layers, which are not copied; None if that fails."""
    # A graph does not call the hooks of its layers, with which some of timm's collect their maps.
    if any(module._forward_hooks or module._forward_pre_hooks for module in net.modules()):
        return None
    try:
        graph = _Tracer().trace(net)
    except Exception:  # timm's networks may do anything that a proxy cannot follow
        return None
    return fx.GraphModule(net, graph)


def only_user(node: fx.Node | None) -> fx.Node | None:
    """Return the node that uses the output of a node; None if there are none or several."""
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def replace_batch_norm(net: nn.Module, norm_layer: NormLayer) -> None:
    """Replace batch norm by another norm; activations in timm's batch norm stay."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm):
                after = parts_after(child)
                group = norm_layer(child.num_features)
                setattr(module, name, nn.Sequential(group, *after) if after else group)
