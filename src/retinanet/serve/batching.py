"""Images of many requests through one network: unpacked in threads, searched in batches."""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from retinanet.errors import ConfigError
from retinanet.inference import Detector, ImageDetections, Source
from retinanet.inference.detector import Prepared
from retinanet.inference.exported import ExportedNetwork
from retinanet.model.retinanet import RetinaNet
from retinanet.serve.metrics import Metrics
from retinanet.serve.refusal import Refusal, busy
from retinanet.serve.settings import Settings
from retinanet.serve.upload import Upload, check_image, reason_of

_RECENT = 200
"""Images over which the speed of a model is the median."""

_GPU_BATCH = 8


@dataclass(frozen=True, slots=True)
class Searched:
    """What became of one image.

    Attributes:
        found: what is in it.
        queue_seconds: that it waited, unpacked, for the network.
        network_seconds: its share of the time of its batch.
    """

    found: ImageDetections
    queue_seconds: float
    network_seconds: float


@dataclass(slots=True, eq=False)
class _Job:
    model: str
    upload: Upload
    thresholds: dict[str, Any]
    # Cancelled by whoever waits for it, when nobody does any more.
    answer: Future[Searched] = field(default_factory=Future)
    prepared: Prepared | None = None
    key: tuple[Any, ...] = ()
    ready: float = 0.0


