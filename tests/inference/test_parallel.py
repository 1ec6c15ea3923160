"""Threads that run images: order, bounded reading ahead, and torch's cores in each."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retinanet.inference.backends import map_ahead, map_network, network_workers, use_cores


@pytest.fixture
def four_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def in_new_thread(call: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_map_ahead_keeps_the_order_and_takes_few_items_early() -> None:
    taken: list[int] = []
    items = (taken.append(i) or i for i in range(100))
    results = map_ahead(lambda i: i * i, items, 3, ahead=2)
    assert next(results) == 0
    assert taken == [0]  # the first result does not wait for a second item
    assert next(results) == 1
    assert len(taken) == 1 + 5  # three workers, and two ahead
    assert list(results) == [i * i for i in range(2, 100)]


def test_map_ahead_single_item_runs_in_the_calling_thread() -> None:
    assert list(map_ahead(lambda _: threading.current_thread(), [0], 2)) == [
        threading.current_thread()
    ]
    assert list(map_ahead(lambda _: threading.current_thread(), [], 2)) == []


def test_map_ahead_does_not_keep_the_first_item() -> None:
    kept: list[Any] = []

    def items() -> Iterator[torch.Tensor]:
        for _ in range(4):
            item = torch.zeros(1)
            kept.append(weakref.ref(item))
            yield item
            del item

    results = map_ahead(lambda item: None, items(), 1)
    next(results)
    next(results)
    assert kept[0]() is None


def test_map_ahead_raises_and_ends_its_threads() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(map_ahead(lambda i: 1 // (3 - i), range(100), 2))
    assert threading.active_count() == before


def test_map_network_shares_the_cores_among_its_threads(four_cores: None) -> None:
    network = SimpleNamespace(device=torch.device("cpu"), backend="torch")
    cores = list(map_network(network, lambda _: torch.get_num_threads(), range(8)))
    assert cores == [4] + [1] * 7  # the first has all
    assert torch.get_num_threads() == 4  # of this thread, and of new ones
    assert in_new_thread(torch.get_num_threads) == 4


def test_use_cores_in_a_thread_again_keeps_the_number_of_new_threads(four_cores: None) -> None:
    def use(*numbers: int) -> int:
        for cores in numbers:
            use_cores(cores)
        return torch.get_num_threads()

    assert in_new_thread(lambda: use(1, 2)) == 2  # as for a lone image of a server
    assert torch.get_num_threads() == 4
    assert in_new_thread(torch.get_num_threads) == 4


@pytest.mark.parametrize(("device", "backend"), [("cuda", "torch"), ("cpu", "openvino")])
def test_network_workers_is_one_where_the_backend_has_threads(device: str, backend: str) -> None:
    network = SimpleNamespace(device=torch.device(device), backend=backend)
    assert network_workers(network) == 1
    here = threading.current_thread()
    assert list(map_network(network, lambda _: threading.current_thread(), [1, 2])) == [here, here]
