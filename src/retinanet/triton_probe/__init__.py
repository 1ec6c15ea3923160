"""Whether Triton's kernels can be used: asked once of each GPU, by running one.

That Triton is installed says little: at its first kernel it compiles its driver, which takes a C
compiler and Python's headers, and not every GPU is served. ``RETINANET_TRITON=0`` in the
environment switches the kernels off; torch's operations then do the same work.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch


def usable(device: torch.device) -> bool:
    """Whether kernels run on a device, or, if it is a CPU, under Triton's interpreter.

    A GPU on which they do not run is named once in a RuntimeWarning.
    """
    if os.environ.get("RETINANET_TRITON", "1") == "0" or not _installed():
        return False
    if device.type != "cuda":
        return True
    return _runs_on(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _installed() -> bool:
    return find_spec("triton") is not None


@lru_cache
def _runs_on(index: int) -> bool:
    device = torch.device("cuda", index)
    try:
        _run_one_element(device)
    except Exception as error:  # compilers, drivers and Triton each raise what they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"Triton's kernels do not run on {device}, torch's operations serve instead and are "
            f"slower: {reason}; Triton needs a C compiler and Python's headers "
            "(RETINANET_TRITON=0 does without it and this warning)",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _run_one_element(device: torch.device) -> None:
    """Compile and start a kernel; its end is not waited for, as what can fail comes before."""
    from retinanet.triton_probe.kernel import set_to_one

    value = torch.zeros(1, dtype=torch.float32, device=device)
    with torch.cuda.device_of(value):  # type: ignore[no-untyped-call]
        set_to_one[(1,)](value)
