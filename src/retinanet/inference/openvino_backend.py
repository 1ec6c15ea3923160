"""OpenVINO on a CPU: conversion, int8 quantisation with NNCF, and execution."""

from __future__ import annotations

import contextlib
import io
import logging
import platform
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config

from retinanet.errors import ConfigError, import_extra
from retinanet.model.fused import fused_copy
from retinanet.model.precision import choose_dtype
from retinanet.model.retinanet import RetinaNet
from retinanet.structures import Outputs

CALIBRATION_IMAGES = 300
"""NNCF's default; more images change the result little."""

NARROW = 128
"""Maximum channels of a head's last convolution that is left out of int8.

Its error would be that of the scores and boxes themselves. A wider one (many classes) is a sixth of
the network's work, and its error in int8 was measured as a tenth of the error of its input.
"""

MAX_INT8_DEVIATION = 0.1
"""Relative rms of int8 outputs to float32 outputs above which quantisation warns."""

_COMPARED_IMAGES = 8

_HINTS = {"float32": "f32", "bf16": "bf16", "fp16": "f16"}


class OpenVINONetwork:
    """An ``openvino.Model`` as a function of images, with torch's number of threads.

    Copies and pickles contain the compiled model, for the same version of OpenVINO.

    Attributes:
        deviation: of int8: relative rms of the outputs to those of float32; None otherwise.
    """

    def __init__(self, compiled: Any, levels: int, hint: str) -> None:
        self._compiled = compiled
        self._levels = levels
        self._hint = hint
        self.deviation: float | None = None

    def __call__(self, images: Tensor) -> Outputs:
        """(B, 3, H, W) images to the outputs of the network; several threads may call."""
        if images.dtype != torch.uint8:
            images = images.round().clamp(0, 255).to(torch.uint8)
        results = self._compiled.create_infer_request().infer([images.numpy()])
        ordered = [torch.from_numpy(results[output]) for output in self._compiled.outputs]
        maps = [level.permute(0, 3, 1, 2) for level in ordered]
        return Outputs(tuple(maps[: self._levels]), tuple(maps[self._levels :]))

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"deviation": self.deviation}
        return _import_network, (self._compiled.export_model(), self._levels, self._hint), state


def _import_network(blob: bytes, levels: int, hint: str) -> OpenVINONetwork:
    # The exported model does not contain its precision: bf16 would be used where the CPU has it.
    compiled = openvino_core().import_model(blob, "CPU", _settings(hint))
    return OpenVINONetwork(compiled, levels, hint)


def openvino_core() -> Any:
    """Return the ``openvino.Core`` of this process, which is never deleted.

    OpenVINO 2026.4 sets a signal stack for the thread that first uses a core, and frees it with
    the core: the next signal, such as that of Ctrl-C or of a data loader, crashes the process.
    """
    return _core(import_extra("openvino", "openvino"))


@cache
def _core(openvino: Any) -> Any:
    return openvino.Core()


def compile_on_cpu(model: Any, hint: str = "f32") -> Any:
    """Compile an ``openvino.Model`` for this CPU, with torch's number of threads."""
    return openvino_core().compile_model(model, "CPU", _settings(hint))


def _settings(hint: str) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }


def openvino_network(
    model: RetinaNet, precision: str, calibration: Iterable[Tensor] | None = None
) -> OpenVINONetwork:
    """Convert a network for OpenVINO; int8 is compared with float32 on the calibration images.

    Args:
        model: on the CPU, in eval mode.
        precision: "float32", "bf16", "fp16" or "int8"; the layers that int8 leaves out are bf16 on
            a processor with bf16 units.
        calibration: as for :func:`retinanet.inference.backends.build_network`.
    """
    openvino_core()  # installed?
    images = calibration_images(calibration) if precision == "int8" else []  # before the conversion
    levels = len(model.strides)
    converted = convert(model)
    if precision != "int8":
        return OpenVINONetwork(
            compile_on_cpu(converted, _HINTS[precision]), levels, _HINTS[precision]
        )
    exact = {
        _convolution_before(output)
        for output in converted.outputs
        if output.get_partial_shape()[3].get_length() <= NARROW
    }
    quantized = quantize(converted, images, exact, overflow_fix=not has_vnni())
    has_bf16 = choose_dtype("auto", torch.device("cpu")) == torch.bfloat16
    hint = "bf16" if has_bf16 else "f32"
    network = OpenVINONetwork(compile_on_cpu(quantized, hint), levels, hint)
    reference = OpenVINONetwork(compile_on_cpu(converted, "f32"), levels, "f32")
    network.deviation = max(_deviations(network, reference, images[:_COMPARED_IMAGES]))
    if network.deviation > MAX_INT8_DEVIATION:
        warnings.warn(
            f"int8 outputs differ from float32 by {network.deviation:.0%} rms on the calibration "
            f"images, over {MAX_INT8_DEVIATION:.0%}; compare the AP (retinanet evaluate), and "
            "calibrate on images like those to be detected in",
            stacklevel=3,
        )
    return network


