"""The whole detector as an ``openvino.Model``, in int8 too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from retinanet.inference.exported import TEXT_KEY
from retinanet.inference.openvino_backend import NARROW, calibration_images, quantize


def openvino_model(
    onnx_file: Path, text: str, *, int8: bool, calibration: Iterable[Tensor] | None = None
) -> Any:
    """An ONNX file of :mod:`retinanet.exporters.onnx_file` as an ``openvino.Model``.

    Args:
        onnx_file: where it is.
        text: what :func:`retinanet.inference.exported.read_exported` will read.
        int8: whether to quantise the network in it.
        calibration: for int8: (1, 3, H, W) uint8 images of the network's size.

    Raises:
        ConfigError: int8 without images.
    """
    import openvino

    model = openvino.convert_model(onnx_file)
    if int8:
        # The file may run on any CPU, also one without VNNI.
        images = calibration_images(calibration)
        model = quantize(model, images, _not_quantized(model), overflow_fix=True)
    for node in model.get_ops():
        if node.get_type_name() == "Interpolate" and node.get_attributes()["antialias"]:
            _resize_exactly(node)
    model.validate_nodes_and_infer_types()
    model.set_rt_info(text, [TEXT_KEY])
    return model


def _not_quantized(model: Any) -> set[str]:
    """Names of all that is not the network, and of the last convolution of narrow heads."""
    order = model.get_ordered_ops()
    convolutions = {"Convolution", "GroupConvolution"}
    before: set[str] = set()  # what a convolution leads to, itself left out
    behind: set[str] = set()  # what leads to a convolution, itself left out
    for node in order:
        inputs = [value.get_source_output().get_node() for value in node.inputs()]
        if any(
            one.get_type_name() in convolutions or one.get_friendly_name() in before
            for one in inputs
        ):
            before.add(node.get_friendly_name())
    for node in reversed(order):
        users = [
            value.get_node() for output in node.outputs() for value in output.get_target_inputs()
        ]
        if any(
            one.get_type_name() in convolutions or one.get_friendly_name() in behind
            for one in users
        ):
            behind.add(node.get_friendly_name())
    exact = set()
    for node in order:
        name, kind = node.get_friendly_name(), node.get_type_name()
        if kind in ("Constant", "Parameter", "Result"):
            continue
        if kind in convolutions:
            last = name not in behind
            if last and node.output(0).get_partial_shape()[1].get_length() <= NARROW:
                exact.add(name)
        elif not (name in before and name in behind):
            exact.add(name)
    return exact


def _resize_exactly(node: Any) -> None:
    """Replace a bilinear resize with antialiasing by one that does it.

    OpenVINO's CPU code samples four pixels however small the image becomes. Two products of
    matrices give what the definition asks for, width before height and rounded between as in torch
    and Pillow; an image that has its size already passes by.
    """
    from openvino import Model, opset8
    from openvino import opset13 as op

    given, wanted = node.input(0).get_source_output(), node.input(1).get_source_output()
    # By name or by number, sizes are of the last two axes or of all four.
    sizes = op.gather(wanted, np.array([-2, -1]), np.array(0))

    def body(resize: bool) -> tuple[Any, Any, Any]:
        image = op.parameter(given.get_partial_shape(), np.uint8)
        sides = op.parameter([2], np.int64)
        # A branch that only hands on its input gave, in OpenVINO 2026.4, at the first call whatever
        # lay in memory.
        result = op.convert(image, "f32")
        if resize:
            shape = op.shape_of(image, "i64")
            for axis in (3, 2):
                source = op.gather(shape, np.array(axis), np.array(0))
                target = op.gather(sides, np.array(axis - 2), np.array(0))
                weights = _weights(op, source, target)
                if axis == 3:
                    result = op.matmul(result, weights, False, True)
                else:
                    result = op.matmul(weights, result, False, False)
                result = op.round(result, "half_to_even")
        return Model([op.result(result)], [image, sides]), image, sides

    same = op.reduce_logical_and(
        op.equal(op.gather(op.shape_of(given, "i64"), np.array([2, 3]), np.array(0)), sizes),
        np.array([0]),
    )
    branch = opset8.if_op(same.output(0))  # a node, as elsewhere, would be left out
    kept, kept_image, kept_sides = body(False)
    resized, image, sides = body(True)
    branch.set_then_body(kept)
    branch.set_else_body(resized)
    branch.set_input(given, kept_image, image)
    branch.set_input(sizes.output(0), kept_sides, sides)
    found = branch.set_output(kept.results[0], resized.results[0])
    node.output(0).replace(found)


def _weights(op: Any, source: Any, target: Any) -> Any:
    """(target, source): what each pixel of a side adds to each pixel of the resized side."""

    def numbers(count: Any) -> Any:
        span = op.range(np.int64(0), count, np.int64(1), "i64")
        return op.add(op.convert(span, "f32"), np.float32(0.5))

    scale = op.divide(op.convert(source, "f32"), op.convert(target, "f32"))
    reach = op.maximum(scale, np.float32(1))
    centres = op.unsqueeze(op.multiply(numbers(target), scale), np.array(1))
    far = op.abs(op.subtract(op.unsqueeze(numbers(source), np.array(0)), centres))
    raw = op.relu(op.subtract(np.float32(1), op.divide(far, reach)))
    return op.divide(raw, op.reduce_sum(raw, np.array([1]), True))
