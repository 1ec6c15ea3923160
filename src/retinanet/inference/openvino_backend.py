"""The network in OpenVINO on a CPU, in int8 too: quantised by NNCF on the user's own images."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config

from retinanet.errors import ConfigError, MissingExtraError
from retinanet.model.fused import fused_copy
from retinanet.model.precision import choose_dtype
from retinanet.model.retinanet import RetinaNet
from retinanet.structures import Outputs

CALIBRATION_IMAGES = 300
"""NNCF's own number; more change little."""

_HINTS = {"float32": "f32", "bf16": "bf16", "fp16": "f16"}

# Up to so many channels the last convolution of a head is kept out of int8: its error would be that
# of scores and boxes. A wider one, of many classes, is a sixth of the network's work, and its error
# in int8 was measured to be a tenth of that which comes with its input.
NARROW = 128


def openvino_network(
    model: RetinaNet, precision: str, calibration: Iterable[Tensor] | None = None
) -> Callable[[Tensor], Outputs]:
    """The network as a function of images, run by OpenVINO with torch's number of threads.

    Args:
        model: on the CPU, in eval mode.
        precision: "float32", "bf16", "fp16" or "int8"; what int8 leaves out is in bf16 where the
            processor has units for it.
        calibration: as for :func:`retinanet.inference.backends.build_network`.

    Raises:
        ConfigError: int8 without images.
        MissingExtraError: OpenVINO, or NNCF for int8, is not installed.
    """
    try:
        import openvino
    except ImportError:
        raise MissingExtraError("openvino", "openvino") from None
    converted = convert(model)
    if precision == "int8":
        converted = quantize(converted, calibration)
        fast = choose_dtype("auto", torch.device("cpu")) == torch.bfloat16
        hint = "bf16" if fast else "f32"
    else:
        hint = _HINTS[precision]
    compiled = openvino.Core().compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    levels = len(model.strides)

    def run(images: Tensor) -> Outputs:
        if images.dtype != torch.uint8:
            images = images.round().clamp(0, 255).to(torch.uint8)
        # A request of its own for each call: several threads may call.
        found = compiled.create_infer_request().infer([images.numpy()])
        maps = [torch.from_numpy(found[one]).permute(0, 3, 1, 2) for one in compiled.outputs]
        return Outputs(tuple(maps[:levels]), tuple(maps[levels:]))

    return run


def convert(model: RetinaNet) -> Any:
    """The network as an ``openvino.Model``: (B, 3, H, W) uint8 to logits and deltas of each level.

    Any batch size, and any height and width that are multiples of 32. The outputs are (B, H, W, C),
    which is how OpenVINO computes them and how post-processing reads them.
    """
    import openvino

    example = torch.zeros(2, 3, 128, 160, dtype=torch.uint8)
    batch, rows, columns = (torch.export.Dim(name, max=4096) for name in ("b", "h", "w"))
    shapes = {"images": {0: batch, 2: 32 * rows, 3: 32 * columns}}
    with any_size(), torch.no_grad(), quiet():
        program = torch.export.export(
            _LastChannels(fused_copy(model, torch.float32, pack=False)),
            (example,),
            dynamic_shapes=shapes,
        )
        return openvino.convert_model(program)


def quantize(converted: Any, calibration: Iterable[Tensor] | None) -> Any:
    """The model of :func:`convert` in int8, but for the last convolution of narrow heads.

    Args:
        calibration: (1, 3, H, W) uint8 images; :data:`CALIBRATION_IMAGES` are looked at.

    Raises:
        ConfigError: there is none.
        MissingExtraError: NNCF is not installed.
    """
    exact = {
        _convolution_before(output)
        for output in converted.outputs
        if output.get_partial_shape()[3].get_length() <= NARROW
    }
    return quantize_but(converted, calibration, exact)


def quantize_but(model: Any, calibration: Iterable[Tensor] | None, exact: Iterable[str]) -> Any:
    """An ``openvino.Model`` of images in int8, but for the operations named `exact`.

    Raises:
        ConfigError, MissingExtraError: as :func:`quantize`.
    """
    try:
        import nncf
    except ImportError:
        raise MissingExtraError("nncf", "openvino") from None
    images = [one.numpy() for one in islice(calibration or (), CALIBRATION_IMAGES)]
    if not images:
        raise ConfigError(
            "precision int8 is calibrated on images of the kind that will be searched: "
            "give some (--calibrate FOLDER)"
        )
    with quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(images),
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=sorted(exact)),
        )


class _LastChannels(nn.Module):
    """A network whose outputs are one flat tuple of (B, H, W, C)."""

    def __init__(self, network: RetinaNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.network(images)
        return tuple(one.permute(0, 2, 3, 1) for one in (*outputs.logits, *outputs.deltas))


def _convolution_before(output: Any) -> str:
    """The name of the convolution that makes an output of a converted model."""
    node = output.get_node()
    while node.get_type_name() != "Convolution":
        node = node.input_value(0).get_node()
    return str(node.get_friendly_name())


@contextlib.contextmanager
def any_size() -> Iterator[None]:
    """Else torch.export decides from the example that a map is larger than one cell."""
    name = "backed_size_oblivious"  # private: what a later torch lacks it does not need
    before = getattr(fx_config, name, None)
    if before is None:
        yield
        return
    setattr(fx_config, name, True)
    try:
        yield
    finally:
        setattr(fx_config, name, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """These libraries print as they go."""
    silent = io.StringIO()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            yield
    finally:
        logging.disable(level)
