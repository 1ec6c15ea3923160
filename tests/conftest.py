"""Shared fixtures, test order, and the peak memory of each worker."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

# With `pytest -n` each worker, and each process that its tests start, uses its share of the cores:
# oversubscribed threads would slow each other down. Must be set before torch is imported.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_PEAKS: dict[str, int] = {}


def pytest_configure() -> None:
    # SIGINT is ignored in what a shell starts in the background; tests of Ctrl-C need the handler.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests marked ``slow`` first: at the end the other worker would wait for them."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    gc.freeze()  # the items and the modules stay: going through them takes a second


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None and sys.platform == "linux":
        import resource

        output["peak_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _PEAKS[node.gateway.id] = getattr(node, "workeroutput", {}).get("peak_kib", 0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for worker, peak in sorted(_PEAKS.items()):
        terminalreporter.write_line(f"peak memory of worker {worker}: {peak / 2**20:.2f} GiB")


_MAX_GROWTH = 200 * 2**20
_trimmed = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Give freed memory back to the system once it has grown: glibc keeps gigabytes otherwise."""
    global _trimmed
    if sys.platform == "linux" and _resident() > _trimmed + _MAX_GROWTH:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
        _trimmed = _resident()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture(scope="session", autouse=True)
def _tiny_backbone() -> None:
    """Register the backbone ``tiny``, which nearly all tests that need a network use."""
    import tiny_backbone  # noqa: F401


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real data sets; tests that use it are marked ``data``."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("RETINANET_DATA", default)).resolve()
    if not (folder / "bccd").is_dir():
        pytest.skip(f"no real data at {folder}; set RETINANET_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def real_weights(real_data: Path) -> Path:
    """Return the ImageNet MobileNetV2 weights next to the real data."""
    file = real_data.parent / "weights" / "mobilenet_v2_imagenet.safetensors"
    if not file.is_file():
        pytest.skip(f"no backbone weights at {file}")
    return file