def _deviations(
    network: OpenVINONetwork, reference: OpenVINONetwork, images: list[Tensor]
) -> list[float]:
    """Relative rms differences of the logits and of the deltas."""
    error, total = torch.zeros(2), torch.zeros(2)
    for image in images:
        for part, (ours, theirs) in enumerate(zip(network(image), reference(image), strict=True)):
            for out, expected in zip(ours, theirs, strict=True):
                centred = expected - expected.mean() if part == 0 else expected
                error[part] += (out - expected).square().sum()
                total[part] += centred.square().sum()
    return (error / total.clamp(min=1e-12)).sqrt().tolist()


def convert(model: RetinaNet) -> Any:
    """Convert to an ``openvino.Model``: (B, 3, H, W) uint8 to logits and deltas of each level.

    Any batch size, and any height and width that are multiples of 32. The outputs are (B, H, W, C):
    OpenVINO computes them so, and post-processing reads them so.
    """
    import openvino

    example = torch.zeros(2, 3, 128, 160, dtype=torch.uint8)
    batch, rows, columns = (torch.export.Dim(name, max=4096) for name in ("b", "h", "w"))
    shapes = {"images": {0: batch, 2: 32 * rows, 3: 32 * columns}}
    with any_size(), torch.no_grad(), quiet():
        program = torch.export.export(
            _ChannelsLastOutputs(fused_copy(model, torch.float32, pack=False)),
            (example,),
            dynamic_shapes=shapes,
        )
        return openvino.convert_model(program)


def has_vnni() -> bool:
    """Return whether this CPU multiplies int8 without saturating 16-bit sums (VNNI, or Arm)."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686", "x86"):
        return True
    # Private, but torch offers no other check; a missing function counts as no support.
    return bool(getattr(torch.cpu, "_is_vnni_supported", bool)())


def calibration_images(calibration: Iterable[Tensor] | None) -> list[Tensor]:
    """Take up to :data:`CALIBRATION_IMAGES` images."""
    images = list(islice(calibration or (), CALIBRATION_IMAGES))
    if not images:
        raise ConfigError(
            "precision int8 is calibrated on images like those to be detected in: "
            "give some (--calibrate FOLDER)"
        )
    return images


def quantize(
    model: Any, images: Iterable[Tensor], exact: Iterable[str], *, overflow_fix: bool
) -> Any:
    """Quantise an ``openvino.Model`` of images to int8.

    Args:
        model: as :func:`convert` gives it, or any other with one input.
        images: (1, 3, H, W) uint8.
        exact: names of the operations to leave out.
        overflow_fix: keep weights to 7 bits. Without VNNI, x86 CPUs add pairs of 8-bit products in
            16 bits, which saturate: set it for a model that may run on one. It costs half a step of
            rounding in the weights. Source: NNCF, ``OverflowFix``.
    """
    nncf = import_extra("nncf", "openvino")
    advanced = import_extra("nncf.quantization.advanced_parameters", "openvino")
    arrays = [image.numpy() for image in images]
    fix = advanced.OverflowFix.ENABLE if overflow_fix else advanced.OverflowFix.DISABLE
    with quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(arrays),
            subset_size=len(arrays),
            ignored_scope=nncf.IgnoredScope(names=sorted(exact)),
            advanced_parameters=advanced.AdvancedQuantizationParameters(overflow_fix=fix),
        )


class _ChannelsLastOutputs(nn.Module):
    """A network whose outputs are one flat tuple of (B, H, W, C)."""

    def __init__(self, network: RetinaNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.network(images)
        return tuple(level.permute(0, 2, 3, 1) for level in (*outputs.logits, *outputs.deltas))


def _convolution_before(output: Any) -> str:
    """Return the name of the convolution that produces an output of a converted model."""
    node = output.get_node()
    while node.get_type_name() != "Convolution":
        node = node.input_value(0).get_node()
    return str(node.get_friendly_name())


def any_size() -> contextlib.AbstractContextManager[object]:
    """Keep torch.export from concluding from the example that a map is larger than one cell."""
    name = "backed_size_oblivious"  # private: a torch without it does not need it
    config: Any = fx_config
    if not hasattr(config, name):
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[object] = config.patch(name, True)
    return patched


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress output of OpenVINO and NNCF."""
    silent = io.StringIO()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            yield
    finally:
        logging.disable(level)
