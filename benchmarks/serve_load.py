"""Compare the throughput of `retinanet serve` with direct calls of the detector.

    python benchmarks/serve_load.py load MODEL IMAGES [--clients 1 8 32] [--rounds 5] ...
    python benchmarks/serve_load.py soak MODEL IMAGES [--minutes 10] [--clients 8]

``load`` starts the service, a process that calls ``Detector.stream`` on the same encoded images
with the same number of threads, and a process with the clients. In each round they run one after
the other, so that other work on the machine affects all of them. The cost of the service is 1 -
(its images/s) / (images/s of the direct calls), per round. "cpu" is milliseconds of CPU time per
image, which other work affects less than the rate.

``soak`` sends requests for minutes and reports the memory of the server.

Options after ``--`` are the server's, as in ``-- --batch-size 4``; ``load`` takes several servers:
``-- -- --batch-size 4 -- --workers 2``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

MEDIA_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}


class Server:
    """`retinanet serve` in a process of its own."""

    def __init__(self, model: str, options: Sequence[str]) -> None:
        command = [sys.executable, "-m", "retinanet", "serve", model, "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.search(r"http://[^:]+:(\d+)", line)
        if match is None:
            raise SystemExit(f"the server did not start: {line}")
        self.port = int(match[1])
        self.usage = psutil.Process(self.process.pid)

    def cpu_seconds(self) -> float:
        """Return the CPU time used so far."""
        times = self.usage.cpu_times()
        return float(times.user + times.system)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(120)


def read_requests(folder: Path, maximum: int) -> tuple[list[bytes], list[bytes]]:
    """Read images of a folder; returns the encoded images and a request for each."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in MEDIA_TYPES)
    if not files:
        raise SystemExit(f"no images in {folder}")
    images, requests = [], []
    for file in files[:maximum]:
        images.append(file.read_bytes())
        head = (
            "POST /v1/detect HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: {MEDIA_TYPES[file.suffix.lower()]}\r\n"
            f"Content-Length: {len(images[-1])}\r\n\r\n"
        )
        requests.append(head.encode() + images[-1])
    return images, requests


async def run_client(
    port: int, requests: Sequence[bytes], first: int, end: float, times: list[float]
) -> Counter[int]:
    """Send one request after the other until `end`; returns the number of each status."""
    statuses: Counter[int] = Counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < end:
        start = time.perf_counter()
        writer.write(requests[(first + statuses.total()) % len(requests)])
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        await reader.readexactly(int(length[1]))
        times.append(time.perf_counter() - start)
        statuses[int(head.split(b" ", 2)[1])] += 1
    writer.close()
    return statuses


async def run_clients(
    port: int, requests: Sequence[bytes], num_clients: int, seconds: float
) -> dict[str, Any]:
    """Run clients in parallel; the time ends with the last response."""
    times: list[float] = []
    start = time.perf_counter()
    clients = [
        run_client(port, requests, 7 * i, start + seconds, times) for i in range(num_clients)
    ]
    statuses = sum(await asyncio.gather(*clients), Counter())
    rate = len(times) / (time.perf_counter() - start)
    times.sort()
    p50, p99 = (1000 * times[int(share * (len(times) - 1))] for share in (0.5, 0.99))
    return {"rate": rate, "p50": p50, "p99": p99, "statuses": dict(statuses)}


def client_process(pipe: Connection, port: int, requests: Sequence[bytes]) -> None:
    """Run clients for each (number of clients, seconds) received."""
    while (task := pipe.recv()) is not None:
        pipe.send(asyncio.run(run_clients(port, requests, *task)))


def direct_process(
    pipe: Connection, model: str, images: Sequence[bytes], threads: int, precision: str
) -> None:
    """Call the detector for each (batch size, seconds) received."""
    import torch

    from retinanet.inference import load

    torch.set_num_threads(threads)
    detector = load(model, precision=precision)
    while (task := pipe.recv()) is not None:
        batch_size, seconds = task
        end = time.perf_counter() + seconds

        def repeat(end: float = end) -> Iterator[bytes]:
            i = 0
            while time.perf_counter() < end:
                yield images[i % len(images)]
                i += 1

        start, cpu = time.perf_counter(), time.process_time()
        count = sum(1 for _ in detector.stream(repeat(), batch_size=batch_size))
        rate = count / (time.perf_counter() - start)
        pipe.send({"rate": rate, "cpu": 1000 * (time.process_time() - cpu) / count})


