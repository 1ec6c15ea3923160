"""Dynamic batching: decode the images of many requests in threads and run them in batches."""

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
from starlette.exceptions import HTTPException

from retinanet.errors import ConfigError
from retinanet.inference import Detector, ImageDetections, Source
from retinanet.inference.backends import network_workers, use_cores
from retinanet.inference.exported import ExportedNetwork
from retinanet.inference.sources import Prepared
from retinanet.model.retinanet import RetinaNet
from retinanet.serve.metrics import Metrics
from retinanet.serve.settings import Settings
from retinanet.serve.upload import Upload, check_image, decode_error

_NUM_RECENT = 200  # images over which the median speed of a model is computed
_GPU_BATCH_SIZE = 8


@dataclass(slots=True, eq=False)
class _Job:
    model: str
    upload: Upload
    thresholds: dict[str, Any]
    future: Future[ImageDetections] = field(default_factory=Future)  # cancelled: nobody waits
    prepared: Prepared | None = None
    batch_key: tuple[Any, ...] = ()


class Batcher:
    """Queue of images in front of the detectors; call :meth:`start` first.

    A batch contains images of one model, one padded network input size and the same thresholds, so
    no image is padded for another, and the other images of a batch change results by rounding
    only. The oldest image goes first; the next batch gathers while the network runs.

    Several threads run the networks, each with its share of the cores: the threads of one
    convolution wait for each other, and long where another thread has their core. A lone batch
    goes to the first of them, which then uses all cores. Decoding uses one core per image.

    Args:
        detectors: detectors by model name.
        settings: numbers of threads, batch size and queue length.

    Attributes:
        num_workers: number of threads that run the networks.
        num_pending: number of images that were submitted and have no result yet.
        num_running: number of images in the networks.
    """

    def __init__(self, detectors: Mapping[str, Detector], settings: Settings) -> None:
        self.detectors = dict(detectors)
        self.settings = settings
        self.metrics = Metrics(lambda: max(0, self.num_pending - self.num_running))
        self.num_pending = 0
        self.num_running = 0
        self._changed = threading.Condition()
        self._decoded: deque[_Job] = deque()
        self._stopping = False
        self._seconds = {name: deque[float](maxlen=_NUM_RECENT) for name in detectors}
        self._workers: list[threading.Thread] = []
        self._cores = torch.get_num_threads()
        self.num_workers = settings.workers or min(
            network_workers(detector.network) for detector in self.detectors.values()
        )
        threads = min(4, os.cpu_count() or 1)
        self._decoders = ThreadPoolExecutor(threads, "decode", initializer=use_cores, initargs=(1,))

    @property
    def ready(self) -> bool:
        """Whether images are accepted: all threads that run a network are alive."""
        alive = bool(self._workers) and all(worker.is_alive() for worker in self._workers)
        return alive and not self._stopping

    def seconds_per_image(self, model: str) -> float | None:
        """Return the median network time over recent images; None before the first image."""
        recent = list(self._seconds[model])
        return statistics.median(recent) if recent else None

    def start(self) -> None:
        """Warm up the networks and start their threads; does nothing if they run already."""
        if self._workers:
            return
        # Warm up in the threads that will run the networks: some backends keep state per thread.
        warm_ups: list[Future[None]] = [Future() for _ in range(self.num_workers)]
        self._workers = [
            threading.Thread(target=self._work, args=(i, warm_up), name=f"network-{i}", daemon=True)
            for i, warm_up in enumerate(warm_ups)
        ]
        for worker in self._workers:
            worker.start()
        for warm_up in warm_ups:
            warm_up.result()

    def stop(self) -> None:
        """Finish running batches and drop waiting images."""
        with self._changed:
            self._stopping = True
            for job in self._decoded:
                job.future.cancel()
            self._decoded.clear()
            self._changed.notify_all()
        self._decoders.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.join()

    def check_capacity(self, images: int = 1) -> None:
        """Raise a 503 error if the queue cannot take `images` more images."""
        if not self.ready:
            detail = "the server is starting or stopping: try again"
            raise HTTPException(503, detail, {"Retry-After": "2"})
        if self.num_pending + images > self.settings.queue:
            known = [s for name in self.detectors if (s := self.seconds_per_image(name))]
            seconds = max(known, default=1.0) * self.num_pending / self.num_workers
            raise HTTPException(
                503,
                f"queue is full: {self.num_pending} of {self.settings.queue} images; try again",
                {"Retry-After": str(max(1, math.ceil(seconds)))},
            )

    def submit(
        self, model: str, uploads: Sequence[Upload], thresholds: Mapping[str, Any]
    ) -> list[Future[ImageDetections]]:
        """Submit images, all or none.

        Args:
            model: model name.
            uploads: encoded images.
            thresholds: valid thresholds that override the model's.

        Returns:
            One future per image; its exception is a HTTPException if the image is rejected, or
            the network's. Cancel futures that nobody waits for.
        """
        detector = self.detectors[model]
        if isinstance(detector.network, ExportedNetwork):
            try:
                detector.network.check({**detector.thresholds, **thresholds})  # type: ignore[typeddict-item]
            except ConfigError as error:
                raise HTTPException(400, str(error)) from None
        with self._changed:
            self.check_capacity(len(uploads))
            self.num_pending += len(uploads)
        jobs = [_Job(model, upload, dict(thresholds)) for upload in uploads]
        for job in jobs:
            job.future.add_done_callback(partial(self._finish, job))
            self._decoders.submit(self._decode, job)
        return [job.future for job in jobs]

    def _finish(self, job: _Job, future: Future[ImageDetections]) -> None:
        # A cancelled job may stay in a queue for long: release its memory now.
        job.upload = Upload(job.upload.name, b"")
        with self._changed:
            self.num_pending -= 1
            if future.cancelled():
                job.prepared = None

    def _decode(self, job: _Job) -> None:
        upload = job.upload
        if job.future.cancelled():
            return
        try:
            check_image(upload.data, self.settings)
            prepared = self.detectors[job.model].prepare(Source(upload.data, upload.name))
        except Exception as error:  # of any decoder
            self.metrics.failed_images.labels(job.model).inc()
            if not isinstance(error, HTTPException):
                error = HTTPException(422, decode_error(error, upload.name))
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)
            return
        divisor = RetinaNet.size_divisor
        padded = tuple(math.ceil(side / divisor) for side in prepared.pixels.shape[-2:])
        job.batch_key = (job.model, padded, tuple(sorted(job.thresholds.items())))
        with self._changed:
            if self._stopping:
                job.future.cancel()
            if not job.future.cancelled():
                job.prepared = prepared
                self._decoded.append(job)
                self._changed.notify_all()

    def _work(self, number: int, warm_up: Future[None]) -> None:
        """Run a network thread."""
        share = max(1, self._cores // self.num_workers)
        try:
            for cores in {share} if number else sorted({share, self._cores}):
                use_cores(cores)
                for detector in self.detectors.values():
                    _warm_up(detector)
            warm_up.set_result(None)
        except Exception as error:
            warm_up.set_exception(error)
            return
        while jobs := self._next_batch(number):
            is_lone = not number and self.num_pending == len(jobs)
            cores = self._cores if is_lone else share
            if torch.get_num_threads() != cores:
                use_cores(cores)
            self._run(jobs)
            del jobs  # free the images while waiting for the next ones

    def _next_batch(self, number: int) -> list[_Job]:
        """Wait for the oldest image and those that share its batch; empty when stopping."""
        with self._changed:
            while True:
                # A lone batch is for the first thread.
                self._changed.wait_for(
                    lambda: self._stopping or (self._decoded and (not number or self.num_running))
                )
                if self._stopping:
                    return []
                first = self._decoded[0]
                on_cpu = self.detectors[first.model].device.type == "cpu"
                max_size = self.settings.batch_size or (1 if on_cpu else _GPU_BATCH_SIZE)
                batch = [job for job in self._decoded if job.batch_key == first.batch_key]
                batch = batch[:max_size]
                for job in batch:
                    self._decoded.remove(job)
                jobs = [job for job in batch if job.future.set_running_or_notify_cancel()]
                if jobs:
                    self.num_running += len(jobs)
                    self._changed.notify_all()
                    return jobs

    def _run(self, jobs: list[_Job]) -> None:
        model = jobs[0].model
        detector = self.detectors[model]
        images = [job.prepared for job in jobs if job.prepared is not None]
        start = time.perf_counter()
        try:
            outputs = detector.detect_prepared(images, **jobs[0].thresholds)
            seconds = time.perf_counter() - start
            self.metrics.images.labels(model).inc(len(jobs))
            self._seconds[model].extend([seconds / len(jobs)] * len(jobs))
            for job, image, output in zip(jobs, images, outputs, strict=True):
                source = Source(None, job.upload.name)
                job.future.set_result(detector.image_detections(output, source, image.size))
        except Exception as error:  # such as a GPU out of memory: the next batch may succeed
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(error)
        finally:
            with self._changed:
                self.num_running -= len(jobs)


def _warm_up(detector: Detector) -> None:
    """Run a blank image twice, so that kernels are chosen and compiled and weights are packed."""
    size = detector.image_size
    image = Prepared(torch.zeros((3, size, size), dtype=torch.uint8), (size, size))
    for _ in range(2):
        detector.detect_prepared([image])
