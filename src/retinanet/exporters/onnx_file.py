"""The whole detector as an ONNX model of standard operators alone."""

from __future__ import annotations

import builtins
import operator
import warnings
from typing import Any

import numpy as np
import torch

from retinanet import __version__
from retinanet.exporters.program import OUTPUTS
from retinanet.inference.exported import TEXT_KEY
from retinanet.inference.openvino_backend import quiet

OPSET = 22
"""The latest that ONNX Runtime 1.22, the oldest that is asked for, takes."""

_INT64, _DOUBLE, _BOOL = 7, 11, 9  # onnx.TensorProto's numbers


def onnx_model(
    program: torch.export.ExportedProgram, form: str, text: str, properties: dict[str, str]
) -> Any:
    """The program as an ``onnx.ModelProto``.

    Args:
        program: its suppression is ``retinanet::suppress``.
        form: a key of :data:`OUTPUTS`.
        text: what :func:`retinanet.inference.exported.read_exported` will read.
        properties: more metadata.
    """
    import onnx

    with quiet(), warnings.catch_warnings():
        # Of torch about itself.
        warnings.simplefilter("ignore")
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
    # The types in between are those of symbolic sizes, in part too narrow; they follow from the
    # operators. Where a node was written is a path of this machine.
    del graph.value_info[:]
    for one in (*graph.node, *graph.initializer, *graph.input, *graph.output, graph, model):
        del one.metadata_props[:]
    for value, names in _DIMENSIONS.items():
        for given in (*graph.input, *graph.output):
            if given.name == value:
                for dimension, name in zip(given.type.tensor_type.shape.dim, names, strict=False):
                    if name:
                        dimension.dim_param = name
    graph.name = "retinanet"
    model.producer_name, model.producer_version = "retinanet", __version__
    onnx.helper.set_model_props(model, {**properties, TEXT_KEY: text})
    onnx.checker.check_model(model, full_check=True)
    return model


_DIMENSIONS = {
    "images": ("batch", "", "height", "width"),
    "boxes": ("batch",),
    "scores": ("batch",),
    "labels": ("batch",),
    "count": ("batch",),
}


def _translations() -> dict[Any, Any]:
    """Of what torch has no translation for, or one that computes sizes in float32."""
    import onnx
    from onnxscript import ir
    from onnxscript import opset18 as op

    def constant(value: Any, dtype: Any) -> Any:
        return op.Constant(value=onnx.numpy_helper.from_array(np.asarray(value, dtype)))

    def double(value: Any) -> Any:
        number = isinstance(value, int | float)
        return constant(value, np.float64) if number else op.Cast(value, to=_DOUBLE)

    def divide(one: Any, other: Any) -> Any:
        return op.Div(double(one), double(other))

    def multiply(one: Any, other: Any) -> Any:
        floats = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
        if any(getattr(value, "dtype", None) in floats for value in (one, other)):
            one, other = double(one), double(other)
        return op.Mul(one, other)

    def rounded(value: Any, digits: Any = None) -> Any:
        return op.Cast(op.Round(value), to=_INT64)

    def suppress(
        boxes: Any,
        scores: Any,
        labels: Any,
        classes: int,
        threshold: float,
        most: int,
        side: int,
    ) -> Any:
        dense = op.Unsqueeze(scores, constant([1], np.int64))
        if classes > 1:
            # (B, K, T): a candidate has a score in its own class alone.
            own = op.Equal(
                op.Unsqueeze(labels, constant([1], np.int64)),
                constant(np.arange(classes)[:, None], np.int64),
            )
            dense = op.Where(own, dense, constant(-1, np.float32))
        chosen = op.NonMaxSuppression(
            boxes,
            dense,
            constant([most], np.int64),
            constant([threshold], np.float32),
            constant([-0.5], np.float32),  # what is no candidate has -1
        )
        places = op.Gather(chosen, constant([0, 2], np.int64), axis=1)  # image, candidate
        nowhere = op.Expand(constant(0, np.float32), op.Shape(scores))
        ones = op.Expand(constant(1, np.float32), op.Shape(places, end=1))
        return op.Cast(op.ScatterND(nowhere, places, ones), to=_BOOL)

    return {
        operator.truediv: divide,
        operator.mul: multiply,
        builtins.round: rounded,
        torch.ops.retinanet.suppress.default: suppress,
    }
