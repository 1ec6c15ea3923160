"""Convert a detector to an ONNX model of standard operators."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retinanet import __version__
from retinanet.exporters.graph import OUTPUTS
from retinanet.inference.exported import TEXT_KEY
from retinanet.inference.openvino_backend import quiet

OPSET = 22
"""Supported from ONNX Runtime 1.22 on, the minimum version."""

_BOOL = 9  # onnx.TensorProto.DataType


def write_onnx(program: torch.export.ExportedProgram, file: Path, text: str) -> None:
    """Write a program with ``retinanet::suppress`` as an ONNX file, `text` as its metadata."""
    import onnx

    values = json.loads(text)
    outputs = OUTPUTS[values["form"]]
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(outputs),
            custom_translation_table={torch.ops.retinanet.suppress.default: _suppress()},
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
    shape = graph.input[0].type.tensor_type.shape.dim
    shape[2].dim_param, shape[3].dim_param = "height", "width"
    for tensor in (*graph.input, *graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_param = "batch"
    graph.name = "retinanet"
    model.producer_name, model.producer_version = "retinanet", __version__
    properties = {key: values[key] for key in ("classes", "category_ids", "preprocessing")}
    properties["thresholds"] = values["info"]["detect"]
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in properties.items()}
    onnx.helper.set_model_props(model, {**texts, TEXT_KEY: text})
    onnx.checker.check_model(model, full_check=True)
    file.write_bytes(model.SerializeToString())


def _suppress() -> Any:
    """Return the translation of ``retinanet::suppress``."""
    import onnx
    from onnxscript import opset18 as op

    def constant(value: Any, dtype: Any) -> Any:
        return op.Constant(value=onnx.numpy_helper.from_array(np.asarray(value, dtype)))

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

    return suppress
