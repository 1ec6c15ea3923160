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

from retinanet.model.heads import Head
from retinanet.model.networks import Backbone
from retinanet.model.norms import (
    BackboneConv2d,
    FrozenBatchNorm2d,
    contains_activation,
    fold_padding_into_kernel,
    only_user,
    parts_after,
    same_margins,
    scale_and_shift,
    trace,
)
from retinanet.model.retinanet import RetinaNet, to_channels_last
from retinanet.structures import is_eager

_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
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
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)

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
        conv: the source of weights and geometry; its padding is zeros. A norm that it applies
            (:class:`BackboneConv2d`) is folded too.
        norm: batch norm in eval mode after it, folded into weight and bias.
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
        own = conv.norms if isinstance(conv, BackboneConv2d) else ()
        for part in own if norm is None else (*own, norm):
            weight, bias = _folded(weight, bias, part)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.padding: tuple[int, ...] = (0, 0)
        self.margins = conv.margins if isinstance(conv, BackboneConv2d) else ()
        if not isinstance(conv.padding, str):
            self.padding = conv.padding
        elif conv.padding == "same":
            left, right, top, bottom = same_margins(conv)
            if (left, top) == (right, bottom):
                self.padding = (top, left)
            else:
                self.margins = (left, right, top, bottom)
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
        found = fold_padding_into_kernel(self.weight, self.margins, self.dilation)
        if found is not None:
            weight, self.padding = found
            self.weight, self.margins = nn.Parameter(weight, requires_grad=False), ()

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
                y = _activate(y + other, self.activation)
            else:
                # Adds to what lies in the output's memory: no third map is read or written. After
                # a sum oneDNN computes no activation but ReLU.
                unary = "relu" if name == "relu" else None
                y = torch.ops.mkldnn._convolution_pointwise_.binary(
                    other, x, weight, self.bias, *geometry, "add", 1.0, unary, [], ""
                )
                if unary is None:
                    y = _activate(y, self.activation)
            return y
        padding, stride, dilation, groups = geometry
        y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        if other is not None:
            y = y + other
        return _activate(y, self.activation)


def _activate(x: Tensor, name: str) -> Tensor:
    # To convert an operation in place to OpenVINO takes three times as long.
    return x if name == "none" else _ACTIVATIONS[name](x, inplace=is_eager())


def _folded(weight: Tensor, bias: Tensor, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution that includes the batch norm after it."""
    # In float64; on the CPU, since Apple's GPUs have none.
    scale, shift = scale_and_shift(deepcopy(norm).cpu().double())
    folded = weight.cpu().double() * scale[:, None, None, None]
    shift = bias.cpu().double() * scale + shift
    return folded.to(weight.dtype).to(weight.device), shift.to(weight.dtype).to(weight.device)


def _can_fuse(module: nn.Module) -> bool:
    """Return True for a convolution that pads with zeros."""
    return type(module) in _CONVOLUTIONS and module.padding_mode == "zeros"


def _fuse_head(head: Head) -> None:
    """Fuse each (convolution, ReLU) of the tower."""
    for i, block in enumerate(head.tower):
        parts = list(cast(nn.Sequential, block))
        if len(parts) == 2 and _can_fuse(parts[0]) and isinstance(parts[1], nn.ReLU):
            head.tower[i] = FusedConv2d(cast(nn.Conv2d, parts[0]), activation="relu")


def _fuse_plain(model: nn.Module) -> None:
    """Replace convolutions with nothing to fuse, for packed weights."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _can_fuse(child):
                setattr(parent, name, FusedConv2d(cast(nn.Conv2d, child)))


def _separate_norms(net: nn.Module) -> None:
    """Replace batch norm that contains an activation, and others' frozen norms, by plain ones."""
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            # torchvision's and timm's, in networks of the user; they are no batch norm of torch's.
            foreign = type(child).__name__ in ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
            foreign = foreign and type(child).__module__.startswith(("torchvision.", "timm."))
            if not (foreign or contains_activation(child)) or child.running_var is None:
                continue
            source: Any = child
            norm = FrozenBatchNorm2d(len(source.running_var), source.eps)
            norm.folded = getattr(child, "folded", False)
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                if (value := getattr(child, tensor)) is not None:
                    getattr(norm, tensor).data = value.data
            setattr(parent, name, nn.Sequential(norm, *parts_after(child)).eval())


def _traced(backbone: Backbone) -> fx.GraphModule | None:
    """Return the backbone with its convolutions fused; None if it cannot be traced."""
    traced = trace(backbone)
    if traced is None:
        return None
    graph = traced.graph
    graph.eliminate_dead_code()
    modules = dict(traced.named_modules())
    for node in list(graph.nodes):
        module = _module(node, modules, (nn.Identity, FrozenBatchNorm2d))
        # The convolution applies a folded norm.
        if module is not None and len(node.args) == 1 and getattr(module, "folded", True):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        conv = _module(node, modules, _CONVOLUTIONS)
        if conv is None or not _can_fuse(conv):
            continue
        replaced, norm = [node], _module(only_user(node), modules, _NORMS)
        if norm is not None:
            replaced.append(cast(fx.Node, only_user(node)))
        last = replaced[-1]
        total, other = only_user(last), None
        if total is not None and total.target in (operator.add, operator.iadd, torch.add):
            other = next((term for term in total.args if term is not last), None)
            fits = isinstance(other, fx.Node) and not total.kwargs
            if fits and _may_be_overwritten(graph, modules, cast(fx.Node, other), node, total):
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
        with graph.inserting_after(node):  # its input may be overwritten later
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
    graph: fx.Graph,
    modules: dict[str, nn.Module],
    other: fx.Node,
    conv: fx.Node,
    total: fx.Node,
) -> bool:
    """Return True if `conv` may write its sum with `other` to the memory of `other`.

    That memory must be the map's own, and complete when `conv` runs; `conv` and what follows must
    not read it, nor a view of it. Of two convolutions whose outputs are added, the later one
    computes the sum.
    """
    if _module(other, modules, (FusedConv2d, nn.MaxPool2d)) is None:
        return False
    order = {node: i for i, node in enumerate(graph.nodes)}
    users = [user for user in other.users if user is not total]
    return order[other] < order[conv] and all(
        order[user] < order[conv] and _returns_new_memory(user, modules) for user in users
    )


def _returns_new_memory(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return True if the result is known to be no view of an input; False if that is unknown."""
    kinds = (FusedConv2d, *_CONVOLUTIONS, *_NORMS, *_POOLS, nn.Sigmoid, *_NAMES)
    module = _module(node, modules, tuple(kind for kind in kinds if isinstance(kind, type)))
    if module is not None:
        return not (getattr(module, "inplace", False) or getattr(module, "folded", False))
    return node.target in (F.avg_pool2d, F.max_pool2d, torch.sigmoid, "mean")
