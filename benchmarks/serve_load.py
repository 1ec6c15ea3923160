"""What the service costs beside the model itself, whether its memory is flat, and what it bears.

    python benchmarks/serve_load.py load MODEL IMAGES [--clients 1 8 32] [--rounds 5] ...
    python benchmarks/serve_load.py soak MODEL IMAGES [--minutes 10] [--clients 8]
    python benchmarks/serve_load.py mutants MODEL IMAGES [--count 1000]

``load`` starts `retinanet serve`, a process that calls the detector directly (``Detector.stream``
of the same encoded images, with the same threads), and clients in a third process. They take
turns: in each round the direct calls, then each number of clients. What the service costs is, a
round, 1 - (its images/s) / (the direct ones). "cpu" is milliseconds of processors an image: on a
machine that others use too it says more than the rate.

Arguments of the server go behind ``--``, as in ``-- --batch-size 4``. ``load`` takes several, each
for a server of its own that takes turns with the others: ``-- -- --batch-size 4 -- --workers 2``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
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

KINDS = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".bmp": "image/bmp"}


def images_of(folder: Path, most: int) -> list[tuple[str, bytes]]:
    """(media type, content) of the first images in a folder."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in KINDS)[:most]
    if not files:
        raise SystemExit(f"{folder}: no image")
    return [(KINDS[file.suffix.lower()], file.read_bytes()) for file in files]


class Server:
    """`retinanet serve` in a process of its own."""

    def __init__(self, model: str, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "retinanet", "serve", model, "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://[^:]+:(\d+)", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line}")
        self.port = int(found[1])

    def worked(self) -> float:
        """Seconds of processors that it has used."""
        used = psutil.Process(self.process.pid).cpu_times()
        return float(used.user + used.system)

    def memory(self) -> float:
        """Resident, MB."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6

    def end(self) -> int:
        """Its exit code after Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(120)


@contextlib.contextmanager
def started(model: str, arguments: Sequence[str]) -> Iterator[Server]:
    """A server that is ended."""
    server = Server(model, arguments)
    try:
        yield server
    finally:
        print(f"the server ended with {server.end()}", file=sys.stderr)


