"""Detection in videos and cameras: reading, detecting and writing run side by side.

Three threads pass frames on through bounded queues: one decodes, one runs the network, one encodes
and writes; a pool beside them resizes and draws. Memory grows with the video only by the index of
the mp4 file, about 200 bytes per frame with its sound.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from time import perf_counter
from typing import Any, Generic, TextIO, TypeVar, Unpack

import numpy as np

from retinanet.data.drawing import PALETTE, Colour, draw_boxes
from retinanet.errors import ConfigError, DataError
from retinanet.inference.backends import Thresholds, merge_thresholds
from retinanet.inference.detections import DRAWN_SCORE, ImageDetections
from retinanet.inference.detector import Detector, Prepared
from retinanet.inference.manifest import OutputFolder
from retinanet.inference.sources import Source
from retinanet.interrupts import StopRequest, stop_on_signal
from retinanet.video.reading import Frame, Pixels, Sound, VideoReader
from retinanet.video.tracking import Tracker
from retinanet.video.writing import VideoWriter

_T = TypeVar("_T")

_POLL = 0.1  # seconds between a waiting thread's checks for cancellation
_UNTRACKED: Colour = (160, 160, 160)

Progress = Callable[[int, int | None], None]
"""Called with the frames written and the total (None: unknown)."""


@dataclass(frozen=True, slots=True)
class VideoSummary:
    """Result of a video.

    Attributes:
        source: as given; ``camera 0`` for a camera.
        video: the annotated mp4.
        lines: the JSON lines.
        frames: frames written.
        searched: those of them that detection ran on.
        broken: frames that could not be decoded; they are in neither file.
        missing: frames that the container states or its times imply, and that it does not contain.
        objects: boxes in the frames that detection ran on, by class.
        tracks: number of tracks; None: no tracking.
        codec: encoder of the image.
        sound: what became of the sound, such as ``copied``; empty: there is none.
        lost_sound: damaged packets of sound, left out.
        cut: why reading ended before the video did; empty: it did not.
        stopped: whether `stop` or a signal ended it.
        seconds: from the first frame read to the last one written.
    """

    source: str
    video: Path
    lines: Path
    frames: int
    searched: int
    broken: int
    missing: int
    objects: dict[str, int]
    tracks: int | None
    codec: str
    sound: str
    lost_sound: int
    cut: str
    stopped: bool
    seconds: float

    @property
    def frames_a_second(self) -> float:
        """Frames written per second."""
        return self.frames / max(self.seconds, 1e-9)

    @property
    def complete(self) -> bool:
        """Whether every frame of the video was read."""
        return not (self.broken or self.missing or self.cut)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = asdict(self)
        return {
            "file": values.pop("source"),
            "video": str(values.pop("video")),
            "lines": str(values.pop("lines")),
            **values,
            "seconds": round(self.seconds, 3),
            "frames_a_second": round(self.frames_a_second, 3),
        }


def detect_video(
    detector: Detector,
    source: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    every: int = 1,
    track: bool = False,
    batch_size: int = 1,
    draw_threshold: float = DRAWN_SCORE,
    workers: int | None = None,
    stop: Event | None = None,
    progress: Progress | None = None,
    **thresholds: Unpack[Thresholds],
) -> VideoSummary:
    """Detect in a video or camera; write an annotated mp4 and a JSON line per frame.

    ``out/NAME.mp4`` has the frames at their own times, upright, and the sound; ``out/NAME.jsonl``
    for each frame :meth:`ImageDetections.to_dict`, and ``frame`` (0, 1, ...), ``time`` (seconds),
    ``searched``; with `track` each detection has ``track`` (a number, or null). Both are written as
    ``NAME.mp4.part`` and ``NAME.jsonl.part``, readable at any time up to the last key frame and the
    last line, and renamed at the end.

    Args:
        detector: runs on the frames.
        source: a file, or a camera's number.
        out: folder of the files; created if missing.
        name: of the files; None: the source's without its suffix, ``camera-0`` for a camera.
        every: run on every N-th frame; the frames between keep its boxes.
        track: track objects across frames (:class:`Tracker`); colours are by track.
        batch_size: frames per batch of the network.
        draw_threshold: minimum score of a drawn box, and with `track` of one that begins a track.
        workers: threads that resize and draw; None is one per processor, four at most.
        stop: set it to end the video early, with both files complete up to there. None: SIGINT and
            SIGTERM do so, and are raised again afterwards.
        progress: called in this thread.
        thresholds: override :attr:`Detector.thresholds`.

    Raises:
        DataError: the source cannot be opened, contains no frame, or would be overwritten.
        ConfigError: `every` or `batch_size` is under 1, or an unknown or bad threshold.
        MissingExtraError: PyAV or trackers is not installed.
    """
    for setting, value in (("every", every), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{setting} {value} is under 1")
    merged = merge_thresholds(detector.thresholds, thresholds)
    with stop_on_signal() if stop is None else nullcontext(StopRequest()) as signals:
        reader = VideoReader(source)
        try:
            video, lines = _output_files(reader, source, Path(out), name)
            tracker = (
                Tracker(
                    float(reader.rate or 25),
                    threshold=draw_threshold,
                    across_classes=merged["class_agnostic_nms"],
                )
                if track
                else None
            )
            work = _Pipeline(detector, reader, tracker, every, batch_size, draw_threshold, merged)
            workers = workers or min(4, os.cpu_count() or 1)
            summary = _write_files(work, video, lines, workers, stop or signals, progress)
        except DataError:
            if signals.received is None:
                raise  # otherwise: stopped before the first frame
        finally:
            reader.close()
    if signals.received is not None:
        signal.raise_signal(signals.received)
    return summary


def _write_files(
    work: _Pipeline,
    video: Path,
    lines: Path,
    workers: int,
    stop: Event,
    progress: Progress | None,
) -> VideoSummary:
    """Run the pipeline into the two files, under other names until it has ended."""
    reader, began = work.reader, perf_counter()
    parts = [file.with_name(f"{file.name}.part") for file in (video, lines)]
    writer = VideoWriter(parts[0], reader)
    try:
        with parts[1].open("w", encoding="utf-8", newline="\n") as text:
            work.run(writer, text, workers, stop, progress)
    finally:
        writer.close()
        if not work.written:
            for part in parts:
                part.unlink(missing_ok=True)
    for part, file in zip(parts, (video, lines), strict=True):
        part.replace(file)
    return VideoSummary(
        source=reader.source,
        video=video,
        lines=lines,
        frames=work.written,
        searched=work.searched,
        broken=reader.broken,
        missing=reader.missing,
        objects=dict(work.objects.most_common()),
        tracks=None if work.tracker is None else work.tracker.count,
        codec=writer.codec,
        sound=writer.sound,
        lost_sound=writer.lost_sound,
        cut=reader.cut,
        stopped=stop.is_set(),
        seconds=perf_counter() - began,
    )


@dataclass(slots=True)
class _Item:
    """A frame in the pipeline.

    Attributes:
        frame: as it was read.
        ready: its RGB and what the network takes; None: detection does not run on it.
        found: its objects, or those of the last frame that detection ran on.
        tracks: their track numbers.
        encodable: the annotated frame.
    """

    frame: Frame
    ready: Future[tuple[Pixels, Prepared]] | None
    found: ImageDetections | None = None
    tracks: Sequence[int | None] = ()
    encodable: Future[Any] | None = None


@dataclass(slots=True)
class _Pipeline:
    """Detection in one video."""

    detector: Detector
    reader: VideoReader
    tracker: Tracker | None
    every: int
    batch_size: int
    draw_threshold: float
    thresholds: Thresholds
    written: int = 0
    searched: int = 0
    objects: Counter[str] = field(default_factory=Counter)

    def run(
        self,
        writer: VideoWriter,
        lines: TextIO,
        workers: int,
        stop: Event,
        progress: Progress | None,
    ) -> None:
        """Read, detect and write until the video has ended or `stop` is set."""
        cancelled = Event()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="video-pool")
        read = _Stage(self._read(pool, stop), self.batch_size + workers, cancelled, "video-read")
        detected = _Stage(self._detect(read, pool, writer), workers + 1, cancelled, "video-detect")
        done = _Stage(self._write(detected, writer, lines), 1, cancelled, "video-write")
        stages = (read, detected, done)
        try:
            for stage in stages:
                stage.start()
            for total in done:
                if progress is not None:
                    progress(self.written, total)
        finally:
            cancelled.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for stage in stages:
                stage.join()
            pool.shutdown()

    def _read(self, pool: ThreadPoolExecutor, stop: Event) -> Iterator[_Item | Sound]:
        for item in self.reader.read(stop):
            if isinstance(item, Sound):
                yield item
            elif item.number % self.every:
                yield _Item(item, None)
            else:
                yield _Item(item, pool.submit(self._prepare, item.image))

    def _detect(
        self, items: Iterator[_Item | Sound], pool: ThreadPoolExecutor, writer: VideoWriter
    ) -> Iterator[_Item | Sound]:
        waiting: list[_Item] = []
        last: tuple[ImageDetections, Sequence[int | None]] | None = None

        def flush() -> Iterator[_Item]:
            nonlocal last
            for item, result in zip(waiting, self._detect_batch(waiting), strict=True):
                last = result or last
                assert last is not None  # detection runs on the first frame
                item.found, item.tracks = last
                item.encodable = pool.submit(self._annotate, item, writer)
                yield item
            waiting.clear()

        for item in items:
            if isinstance(item, Sound):
                yield item  # need not wait for the network: the file interleaves it by its time
                continue
            waiting.append(item)
            # Frames in memory are bounded, however few of them detection runs on.
            if sum(frame.ready is not None for frame in waiting) == self.batch_size or len(
                waiting
            ) >= max(32, self.batch_size):
                yield from flush()
        yield from flush()

    def _detect_batch(
        self, items: Sequence[_Item]
    ) -> Iterator[tuple[ImageDetections, Sequence[int | None]] | None]:
        """Yield objects and tracks of each frame; None for one that detection does not run on."""
        ready = [item.ready.result()[1] for item in items if item.ready is not None]
        found = iter(self.detector.detect_prepared(ready, **self.thresholds))
        source = Source(self.reader.source, Path(self.reader.source).name)
        for item in items:
            if item.ready is None:
                yield None
                continue
            objects = next(found)
            tracks = self.tracker.update(objects, item.frame.time) if self.tracker else ()
            self.searched += 1
            self.objects.update(self.detector.classes[i] for i in objects.labels.tolist())
            yield self.detector.image_detections(objects, source, self.reader.size), tracks

    def _write(
        self, items: Iterator[_Item | Sound], writer: VideoWriter, lines: TextIO
    ) -> Iterator[int | None]:
        """Write each item; yields the expected number of frames after each frame."""
        for item in items:
            if isinstance(item, Sound):
                writer.write_sound(item)
                continue
            assert item.encodable is not None
            writer.write(item.encodable.result(), item.frame.pts)
            lines.write(json.dumps(self._line(item), ensure_ascii=False, allow_nan=False) + "\n")
            lines.flush()
            self.written += 1
            total = self.reader.frames
            yield None if total is None else max(total, self.written)
        if not self.written:
            raise DataError(f"{self.reader.source}: no frame was read")
        writer.finish()

    def _prepare(self, image: Any) -> tuple[Pixels, Prepared]:
        pixels = self.reader.rgb(image)
        return pixels, self.detector.prepare(Source(pixels, self.reader.source))

    def _annotate(self, item: _Item, writer: VideoWriter) -> Any:
        assert item.found is not None
        found = item.found
        tracks = item.tracks or [None] * len(found)
        kept = [i for i, score in enumerate(found.scores.tolist()) if score >= self.draw_threshold]
        image = item.frame.image
        if not kept:
            return writer.encodable(image, None)
        pixels = self.reader.rgb(image) if item.ready is None else item.ready.result()[0]
        boxes, scores = found.boxes[kept], found.scores[kept]
        labels = found.labels[kept]
        if self.tracker is None:
            drawn = draw_boxes(pixels, boxes, labels, scores, found.classes, enlarge_to=0)
        else:
            names = [
                found.classes[label] + ("" if tracks[i] is None else f" {tracks[i]}")
                for i, label in zip(kept, labels.tolist(), strict=True)
            ]
            drawn = draw_boxes(
                pixels,
                boxes,
                np.arange(len(kept)),
                scores,
                names,
                colours=[_track_colour(tracks[i]) for i in kept],
                enlarge_to=0,
            )
        return writer.encodable(image, np.asarray(drawn))

    def _line(self, item: _Item) -> dict[str, Any]:
        assert item.found is not None
        line = {
            "frame": item.frame.number,
            "time": round(item.frame.time, 6),
            "searched": item.ready is not None,
            **item.found.to_dict(),
        }
        if self.tracker is not None:
            for detection, number in zip(line["detections"], item.tracks, strict=True):
                detection["track"] = number
        return line


class _Stage(Generic[_T]):
    """Runs an iterator in a thread of its own, at most `size` items ahead.

    An error in the thread is raised to the consumer. Once `cancelled` is set the thread ends with
    its next item, and the consumer gets :class:`_Cancelled`.
    """

    def __init__(self, items: Iterator[_T], size: int, cancelled: Event, name: str) -> None:
        self._queue: Queue[tuple[str, Any]] = Queue(size)
        self._cancelled = cancelled
        self._ended = False
        self._thread = Thread(target=self._run, args=(items,), name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def __iter__(self) -> Iterator[_T]:
        return self

    def __next__(self) -> _T:
        if self._ended:
            raise StopIteration
        while True:
            if self._cancelled.is_set():
                raise _Cancelled
            try:
                kind, item = self._queue.get(timeout=_POLL)
            except Empty:
                continue
            if kind == "item":
                return item  # type: ignore[no-any-return]
            self._ended = True
            if kind == "error":
                raise item
            raise StopIteration

    def join(self) -> None:
        """Wait until the thread has ended, if it was started."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self, items: Iterator[_T]) -> None:
        try:
            for item in items:
                if not self._put("item", item):
                    return
        except _Cancelled:
            return
        except BaseException as error:
            self._put("error", error)
        else:
            self._put("end", None)

    def _put(self, kind: str, item: Any) -> bool:
        while not self._cancelled.is_set():
            try:
                self._queue.put((kind, item), timeout=_POLL)
            except Full:
                continue
            return True
        return False


class _Cancelled(Exception):
    """The pipeline was cancelled by an error in another stage."""


def _track_colour(number: int | None) -> Colour:
    return _UNTRACKED if number is None else PALETTE[number % len(PALETTE)]


def _output_files(
    reader: VideoReader, source: str | Path, out: Path, name: str | None
) -> tuple[Path, Path]:
    """Return the two files to write, in a folder that exists and lists them as outputs."""
    stem = name or (reader.source.replace(" ", "-") if reader.live else Path(source).stem)
    video, lines = out / f"{stem}.mp4", out / f"{stem}.jsonl"
    if not reader.live and video.resolve() == Path(source).resolve():
        raise DataError(f"{source}: would be overwritten; give another --out than its own folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = OutputFolder(out, "video")
        for file in (video, lines):
            folder.claim(file)
    except OSError as error:
        raise DataError(f"{out}: cannot be created: {error.strerror}") from None
    return video, lines
