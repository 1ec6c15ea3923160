"""Find out whether Triton kernels can be used, once per GPU, by running one.

That Triton is installed says little: at its first kernel it compiles its driver, which needs a C
compiler and Python's headers, and not every GPU is supported. ``RETINANET_TRITON=0`` in the
environment switches the kernels off; torch's operations then do the same work.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch


def is_usable(device: torch.device) -> bool:
    """Return True if kernels run on a device (on a CPU: under Triton's interpreter).

    A GPU on which they do not run is named once in a RuntimeWarning.
    """
    if os.environ.get("RETINANET_TRITON", "1") == "0" or not is_installed():
        return False
    if device.type != "cuda":
        return True
    return _runs_on(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def is_installed() -> bool:
    """Return True if Triton can be imported."""
    return find_spec("triton") is not None


def run_probe(device: torch.device) -> None:
    """Compile and launch the smallest kernel, without waiting for its end."""
    from retinanet.kernels.triton_focal import set_to_one

    value = torch.zeros(1, dtype=torch.float32, device=device)
    with torch.cuda.device_of(value):  # type: ignore[no-untyped-call]
        set_to_one[(1,)](value)


@lru_cache
def _runs_on(index: int) -> bool:
    device = torch.device("cuda", index)
    try:
        run_probe(device)
    except Exception as error:  # compilers, drivers and Triton each raise what they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"Triton kernels do not run on {device}, so torch's operations are used, which are "
            f"slower: {reason}; Triton needs a C compiler and Python's headers "
            "(RETINANET_TRITON=0 avoids this warning)",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
