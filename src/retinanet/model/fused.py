"""The network for inference: the same outputs in fewer passes over memory.

Batch norm, ReLU and residual sums read and write every feature map. Here batch norm is folded into
the weights of the convolutions; bias, sum and activation are computed with them, tile by tile (with
oneDNN on a CPU). The results differ from the model's by rounding; tests compare the two.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from retinanet.model.backbone import Backbone
from retinanet.model.heads import Head
from retinanet.model.norms import (
    BackboneConv2d,
    FrozenBatchNorm2d,
    contains_activation,
    only_user,
    scale_and_shift,
    trace,
)
from retinanet.model.retinanet import RetinaNet, to_channels_last

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu_,
    "relu6": lambda x: F.hardtanh_(x, 0.0, 6.0),
    "silu": lambda x: F.silu(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
}
# By layer or function.
_NAMES: dict[Any, str] = {
    nn.ReLU: "relu",
    F.relu: "relu",
    torch.relu: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
# Name and constants of an activation in oneDNN.
_ONEDNN: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
    "hardswish": ("hardswish", []),
}

_CONVOLUTIONS = (nn.Conv2d, BackboneConv2d)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)

# Image sizes for which packed weights of the backbone are kept: landscape and portrait. The heads'
# are kept for the levels of one size: five packings of theirs are as large as the backbone's.
SHAPES_KEPT = 2

# Several threads may run a network; a lock in the module could not be copied.
_packing = threading.Lock()


def fused_copy(model: RetinaNet, dtype: torch.dtype, *, pack: bool = True) -> RetinaNet:
    """Return a copy of a network for inference on its device, with weights of `dtype`.

    A backbone that cannot be traced (some of timm's) keeps its batch norm and residual sums.

    Args:
        model: not changed; after more training a new copy is needed.
        dtype: of weights, feature maps, logits and deltas.
        pack: use oneDNN's fused convolutions on a CPU where torch has them, with weights packed for
            the last image sizes that occurred twice. Do not move or change the copy then.

    Returns:
        a network in eval mode whose outputs differ from the model's by rounding; without gradient.
    """
    copy = deepcopy(model).eval().requires_grad_(False)
    _separate_norms(copy.backbone)
    backbone = _traced(copy.backbone)
    if backbone is not None:
        copy.backbone = cast(Backbone, backbone)
    for head in (copy.class_head, copy.box_head):
        if isinstance(head, Head):
            _fuse_head(head)
    _fuse_plain(copy)
    convolutions = [module for module in copy.modules() if isinstance(module, FusedConv2d)]
    # pixel_mean and pixel_std stay exact; forward() computes with them in float32.
    mean, deviation = copy.pixel_mean, copy.pixel_std
    biases = [module.bias.data for module in convolutions]
    copy = to_channels_last(copy.to(dtype))
    copy.pixel_mean, copy.pixel_std = mean, deviation
    if pack and mean.device.type == "cpu" and can_pack(dtype):
        for module, bias in zip(convolutions, biases, strict=True):
            module.shapes_kept = SHAPES_KEPT
            module.include_margins()
            if not module.adds:  # for which torch supports no other type
                # In float32: a rounding error would be the same in every cell.
                module.bias = nn.Parameter(bias, requires_grad=False)
        for head in (copy.class_head, copy.box_head):
            for part in head.modules():
                if isinstance(part, FusedConv2d):
                    part.shapes_kept = len(copy.strides)
    return copy


@lru_cache
def can_pack(dtype: torch.dtype) -> bool:
    """Return True if oneDNN's fused convolutions run here with weights of `dtype`.

    They are not a public part of torch, so they are tried.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    plain, sums = (
        FusedConv2d(nn.Conv2d(16, 16, 1, dtype=torch.float32), None, "relu").to(dtype)
        for _ in range(2)
    )
    plain.shapes_kept = sums.shapes_kept = 1
    plain.bias = nn.Parameter(torch.zeros(16, dtype=torch.float32), requires_grad=False)
    x = torch.zeros(1, 16, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    try:
        with torch.inference_mode():
            for _ in range(2):
                sums(plain(x), torch.zeros_like(x))
    except (RuntimeError, AttributeError, TypeError):
        return False
    return True


class FusedConv2d(nn.Module):
    """A convolution with the batch norm, sum and activation that follow it.

    Args:
        conv: the source of weights and geometry.
        norm: batch norm in eval mode, folded into weight and bias.
        activation: "none", "relu", "relu6", "silu" or "hardswish".
        adds: True if it is called with a second map, which is added.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: _BatchNorm | None = None,
        activation: str = "none",
        adds: bool = False,
    ) -> None:
        super().__init__()
        self.adds = adds
        weight, bias = conv.weight.detach(), conv.bias
        bias = torch.zeros_like(weight[:, 0, 0, 0]) if bias is None else bias.detach()
        if norm is not None:
            weight, bias = _folded(weight, bias, norm)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.padding: tuple[int, ...] = cast("tuple[int, ...]", conv.padding)
        self.margins = conv.margins if isinstance(conv, BackboneConv2d) else ()
        self.activation = activation
        self.shapes_kept: int | None = None
        # By number of threads and input shape, the last used last.
        self.packed: dict[int, dict[torch.Size, Tensor | None]] = {}

    def include_margins(self) -> None:
        """Replace the padding of the input, a copy, by a row and a column of zeros in the kernel.

        Only where the kernel has few input channels: its work grows, by 16/9 for a kernel of 3.
        """
        if not self.margins or self.weight.shape[1] > 4:
            return
        left, right, top, bottom = self.margins
        if (bottom - top, right - left) != self.dilation:
            return
        self.weight = nn.Parameter(F.pad(self.weight, (1, 0, 1, 0)), requires_grad=False)
        self.padding, self.margins = (bottom, right), ()

    def __getstate__(self) -> dict[str, Any]:
        # Tensors in oneDNN's layout cannot be copied or pickled: a copy packs its own.
        return {**self.__dict__, "packed": {}}

    def _weight_for(self, shape: torch.Size) -> Tensor:
        """Return the weight packed for inputs of this shape, from their second occurrence on.

        The layout depends on the shape and the number of threads, and a convolution with the layout
        of others can take a hundred times as long. A weight that is not packed is packed by oneDNN
        at each call.
        """
        with _packing:
            kept = self.packed.setdefault(torch.get_num_threads(), {})
            known = shape in kept
            packed = kept.pop(shape, None)
            if known and packed is None:
                packed = torch.ops.mkldnn._reorder_convolution_weight(
                    self.weight.data, *self._geometry(), list(shape)
                )
            kept[shape] = packed
            while len(kept) > (self.shapes_kept or 0):
                del kept[next(iter(kept))]
        return self.weight if packed is None else packed

    def _geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        return self.padding, self.stride, self.dilation, self.groups

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        sides = (
            (side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for side, pad, stride, dilation, kernel in zip(
                x.shape[2:], *self._geometry()[:3], self.weight.shape[2:], strict=True
            )
        )
        return (len(x), len(self.bias), *sides)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W').

        `other` is added before the activation; its memory may be used for the output.
        """
        if self.margins:
            x = F.pad(x, self.margins)
        geometry = self._geometry()
        if self.shapes_kept is not None:
            weight = self._weight_for(x.shape)
            name, constants = _ONEDNN[self.activation]
            y: Tensor
            if other is None:
                y = torch.ops.mkldnn._convolution_pointwise(
                    x, weight, self.bias, *geometry, name, constants, ""
                )
            elif other.shape != self._output_shape(x):  # broadcast
                y = torch.ops.mkldnn._convolution_pointwise(
                    x, weight, self.bias, *geometry, "none", [], ""
                )
                y = _ACTIVATIONS[self.activation](y + other)
            else:
                unary = None if name == "none" else name
                # Adds to what lies in the output's memory: no third map is read or written.
                y = torch.ops.mkldnn._convolution_pointwise_.binary(
                    other, x, weight, self.bias, *geometry, "add", 1.0, unary, constants, ""
                )
            return y
        padding, stride, dilation, groups = geometry
        y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        if other is not None:
            y = y + other
        return _ACTIVATIONS[self.activation](y)


def _folded(weight: Tensor, bias: Tensor, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution that includes the batch norm after it."""
    # In float64; on the CPU, since Apple's GPUs have none.
    scale, shift = scale_and_shift(deepcopy(norm).cpu().double())
    folded = weight.cpu().double() * scale[:, None, None, None]
    shift = bias.cpu().double() * scale + shift
    return folded.to(weight.dtype).to(weight.device), shift.to(weight.dtype).to(weight.device)


def _fuse_head(head: Head) -> None:
    """Fuse each (convolution, ReLU) of the tower."""
    for i, block in enumerate(head.tower):
        parts = list(cast(nn.Sequential, block))
        if len(parts) == 2 and type(parts[0]) is nn.Conv2d and isinstance(parts[1], nn.ReLU):
            head.tower[i] = FusedConv2d(parts[0], activation="relu")


def _fuse_plain(model: nn.Module) -> None:
    """Replace convolutions with nothing to fuse, for packed weights."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in _CONVOLUTIONS and not getattr(child, "norms", ()):
                setattr(parent, name, FusedConv2d(cast(nn.Conv2d, child)))


def _separate_norms(net: nn.Module) -> None:
    """Replace batch norm that contains an activation, and others' frozen norms, by plain ones."""
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            # torchvision's and timm's, in networks of the user; they are no batch norm of torch's.
            foreign = type(child).__name__ in ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
            foreign = foreign and not isinstance(child, nn.BatchNorm2d)
            if not (foreign or contains_activation(child)) or child.running_var is None:
                continue
            source: Any = child
            norm = FrozenBatchNorm2d(len(source.running_var), source.eps)
            norm.folded = getattr(child, "folded", False)
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                if (value := getattr(child, tensor)) is not None:
                    getattr(norm, tensor).data = value.data
            after = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
            setattr(parent, name, nn.Sequential(norm, *after).eval())


def _traced(backbone: Backbone) -> fx.GraphModule | None:
    """Return the backbone with its convolutions fused; None if it cannot be traced."""
    traced = trace(backbone)
    if traced is None:
        return None
    graph = traced.graph
    graph.eliminate_dead_code()
    modules = dict(traced.named_modules())
    for node in list(graph.nodes):
        if _module(node, modules, (nn.Identity,)) is not None and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        conv = _module(node, modules, _CONVOLUTIONS)
        if conv is None:
            continue
        replaced, norm = [node], _module(only_user(node), modules, _NORMS)
        if norm is not None:
            replaced.append(cast(fx.Node, only_user(node)))
        last = replaced[-1]
        total, other = only_user(last), None
        if total is not None and total.target in (operator.add, operator.iadd, torch.add):
            other = next((term for term in total.args if term is not last), None)
            # A convolution cannot write to its input.
            fits = isinstance(other, fx.Node) and other is not node.args[0] and not total.kwargs
            if fits and _may_be_overwritten(graph, modules, cast(fx.Node, other), total):
                replaced.append(total)
            else:
                other = None
        following = only_user(replaced[-1])
        activation = _activation(following, modules)
        if activation != "none":
            replaced.append(cast(fx.Node, following))
        fused = FusedConv2d(conv, norm, activation, adds=other is not None)
        name = f"fused_{node.name}"
        traced.add_module(name, fused)
        modules[name] = fused
        with graph.inserting_after(replaced[-1]):
            inputs = (node.args[0],) if other is None else (node.args[0], cast(fx.Node, other))
            new = graph.call_module(name, inputs)
        replaced[-1].replace_all_uses_with(new)
        for old in reversed(replaced):
            graph.erase_node(old)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _module(node: fx.Node | None, modules: dict[str, nn.Module], kinds: tuple[type, ...]) -> Any:
    """Return the module that the node calls if it is exactly of one of these types."""
    if node is None or node.op != "call_module":
        return None
    module = modules.get(str(node.target))
    return module if type(module) in kinds else None


def _activation(node: fx.Node | None, modules: dict[str, nn.Module]) -> str:
    if node is None:
        return "none"
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return _NAMES.get(node.target if module is None else type(module), "none")


def _may_be_overwritten(
    graph: fx.Graph, modules: dict[str, nn.Module], node: fx.Node, by: fx.Node
) -> bool:
    """Return True if the node's memory is its own, and nothing after node `by` reads it.

    Of two convolutions whose outputs are added, the later one computes the sum.
    """
    if _module(node, modules, (FusedConv2d, nn.MaxPool2d)) is None:
        return False
    order = {other: i for i, other in enumerate(graph.nodes)}
    return all(user is by or order[user] < order[by] for user in node.users)
