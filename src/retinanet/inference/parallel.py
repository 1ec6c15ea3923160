"""Run images through several threads: on a CPU faster than each image on all cores.

The cores of one convolution wait for each other at its end, and long where one of them has other
work; those of different images do not wait.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")
_R = TypeVar("_R")

_setting = threading.Lock()

_MAX_WORKERS = 4  # each has the feature maps of a batch in memory


def network_workers(network: Any) -> int:
    """Return the number of threads that run a network at once: with torch on a CPU several."""
    on_cpu = network.device.type == "cpu" and network.backend == "torch"
    return min(_MAX_WORKERS, torch.get_num_threads()) if on_cpu else 1


def use_cores(cores: int) -> None:
    """Set the number of cores that torch uses in the calling thread; not in others."""
    # Setting it also sets the default of new threads: that is read and set again in a new thread,
    # as running threads keep their number.
    with _setting, ThreadPoolExecutor(1) as new_thread:
        default = new_thread.submit(torch.get_num_threads).result()
        torch.get_num_threads()  # a thread takes the default at its first use
        torch.set_num_threads(cores)
        new_thread.submit(torch.set_num_threads, default).result()


def map_ahead(
    call: Callable[[_T], _R], items: Iterable[_T], workers: int, *, cores: int = 1, ahead: int = 0
) -> Iterator[_R]:
    """Yield the results of the calls in order, made in threads; the first is made in this one.

    So it does not wait for the second item of a live source, and a single image has all cores.

    Args:
        call: may be called by several threads at once.
        items: taken in the calling thread; after the first at most `workers + ahead` before they
            are needed.
        workers: number of threads.
        cores: number of cores that torch uses in each.
        ahead: further items that are taken early.
    """
    items = iter(items)
    for first in islice(items, 1):
        yield call(first)
        del first  # it may be a huge image
    pending: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(workers, "map", initializer=use_cores, initargs=(cores,)) as pool:
        try:
            while True:
                taken = islice(items, workers + ahead - len(pending))
                pending.extend(pool.submit(call, item) for item in taken)
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def map_network(
    network: Any, call: Callable[[_T], _R], items: Iterable[_T], *, ahead: int = 0
) -> Iterator[_R]:
    """Yield the results of calls that run a network, in order; its workers share the cores."""
    workers = network_workers(network)
    if workers == 1:
        return map(call, items)
    cores = torch.get_num_threads() // workers
    return map_ahead(call, items, workers, cores=cores, ahead=ahead)