class Batcher:
    """The way of images through the detectors; :meth:`start` it before the first.

    A batch holds images of one model, one size (at the network, padded to multiples of 32) and
    the same thresholds alone: nothing is spent on padding, and what is found in an image does not
    depend on what else was in its batch, but for rounding. The oldest image's batch goes first.
    While the network runs, the next ones gather.

    Args:
        detectors: by name.
        settings: how many threads, how large a batch, how long a queue.
    """

    def __init__(self, detectors: Mapping[str, Detector], settings: Settings) -> None:
        self.detectors = dict(detectors)
        self.settings = settings
        self.metrics = Metrics(lambda: self.waiting)
        self.warm = False
        self.failed: Exception | None = None
        self._changed = threading.Condition()
        self._ready: deque[_Job] = deque()
        self._inside = 0
        self._at_network = 0
        self._ending = False
        self._seconds: dict[str, deque[float]] = {name: deque(maxlen=_RECENT) for name in detectors}
        self._threads: list[threading.Thread] = []
        readers = settings.readers or min(4, os.cpu_count() or 1)
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="read-image")

    @property
    def alive(self) -> bool:
        """Whether the threads of the networks run."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def waiting(self) -> int:
        """Images that are not yet at the network."""
        return max(0, self._inside - self._at_network)

    def seconds(self, model: str) -> float | None:
        """Of the network for one image, the median of the last; None: it has seen none."""
        known = list(self._seconds[model])
        return statistics.median(known) if known else None

    def start(self) -> None:
        """Warm the networks up in their threads, then take work; :attr:`warm` says when."""
        barrier = threading.Barrier(self.settings.workers)
        for i in range(self.settings.workers):
            thread = threading.Thread(
                target=self._work, args=(barrier,), name=f"network-{i}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Finish what was begun; what waits is dropped."""
        with self._changed:
            self._ending = True
            for job in self._ready:
                job.answer.cancel()
            self._ready.clear()
            self._changed.notify_all()
        self._readers.shutdown(cancel_futures=True)
        for thread in self._threads:
            thread.join()

    def check_room(self, images: int = 1) -> None:
        """Raise a 503 where so many more images would be more than the queue takes."""
        with self._changed:
            self._check_room(images)

    def submit(
        self, model: str, uploads: Sequence[Upload], thresholds: Mapping[str, Any]
    ) -> list[Future[Searched]]:
        """Take images in, all or none.

        Args:
            model: its name.
            uploads: the images.
            thresholds: laid over the model's, checked.

        Returns:
            For each its future: what was found; as its exception a :class:`Refusal` of the image,
            or what the network raised. Cancel those that nobody waits for any more.

        Raises:
            Refusal: 503, the queue is full; 400, an exported file has other thresholds built in.
        """
        detector = self.detectors[model]
        if isinstance(detector.network, ExportedNetwork):
            try:
                detector.network.check({**detector.thresholds, **thresholds})  # type: ignore[typeddict-item]
            except ConfigError as error:
                raise Refusal(400, "option", str(error)) from None
        with self._changed:
            self._check_room(len(uploads))
            self._inside += len(uploads)
        jobs = [_Job(model, upload, dict(thresholds)) for upload in uploads]
        for job in jobs:
            job.answer.add_done_callback(partial(self._left, job))
            self._readers.submit(self._read, job)
        return [job.answer for job in jobs]

    def _check_room(self, images: int) -> None:
        if self._ending or not self.warm:
            raise busy("the server is starting or stopping: try again", 2)
        if self._inside + images > self.settings.queue:
            known = [one for name in self.detectors if (one := self.seconds(name)) is not None]
            seconds = max(known, default=1.0) * self._inside / self.settings.workers
            raise busy(
                f"{self._inside} images are waiting, of {self.settings.queue} that may: try again",
                math.ceil(seconds),
            )

    def _left(self, job: _Job, answer: Future[Searched]) -> None:
        # One that was given up may stand in line for long, where nobody counts its bytes any more.
        job.upload = Upload(job.upload.name, b"")
        with self._changed:
            self._inside -= 1
            if answer.cancelled():
                job.prepared = None

    def _read(self, job: _Job) -> None:
        upload = job.upload
        if job.answer.cancelled():
            return
        try:
            check_image(upload.data, self.settings)
            prepared = self.detectors[job.model].prepare(Source(upload.data, upload.name))
        except Refusal as error:
            _fail(job, error)
            return
        except Exception as error:  # of any decoder; the request's answer says it
            _fail(job, Refusal(422, "unreadable", reason_of(error, upload.name)))
            return
        height, width = prepared.pixels.shape[-2:]
        divisor = RetinaNet.size_divisor
        canvas = (math.ceil(height / divisor), math.ceil(width / divisor))
        job.key = (job.model, canvas, tuple(sorted(job.thresholds.items())))
        job.ready = time.perf_counter()
        with self._changed:
            if self._ending:
                job.answer.cancel()
                return
            if job.answer.cancelled():
                return
            job.prepared = prepared
            self._ready.append(job)
            self._changed.notify()

    def _work(self, barrier: threading.Barrier) -> None:
        try:
            for detector in self.detectors.values():
                _warm_up(detector)
            barrier.wait()
            self.warm = True
        except Exception as error:
            self.failed = self.failed or error  # the others' is that the barrier broke
            barrier.abort()
            return
        while True:
            jobs = self._next()
            if not jobs:
                return
            self._search(jobs)
            del jobs  # the images' memory is free while the next ones are waited for

    def _next(self) -> list[_Job]:
        """The oldest image and those that go with it; empty: it is time to end."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._ready or self._ending)
                if self._ending:
                    return []
                first = self._ready[0]
                most = self.settings.batch_size or (
                    1 if self.detectors[first.model].device.type == "cpu" else _GPU_BATCH
                )
                wait = self.settings.max_wait_ms / 1000
                if wait and most > 1:
                    self._changed.wait_for(
                        lambda key=first.key, most=most: (  # type: ignore[misc]
                            self._ending or sum(job.key == key for job in self._ready) >= most
                        ),
                        wait,
                    )
                chosen = [job for job in self._ready if job.key == first.key][:most]
                for job in chosen:
                    self._ready.remove(job)
                # Those that were given up meanwhile drop out here.
                jobs = [job for job in chosen if job.answer.set_running_or_notify_cancel()]
                if jobs:
                    self._at_network += len(jobs)
                    return jobs

    def _search(self, jobs: list[_Job]) -> None:
        model = jobs[0].model
        detector = self.detectors[model]
        images = [job.prepared for job in jobs if job.prepared is not None]
        began = time.perf_counter()
        try:
            objects = detector.detect_prepared(images, **jobs[0].thresholds)
            seconds = time.perf_counter() - began
            self.metrics.batch(model, len(jobs), seconds)
            self._seconds[model].extend([seconds / len(jobs)] * len(jobs))
            for job, prepared, one in zip(jobs, images, objects, strict=True):
                found = detector.image_detections(one, Source(None, job.upload.name), prepared.size)
                job.answer.set_result(Searched(found, began - job.ready, seconds / len(jobs)))
        except Exception as error:  # such as no memory on a GPU: these fail, the next may not
            for job in jobs:
                if not job.answer.done():
                    job.answer.set_exception(error)
        finally:
            with self._changed:
                self._at_network -= len(jobs)


def _fail(job: _Job, error: Exception) -> None:
    if job.answer.set_running_or_notify_cancel():
        job.answer.set_exception(error)


def _warm_up(detector: Detector) -> None:
    """A blank image twice: kernels are chosen, compiled, and their weights arranged."""
    pixels = torch.zeros((3, detector.image_size, detector.image_size), dtype=torch.uint8)
    for _ in range(2):
        detector.detect_prepared([Prepared(pixels, (detector.image_size, detector.image_size))])