def measure_load(options: argparse.Namespace) -> dict[str, Any]:
    """Run rounds of the direct calls and of each number of clients at each server."""
    context = multiprocessing.get_context("spawn")
    images, requests = read_requests(options.images, 64)
    pipes: dict[Any, Connection] = {}

    def start(name: Any, target: Any, *arguments: Any) -> None:
        pipes[name], pipe = context.Pipe()
        context.Process(target=target, args=(pipe, *arguments), daemon=True).start()

    def run(name: Any, value: int, seconds: float) -> dict[str, Any]:
        cpu = 0.0 if name == "direct" else servers[name].cpu_seconds()
        pipes[name].send((value, seconds))
        result: dict[str, Any] = pipes[name].recv()
        if name != "direct":
            count = sum(result["statuses"].values())
            result["cpu"] = 1000 * (servers[name].cpu_seconds() - cpu) / count
        return result

    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(options.model, args)) for args in options.servers]
        for i, server in enumerate(servers):
            start(i, client_process, server.port, requests)
        start("direct", direct_process, options.model, images, options.threads, options.precision)
        turns: list[tuple[Any, int]] = [("direct", size) for size in options.batch_sizes]
        turns += [(i, number) for i in range(len(servers)) for number in options.clients]
        for name, value in turns:
            run(name, value, 1.5)  # warm up
        rounds = []
        for i in range(options.rounds):
            results = {
                (name, value): run(name, value, options.seconds)
                for name, value in (turns if i % 2 == 0 else reversed(turns))
            }
            rounds.append(results)
            rates = {f"{name} {value}": round(r["rate"], 2) for (name, value), r in results.items()}
            print(f"load average {os.getloadavg()[0]:.1f}: {rates}", file=sys.stderr)
        for pipe in pipes.values():
            pipe.send(None)
    return {"summary": [summarize(rounds, turn, options) for turn in turns]}


def summarize(
    rounds: Sequence[dict[Any, dict[str, Any]]], turn: tuple[Any, int], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the median figures of a turn, and its cost relative to the direct calls."""
    name, value = turn
    results = [results[turn] for results in rounds]
    is_direct = name == "direct"
    row = {
        "server": "direct" if is_direct else " ".join(options.servers[name]),
        "batch size" if is_direct else "clients": value,
    }
    for figure in ("rate", "cpu", "p50", "p99"):
        if figure in results[0]:
            row[figure] = round(statistics.median(result[figure] for result in results), 1)
    if not is_direct:
        base = ("direct", options.batch_sizes[0])
        costs = [1 - round_[turn]["rate"] / round_[base]["rate"] for round_ in rounds]
        row["cost"] = [round(f(costs), 3) for f in (min, statistics.median, max)]
        row["statuses"] = dict(sum((Counter(r["statuses"]) for r in results), Counter()))
    return row


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Send requests for minutes; returns the server's memory in MB in each tenth of the time."""
    _, requests = read_requests(options.images, 10_000)
    samples: list[float] = []
    with Server(options.model, options.servers[0]) as server:
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(options.minutes * 60 / 100):
                samples.append(server.usage.memory_info().rss / 1e6)

        thread = threading.Thread(target=sample)
        thread.start()
        clients = run_clients(server.port, requests, max(options.clients), 60 * options.minutes)
        result = asyncio.run(clients)
        ended.set()
        thread.join()
    tenths = [samples[i : i + 10] for i in range(0, len(samples), 10)]
    return result | {"megabytes": [round(statistics.median(part)) for part in tenths]}


def main() -> None:
    """Run a measurement and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measurement", choices=("load", "soak"))
    parser.add_argument("model")
    parser.add_argument("images", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="direct calls")
    parser.add_argument("--precision", default="auto")
    groups: list[list[str]] = [[]]
    for argument in sys.argv[1:]:
        if argument == "--":
            groups.append([])
        else:
            groups[-1].append(argument)
    options = parser.parse_args(groups[0])
    options.servers = [[*args, "--precision", options.precision] for args in groups[1:] or [[]]]
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of all processes
    measure = measure_load if options.measurement == "load" else measure_memory
    print(json.dumps(measure(options), indent=1))


if __name__ == "__main__":
    main()
