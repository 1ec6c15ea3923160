"""Convert a detector in ONNX to OpenVINO, optionally in int8."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from retinanet.inference.exported import TEXT_KEY
from retinanet.inference.openvino_backend import NARROW, calibration_images, quantize


def write_openvino(
    file: Path, text: str, precision: str, calibration: Iterable[Tensor] | None
) -> None:
    """Convert the ONNX file beside `file` to an ``.xml`` and a ``.bin``, and delete it.

    `calibration` are (1, 3, H, W) uint8 images of the network's size, for int8.
    """
    import openvino

    onnx_file = file.with_suffix(".onnx")
    model = openvino.convert_model(onnx_file)
    if precision == "int8":
        # The file may run on a CPU without VNNI.
        images = calibration_images(calibration)
        model = quantize(model, images, _not_quantized(model), overflow_fix=True)
    for node in model.get_ops():
        if node.get_type_name() == "Interpolate" and node.get_attributes()["antialias"]:
            _replace_resize(node)
    model.validate_nodes_and_infer_types()
    model.set_rt_info(text, [TEXT_KEY])
    openvino.save_model(model, file, compress_to_fp16=precision == "fp16")
    onnx_file.unlink()


def _not_quantized(model: Any) -> set[str]:
    """Names of all operations outside the network, and of the last convolution of narrow heads."""
    order = model.get_ordered_ops()
    convolutions = {"Convolution", "GroupConvolution"}
    after: set[str] = set()  # operations after some convolution
    before: set[str] = set()  # operations before some convolution
    for node in order:
        sources = [value.get_source_output().get_node() for value in node.inputs()]
        if any(
            x.get_type_name() in convolutions or x.get_friendly_name() in after for x in sources
        ):
            after.add(node.get_friendly_name())
    for node in reversed(order):
        users = [target.get_node() for out in node.outputs() for target in out.get_target_inputs()]
        if any(x.get_type_name() in convolutions or x.get_friendly_name() in before for x in users):
            before.add(node.get_friendly_name())
    exact = set()
    for node in order:
        name, kind = node.get_friendly_name(), node.get_type_name()
        if kind in convolutions:
            is_last = name not in before
            if is_last and node.output(0).get_partial_shape()[1].get_length() <= NARROW:
                exact.add(name)
        elif kind not in ("Constant", "Parameter", "Result") and name not in before & after:
            exact.add(name)
    return exact


def _replace_resize(node: Any) -> None:
    """Replace a bilinear resize with antialiasing by two matrix products.

    OpenVINO's CPU implementation samples four pixels at any scale. As in torch and Pillow, the
    width is resized first and rounded; images of the wanted size are not resized.
    """
    from openvino import Model, opset8
    from openvino import opset13 as op

    images, target = node.input(0).get_source_output(), node.input(1).get_source_output()
    # The target size has two or four axes.
    sizes = op.gather(target, np.array([-2, -1]), np.array(0))

    def body(resize: bool) -> tuple[Any, Any, Any]:
        image = op.parameter(images.get_partial_shape(), np.uint8)
        sides = op.parameter([2], np.int64)
        # OpenVINO 2026.4: a branch that only passes its input on returned uninitialised memory.
        result = op.convert(image, "f32")
        if resize:
            shape = op.shape_of(image, "i64")
            for axis in (3, 2):
                weights = _weights(
                    op,
                    op.gather(shape, np.array(axis), np.array(0)),
                    op.gather(sides, np.array(axis - 2), np.array(0)),
                )
                if axis == 3:
                    result = op.matmul(result, weights, False, True)
                else:
                    result = op.matmul(weights, result, False, False)
                result = op.round(result, "half_to_even")
        return Model([op.result(result)], [image, sides]), image, sides

    same = op.reduce_logical_and(
        op.equal(op.gather(op.shape_of(images, "i64"), np.array([2, 3]), np.array(0)), sizes),
        np.array([0]),
    )
    branch = opset8.if_op(same.output(0))  # as an output: a node would be dropped
    kept, kept_image, kept_sides = body(False)
    resized, image, sides = body(True)
    branch.set_then_body(kept)
    branch.set_else_body(resized)
    branch.set_input(images, kept_image, image)
    branch.set_input(sizes.output(0), kept_sides, sides)
    node.output(0).replace(branch.set_output(kept.results[0], resized.results[0]))


def _weights(op: Any, source: Any, target: Any) -> Any:
    """(target, source) weights of a triangle filter: source pixels per target pixel."""

    def centres(count: Any) -> Any:
        span = op.range(np.int64(0), count, np.int64(1), "i64")
        return op.add(op.convert(span, "f32"), np.float32(0.5))

    scale = op.divide(op.convert(source, "f32"), op.convert(target, "f32"))
    radius = op.maximum(scale, np.float32(1))
    target_centres = op.unsqueeze(op.multiply(centres(target), scale), np.array(1))
    distance = op.abs(op.subtract(op.unsqueeze(centres(source), np.array(0)), target_centres))
    raw = op.relu(op.subtract(np.float32(1), op.divide(distance, radius)))
    return op.divide(raw, op.reduce_sum(raw, np.array([1]), True))
