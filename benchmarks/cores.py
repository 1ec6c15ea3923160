"""Compare two or more cores with one: detection in a folder, and evaluation.

    python benchmarks/cores.py MODEL IMAGES [--data DATA] [--count 60] [--rounds 5] [--cores 2]

A process on one core and a process on several run in turns; both detect in the images and write
JSON and drawn images, and with ``--data`` evaluate on that data set. Prints images/s of both and
their ratio by round, with the load average.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def work(pipe: Connection, cores: int, options: argparse.Namespace) -> None:
    """Measure images/s of each name received, on some of the cores; None ends the process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import torch

    from retinanet.data import read_dataset
    from retinanet.evaluation import evaluate
    from retinanet.inference import load
    from retinanet.inference.sources import iter_sources
    from retinanet.inference.writers import open_outputs

    torch.set_num_threads(cores)
    detector = load(options.model)
    sources = list(iter_sources([options.images]))[: options.count]

    def detect() -> int:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found"
            with open_outputs(out, ["json", "images"], drawn_score=0.3) as write:
                for result in detector.stream(sources, keep_pixels=True):
                    write(result)
        return len(sources)

    def evaluation() -> int:
        dataset = read_dataset(options.data, "val")
        evaluate(detector, dataset, batch_size=1)
        return len(dataset)

    calls: dict[str, Callable[[], int]] = {"detect": detect, "evaluate": evaluation}
    while (name := pipe.recv()) is not None:
        start = time.perf_counter()
        pipe.send(calls[name]() / (time.perf_counter() - start))


def main() -> None:
    """Run the rounds and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("images", help="folder of images")
    parser.add_argument("--data", help="labelled data to evaluate on, by its split val")
    parser.add_argument("--count", type=int, default=60, help="images of the folder to detect in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes: dict[int, Any] = {}
    for cores in (1, options.cores):
        pipes[cores], pipe = context.Pipe()
        context.Process(target=work, args=(pipe, cores, options)).start()
    names = ["detect", "evaluate"] if options.data else ["detect"]
    for i in range(-1, options.rounds):  # the first round warms up
        for name in names:
            rates: dict[int, float] = {}
            for cores, pipe in sorted(pipes.items(), reverse=bool(i % 2)):
                pipe.send(name)
                rates[cores] = pipe.recv()
            if i >= 0:
                row = {str(cores): round(rate, 2) for cores, rate in sorted(rates.items())}
                ratio = round(rates[options.cores] / rates[1], 2)
                load = round(os.getloadavg()[0], 1)
                print(json.dumps({"what": name, **row, "ratio": ratio, "load average": load}))
    for pipe in pipes.values():
        pipe.send(None)


if __name__ == "__main__":
    main()
