"""Convert a detector to an ONNX model of standard operators."""

from __future__ import annotations

import builtins
import operator
import warnings
from typing import Any

import numpy as np
import torch

from retinanet import __version__
from retinanet.exporters.graph import OUTPUTS
from retinanet.inference.exported import TEXT_KEY
from retinanet.inference.openvino_backend import quiet

OPSET = 22
"""Supported from ONNX Runtime 1.22 on, the minimum version."""

_INT64, _DOUBLE, _BOOL = 7, 11, 9  # onnx.TensorProto.DataType

_DIMENSIONS = {
    "images": ("batch", "", "height", "width"),
    **dict.fromkeys(("boxes", "scores", "labels", "count"), ("batch",)),
}


def onnx_model(
    program: torch.export.ExportedProgram, form: str, text: str, properties: dict[str, str]
) -> Any:
    """Convert a program to an ``onnx.ModelProto``.

    Args:
        program: with ``retinanet::suppress`` for non-maximum suppression.
        form: a key of :data:`OUTPUTS`.
        text: metadata for :func:`retinanet.inference.exported.read_exported`.
        properties: more metadata.
    """
    import onnx

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(OUTPUTS[form]),
            custom_translation_table=_translations(),
            verbose=False,
        )
    assert converted is not None
    model = converted.model_proto
    graph = model.graph
    # Types of intermediate values are partly too narrow for symbolic sizes; engines infer them.
    # The metadata of nodes contains paths of this machine.
    del graph.value_info[:]
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output, graph, model):
        del item.metadata_props[:]
    for value, names in _DIMENSIONS.items():
        for tensor in (*graph.input, *graph.output):
            if tensor.name == value:
                for dimension, name in zip(tensor.type.tensor_type.shape.dim, names, strict=False):
                    if name:
                        dimension.dim_param = name
    graph.name = "retinanet"
    model.producer_name, model.producer_version = "retinanet", __version__
    onnx.helper.set_model_props(model, {**properties, TEXT_KEY: text})
    onnx.checker.check_model(model, full_check=True)
    return model


def _translations() -> dict[Any, Any]:
    """Return translations that torch lacks, or that compute sizes in float32."""
    import onnx
    from onnxscript import ir
    from onnxscript import opset18 as op

    def constant(value: Any, dtype: Any) -> Any:
        return op.Constant(value=onnx.numpy_helper.from_array(np.asarray(value, dtype)))

    def double(value: Any) -> Any:
        number = isinstance(value, int | float)
        return constant(value, np.float64) if number else op.Cast(value, to=_DOUBLE)

    def divide(a: Any, b: Any) -> Any:
        return op.Div(double(a), double(b))

    def multiply(a: Any, b: Any) -> Any:
        floats = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
        if any(getattr(value, "dtype", None) in floats for value in (a, b)):
            a, b = double(a), double(b)
        return op.Mul(a, b)

    def rounded(value: Any, digits: Any = None) -> Any:
        return op.Cast(op.Round(value), to=_INT64)

    def suppress(
        boxes: Any,
        scores: Any,
        labels: Any,
        classes: int,
        threshold: float,
        max_boxes: int,
        side: int,
    ) -> Any:
        dense = op.Unsqueeze(scores, constant([1], np.int64))
        if classes > 1:
            # (B, K, T): a candidate has a score only in its own class.
            own = op.Equal(
                op.Unsqueeze(labels, constant([1], np.int64)),
                constant(np.arange(classes)[:, None], np.int64),
            )
            dense = op.Where(own, dense, constant(-1, np.float32))
        chosen = op.NonMaxSuppression(
            boxes,
            dense,
            constant([max_boxes], np.int64),
            constant([threshold], np.float32),
            constant([-0.5], np.float32),  # empty candidates have -1
        )
        indices = op.Gather(chosen, constant([0, 2], np.int64), axis=1)  # image, candidate
        zeros = op.Expand(constant(0, np.float32), op.Shape(scores))
        ones = op.Expand(constant(1, np.float32), op.Shape(indices, end=1))
        return op.Cast(op.ScatterND(zeros, indices, ones), to=_BOOL)

    return {
        operator.truediv: divide,
        operator.mul: multiply,
        builtins.round: rounded,
        torch.ops.retinanet.suppress.default: suppress,
    }