def request_of(kind: str, data: bytes) -> bytes:
    """One image as a request."""
    head = (
        f"POST /v1/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """Status, body, and whether the connection stays."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    body = await reader.readexactly(int(length[1])) if length else b""
    return int(head.split(b" ", 2)[1]), body, b"connection: close" not in head


async def client(
    port: int, requests: Sequence[bytes], first: int, until: float, times: list[float], seen: Any
) -> None:
    """One client: a request after the other on one connection."""
    place = first
    streams: Any = None
    while time.perf_counter() < until:
        if streams is None:
            streams = await asyncio.open_connection("127.0.0.1", port)
        began = time.perf_counter()
        streams[1].write(requests[place % len(requests)])
        status, _, stays = await answer_of(streams[0])
        times.append(time.perf_counter() - began)
        seen[status] += 1
        place += 1
        if not stays:
            streams[1].close()
            streams = None
    if streams is not None:
        streams[1].close()


async def load(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Any:
    """So many clients for so long: requests/s, latencies, statuses."""
    times: list[float] = []
    seen: Counter[int] = Counter()
    began = time.perf_counter()
    # All that are asked before the end are answered: the clock ends with the last answer.
    await asyncio.gather(
        *(client(port, requests, 7 * i, began + seconds, times, seen) for i in range(clients))
    )
    took = time.perf_counter() - began
    times.sort()
    return {
        "rate": len(times) / took,
        "p50": 1000 * times[len(times) // 2],
        "p99": 1000 * times[min(len(times) - 1, int(0.99 * len(times)))],
        "statuses": dict(seen),
    }


def generator(pipe: Connection, port: int, images: Sequence[tuple[str, bytes]]) -> None:
    """The process of the clients: does what it is told through the pipe."""
    requests = [request_of(*one) for one in images]
    while (order := pipe.recv()) is not None:
        pipe.send(asyncio.run(load(port, requests, *order)))


def direct(
    pipe: Connection,
    model: str,
    images: Sequence[bytes],
    threads: int,
    precision: str,
) -> None:
    """The process that calls the detector itself."""
    import torch

    from retinanet.inference import load as load_model

    torch.set_num_threads(threads)
    detector = load_model(model, precision=precision)
    while (order := pipe.recv()) is not None:
        batch_size, seconds = order
        until = time.perf_counter() + seconds

        def endless(until: float = until) -> Iterator[bytes]:
            place = 0
            while time.perf_counter() < until:
                yield images[place % len(images)]
                place += 1

        began, worked = time.perf_counter(), time.process_time()
        count = sum(1 for _ in detector.stream(endless(), batch_size=batch_size))
        rate = count / (time.perf_counter() - began)
        pipe.send({"rate": rate, "cpu": 1000 * (time.process_time() - worked) / count})


def measure_load(given: argparse.Namespace) -> dict[str, Any]:
    """Rounds of the direct calls and of each number of clients at each server."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    images = images_of(given.images, 64)
    files = [data for _, data in images]
    pipes: dict[Any, Any] = {}

    def begin(name: Any, work: Any, *arguments: Any) -> None:
        here, there = context.Pipe()
        context.Process(target=work, args=(there, *arguments), daemon=True).start()
        pipes[name] = here

    def ask(name: Any, *order: Any) -> Any:
        pipes[name].send(order)
        return pipes[name].recv()

    processes: dict[int, Server] = {}
    with contextlib.ExitStack() as servers:
        for i, arguments in enumerate(given.servers):
            processes[i] = servers.enter_context(started(given.model, arguments))
            begin(i, generator, processes[i].port, images)
        begin("direct", direct, given.model, files, given.threads, given.precision)
        turns: list[tuple[Any, int]] = [("direct", batch) for batch in given.batch_sizes]
        turns += [(i, clients) for i in range(len(given.servers)) for clients in given.clients]
        for name, value in turns:
            ask(name, value, 1.5)  # all are warm
        rounds = []
        for i in range(given.rounds):
            one: dict[str, Any] = {"load": os.getloadavg()[0]}
            for name, value in turns if i % 2 == 0 else turns[::-1]:
                before = 0.0 if name == "direct" else processes[name].worked()
                got = ask(name, value, given.seconds)
                if name != "direct":
                    answers = sum(got["statuses"].values())
                    got["cpu"] = 1000 * (processes[name].worked() - before) / answers
                one[f"{name} {value}"] = got
            rounds.append(one)
            print(json.dumps(one), file=sys.stderr)
        for pipe in pipes.values():
            pipe.send(None)
    return {"summary": summary(rounds, given), "rounds": rounds}


def summary(rounds: Sequence[dict[str, Any]], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over the rounds; what each costs of the direct calls' rate, with its range."""
    rows: list[dict[str, Any]] = []
    for key in rounds[0]:
        if key == "load":
            continue
        name, value = key.split(" ")
        row: dict[str, Any] = {
            "who": "direct" if name == "direct" else " ".join(given.servers[int(name)]),
            "batch size" if name == "direct" else "clients": int(value),
        }
        for figure in ("rate", "cpu", "p50", "p99"):
            if figure in rounds[0][key]:
                row[figure] = round(statistics.median(one[key][figure] for one in rounds), 1)
        if name != "direct":
            base = f"direct {given.batch_sizes[0]}"
            costs = sorted(1 - one[key]["rate"] / one[base]["rate"] for one in rounds)
            row["cost"] = round(statistics.median(costs), 3)
            row["costs"] = [round(cost, 3) for cost in costs]
            statuses: Counter[Any] = Counter()
            for one in rounds:
                statuses.update(one[key]["statuses"])
            row["statuses"] = dict(statuses)
        rows.append(row)
    return rows


def measure_memory(given: argparse.Namespace) -> dict[str, Any]:
    """Minutes of load with the server's memory looked at."""
    images = images_of(given.images, 10_000)
    requests = [request_of(*one) for one in images]
    samples: list[tuple[float, float]] = []
    with started(given.model, given.servers[0]) as server:
        ended = threading.Event()
        began = time.perf_counter()

        def sample() -> None:
            while True:
                samples.append((time.perf_counter() - began, server.memory()))
                if ended.wait(2):
                    return

        thread = threading.Thread(target=sample)
        thread.start()
        result = asyncio.run(load(server.port, requests, max(given.clients), 60 * given.minutes))
        ended.set()
        thread.join()
    whole = samples[-1][0]
    result["memory"] = [
        {
            "minutes": [round(low * whole / 600, 1), round((low + 1) * whole / 600, 1)],
            "median": statistics.median(part),
            "most": max(part),
        }
        for low in range(10)
        if (part := [mb for at, mb in samples if low <= 10 * at / (whole + 1e-9) < low + 1])
    ]
    return dict(result)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A file as a broken disk, a broken line or an enemy makes it."""
    changed = bytearray(data)
    kind = chance.randrange(6)
    if kind == 0:  # cut short
        return bytes(changed[: chance.randrange(len(changed))])
    if kind == 1:  # bits of the header
        for _ in range(chance.randint(1, 8)):
            changed[chance.randrange(min(len(changed), 700))] ^= 1 << chance.randrange(8)
    elif kind == 2:  # bits anywhere
        for _ in range(chance.randint(1, 64)):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    elif kind == 3:  # a run of one byte, or of any
        start = chance.randrange(len(changed))
        run = chance.randint(1, 400)
        fill = (
            chance.randbytes(run) if chance.random() < 0.5 else bytes([chance.randrange(256)]) * run
        )
        changed[start : start + run] = fill
    elif kind == 4:  # a piece gone, or there twice
        start = chance.randrange(len(changed))
        piece = changed[start : start + chance.randint(1, 2000)]
        changed[start : start + (len(piece) if chance.random() < 0.5 else 0)] = (
            piece * chance.randrange(3)
        )
    else:  # another size: of JPEG (SOF), PNG (IHDR)
        for marker, offset in ((b"\xff\xc0", 5), (b"\xff\xc2", 5), (b"IHDR", 4)):
            if (place := changed.find(marker)) >= 0:
                changed[place + offset : place + offset + 4] = chance.randbytes(4)
                break
    return bytes(changed)


def encoded(images: Sequence[bytes]) -> list[tuple[str, bytes]]:
    """The same images in the formats that are served."""
    import io

    from PIL import Image

    found = []
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {}),
        ("PPM", {}),
        ("JPEG2000", {}),
        ("AVIF", {}),
    ]
    for i, (kind, options) in enumerate(kinds):
        with Image.open(io.BytesIO(images[i % len(images)])) as image:
            file = io.BytesIO()
            image.resize((image.width // 2, image.height // 2)).save(file, kind, **options)
        found.append((f"image/{kind.lower()}", file.getvalue()))
    return found


async def _mutants(port: int, requests: Sequence[bytes], seen: Counter[int]) -> list[str]:
    failed = []

    async def some(part: Sequence[bytes]) -> None:
        streams: Any = None
        for one in part:
            if streams is None:
                streams = await asyncio.open_connection("127.0.0.1", port)
            streams[1].write(one)
            status, body, stays = await answer_of(streams[0])
            seen[status] += 1
            if status >= 500:
                failed.append(body.decode()[:300])
            if not stays:
                streams[1].close()
                streams = None

    await asyncio.gather(*(some(requests[i::8]) for i in range(8)))
    return failed


def measure_mutants(given: argparse.Namespace) -> dict[str, Any]:
    """Broken uploads: their statuses, and the memory before and after."""
    chance = random.Random(given.seed)
    whole = [data for _, data in images_of(given.images, 64)]
    files = encoded(whole) + [("image/jpeg", data) for data in whole[:4]]
    requests = []
    for i in range(given.count):
        kind, data = files[i % len(files)]
        requests.append(request_of(kind, mutated(data, chance)))
    seen: Counter[int] = Counter()
    with started(given.model, given.servers[0]) as server:
        asyncio.run(_mutants(server.port, requests[:50], Counter()))
        before = server.memory()
        failed = asyncio.run(_mutants(server.port, requests, seen))
        after = server.memory()
    return {"statuses": dict(seen), "failed": failed, "megabytes": [before, after]}


def main() -> None:
    """Do one of them and print it as JSON."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("what", choices=("load", "soak", "mutants"))
    words.add_argument("model")
    words.add_argument("images", type=Path)
    words.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--seconds", type=float, default=6.0)
    words.add_argument("--minutes", type=float, default=10.0)
    words.add_argument("--count", type=int, default=1000)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--threads", type=int, default=os.cpu_count())
    words.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1], help="direct; the first is the measure"
    )
    words.add_argument("--precision", default="auto")
    groups: list[list[str]] = [[]]
    for one in sys.argv[1:]:
        if one == "--":
            groups.append([])
        else:
            groups[-1].append(one)
    given = words.parse_args(groups[0])
    given.servers = [[*one, "--precision", given.precision] for one in groups[1:] or [[]]]
    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # of all that is started
    import torch

    from retinanet.bench import describe_machine

    measure = {"load": measure_load, "soak": measure_memory, "mutants": measure_mutants}
    result = measure[given.what](given)
    torch.set_num_threads(given.threads)
    result["machine"] = describe_machine(torch.device("cpu")).lines()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
