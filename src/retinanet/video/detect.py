"""Detection in videos and cameras: reading, detecting and writing run side by side.

One thread decodes, one to four run the network, a pool resizes and draws, and the calling thread
encodes and writes. Memory grows with the video only by the index of the mp4 file, about 200 bytes
per frame with its sound.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import Any, TextIO, TypeVar, Unpack

import numpy as np

from retinanet.data.drawing import PALETTE, Colour, draw_boxes
from retinanet.errors import ConfigError, DataError
from retinanet.inference.backends import (
    DETECTION_SCORE,
    Thresholds,
    map_network,
    merge_thresholds,
    use_cores,
)
from retinanet.inference.detections import Failure, ImageDetections
from retinanet.inference.detector import Detector
from retinanet.inference.manifest import OutputFolder
from retinanet.inference.sources import Prepared, Source
from retinanet.inference.tiles import choose_tiling
from retinanet.interrupts import StopRequest, stop_on_signal
from retinanet.structures import Detections
from retinanet.video.reading import Frame, Pixels, Sound, VideoReader
from retinanet.video.tracking import Tracker
from retinanet.video.writing import VideoWriter

_T = TypeVar("_T")

_POLL = 0.1  # seconds
_UNTRACKED: Colour = (160, 160, 160)
_SOUND_AHEAD = 8  # packets between two frames, which would keep them from running at once
_MAX_WAITING = 32  # frames that wait for a batch, however few of them detection runs on

Progress = Callable[[int, int | None], None]
"""Called with the frames written and the total (None: unknown)."""


class VideoOptions(Thresholds, total=False):
    """Options of :func:`detect_video`: thresholds, and ``tile`` and ``overlap``."""

    tile: int | str | None
    overlap: float | None


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
        missing: frames at the end that the container states and does not contain.
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
    draw_threshold: float | None = None,
    stop: Event | None = None,
    progress: Progress | None = None,
    **options: Unpack[VideoOptions],
) -> VideoSummary:
    """Detect in a video or camera; write an annotated mp4 and a JSON line per frame.

    ``out/NAME.mp4`` has the frames at their own times, upright, and the sound; ``out/NAME.jsonl``
    for each frame :meth:`ImageDetections.to_dict`, and ``frame`` (0, 1, ...), ``time`` (seconds),
    ``searched``; with `track` each detection has ``track`` (a number, or null). Both are written as
    ``NAME.mp4.part`` and ``NAME.jsonl.part``, readable at any time up to the last key frame and the
    last line, and renamed at the end.

    Args:
        detector: runs on the frames.
        source: a file, an ``rtsp://`` address, or a camera's number.
        out: folder of the files; created if missing.
        name: of the files; None: the source's without its suffix, ``camera-0`` for a camera.
        every: run on every N-th frame; the frames between keep its boxes.
        track: track objects across frames (:class:`Tracker`); colours are by track.
        batch_size: frames per batch of the network.
        draw_threshold: minimum score of a drawn box, and with `track` of one that begins a track.
            None: all boxes are drawn; with `track` .3.
        stop: set it to end the video early, with both files complete up to there. None: SIGINT and
            SIGTERM do so, and are raised again afterwards.
        progress: called in this thread.
        options: ``tile`` and ``overlap`` as in :meth:`Detector.stream`; thresholds that override
            :attr:`Detector.thresholds`, with `track` :attr:`Detector.eval_thresholds`, as tracks
            continue in boxes of low scores.

    Raises:
        DataError: the source cannot be opened, contains no frame, or would be overwritten.
        ConfigError: `every` or `batch_size` is under 1, or an unknown or bad threshold.
        MissingExtraError: PyAV or trackers is not installed.
    """
    for setting, value in (("every", every), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{setting} {value} is under 1")
    stored = detector.eval_thresholds if track else detector.thresholds
    thresholds: Any = {**options}
    tiling = thresholds.pop("tile", None), thresholds.pop("overlap", None)
    merged = merge_thresholds(stored, thresholds)
    side, overlap = choose_tiling(*tiling, detector.image_size, detector.info)
    tiles: dict[str, Any] | None = None
    if side is not None:
        # The limit is that of tiles, not of the frame, unless it was given.
        limit = thresholds.get("detections_per_image")
        tiles = {"tile": side, "overlap": overlap, **merged, "detections_per_image": limit}
    if draw_threshold is None:
        draw_threshold = DETECTION_SCORE if track else 0.0
    with stop_on_signal() if stop is None else nullcontext(StopRequest()) as signals:
        reader = VideoReader(source)
        try:
            video, lines = _output_files(reader, source, Path(out), name)
            tracker = None
            if track:
                rate, agnostic = float(reader.rate or 25), merged["class_agnostic_nms"]
                tracker = Tracker(rate, threshold=draw_threshold, across_classes=agnostic)
            pipeline = _Pipeline(
                detector, reader, tracker, every, batch_size, draw_threshold, merged, tiles
            )
            summary = _write_files(pipeline, video, lines, stop or signals, progress)
        except DataError:
            if signals.received is None:
                raise  # otherwise: stopped before the first frame
        finally:
            reader.close()
    if signals.received is not None:
        signal.raise_signal(signals.received)
    return summary


def _write_files(
    pipeline: _Pipeline, video: Path, lines: Path, stop: Event, progress: Progress | None
) -> VideoSummary:
    """Run the pipeline into the two files, under other names until it has ended."""
    reader, began = pipeline.reader, perf_counter()
    parts = [file.with_name(f"{file.name}.part") for file in (video, lines)]
    writer = VideoWriter(parts[0], reader)
    try:
        with parts[1].open("w", encoding="utf-8", newline="\n") as text:
            pipeline.run(writer, text, stop, progress)
    finally:
        writer.close()
        if not pipeline.written:
            for part in parts:
                part.unlink(missing_ok=True)
    for part, file in zip(parts, (video, lines), strict=True):
        part.replace(file)
    return VideoSummary(
        source=reader.source,
        video=video,
        lines=lines,
        frames=pipeline.written,
        searched=pipeline.searched,
        broken=reader.broken,
        missing=reader.missing,
        objects=dict(pipeline.objects.most_common()),
        tracks=None if pipeline.tracker is None else pipeline.tracker.count,
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

    `ready` is its RGB and what the network takes (None: tiles), None where detection does not run;
    `found` and `tracks` are its objects, or those of the last frame that detection ran on;
    `encodable` is the annotated frame.
    """

    frame: Frame
    ready: Future[tuple[Pixels, Prepared | None]] | None
    found: ImageDetections | None = None
    tracks: Sequence[int | None] = ()
    encodable: Future[Any] | None = None


@dataclass(slots=True)
class _Pipeline:
    """Detection in a video; `tiles` are options of :meth:`Detector.stream`, None: no tiles."""

    detector: Detector
    reader: VideoReader
    tracker: Tracker | None
    every: int
    batch_size: int
    draw_threshold: float
    thresholds: Thresholds
    tiles: dict[str, Any] | None = None
    written: int = 0
    searched: int = 0
    objects: Counter[str] = field(default_factory=Counter)

    def run(
        self, writer: VideoWriter, lines: TextIO, stop: Event, progress: Progress | None
    ) -> None:
        """Read, detect and write until the video has ended or `stop` is set."""
        workers = min(4, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(workers, "video-pool", initializer=use_cores, initargs=(1,))
        reading = ThreadPoolExecutor(1, thread_name_prefix="video-read")
        detecting = ThreadPoolExecutor(1, thread_name_prefix="video-detect")
        try:
            read = _run_ahead(self._read(pool, stop), self.batch_size + workers, reading)
            detected = _run_ahead(self._detect(read, pool, writer), workers + 1, detecting)
            for item in detected:
                self._write(item, writer, lines)
                if progress is not None and isinstance(item, _Item):
                    total = self.reader.frames
                    progress(self.written, None if total is None else max(total, self.written))
            if not self.written:
                raise DataError(f"{self.reader.source}: no frame was read")
            writer.finish()
        finally:
            # Threads that wait for a cancelled future end; the others finish their item.
            for should_wait in (False, True):
                for executor in (reading, pool, detecting):
                    executor.shutdown(should_wait, cancel_futures=True)

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
        last: tuple[ImageDetections, Sequence[int | None]] | None = None
        batches = map_network(
            self.detector.network, self._run_network, self._batches(items), ahead=_SOUND_AHEAD
        )
        for batch, found in batches:
            if isinstance(batch, Sound):
                yield batch  # the file interleaves it by its time
                continue
            for item, result in zip(batch, self._track(batch, found), strict=True):
                last = result or last
                assert last is not None  # detection runs on the first frame
                item.found, item.tracks = last
                item.encodable = pool.submit(self._annotate, item, writer)
                yield item

    def _batches(self, items: Iterator[_Item | Sound]) -> Iterator[list[_Item] | Sound]:
        waiting: list[_Item] = []
        for item in items:
            if isinstance(item, Sound):
                yield item
                continue
            waiting.append(item)
            is_full = sum(frame.ready is not None for frame in waiting) == self.batch_size
            if is_full or len(waiting) >= max(_MAX_WAITING, self.batch_size):
                yield waiting
                waiting = []
        yield waiting

    def _run_network(
        self, batch: list[_Item] | Sound
    ) -> tuple[list[_Item] | Sound, Sequence[Detections]]:
        if isinstance(batch, Sound):
            return batch, []
        ready = [item.ready.result() for item in batch if item.ready is not None]
        return batch, self._detect_frames(ready)

    def _track(
        self, items: Sequence[_Item], detections: Sequence[Detections]
    ) -> Iterator[tuple[ImageDetections, Sequence[int | None]] | None]:
        """Yield objects and tracks of each frame; None for one that detection does not run on."""
        found = iter(detections)
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

    def _detect_frames(
        self, frames: Sequence[tuple[Pixels, Prepared | None]]
    ) -> Sequence[Detections]:
        if self.tiles is None:
            prepared = [own for _, own in frames if own is not None]
            return self.detector.detect_prepared(prepared, **self.thresholds)
        results: list[Detections] = []
        sources = [Source(pixels, self.reader.source) for pixels, _ in frames]
        options = {"batch_size": self.batch_size, "workers": 1, **self.tiles}
        for found in self.detector.stream(sources, **options):
            if isinstance(found, Failure):
                raise found.error
            results.append(found)
        return results

    def _write(self, item: _Item | Sound, writer: VideoWriter, lines: TextIO) -> None:
        if isinstance(item, Sound):
            writer.write_sound(item)
            return
        assert item.encodable is not None
        writer.write(item.encodable.result(), item.frame.pts)
        lines.write(json.dumps(self._line(item), ensure_ascii=False, allow_nan=False) + "\n")
        lines.flush()
        self.written += 1

    def _prepare(self, image: Any) -> tuple[Pixels, Prepared | None]:
        pixels = self.reader.rgb(image)
        if self.tiles is not None:
            return pixels, None
        return pixels, self.detector.prepare(Source(pixels, self.reader.source))

    def _annotate(self, item: _Item, writer: VideoWriter) -> Any:
        assert item.found is not None
        found, image = item.found, item.frame.image
        kept = [i for i, score in enumerate(found.scores.tolist()) if score >= self.draw_threshold]
        if not kept:
            return writer.encodable(image, None)
        pixels = self.reader.rgb(image) if item.ready is None else item.ready.result()[0]
        labels: Any = found.labels[kept]
        names, colours = list(found.classes), list(PALETTE)
        if self.tracker is not None:  # each box has its own name and colour
            names, colours = [], []
            for i in kept:
                name, track = found.classes[int(found.labels[i])], item.tracks[i]
                names.append(name if track is None else f"{name} {track}")
                colours.append(_UNTRACKED if track is None else PALETTE[track % len(PALETTE)])
            labels = np.arange(len(kept))
        boxes, scores = found.boxes[kept], found.scores[kept]
        drawn = draw_boxes(pixels, boxes, labels, scores, names, colours=colours, enlarge_to=0)
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


def _run_ahead(items: Iterator[_T], size: int, thread: ThreadPoolExecutor) -> Iterator[_T]:
    """Run an iterator in an executor of a single thread, at most `size` items ahead."""
    end: Any = object()
    pending = deque(thread.submit(next, items, end) for _ in range(size))
    while True:
        # Waiting in steps: a signal does not interrupt a wait on every platform.
        while not wait([pending[0]], timeout=_POLL).done:
            pass
        item = pending.popleft().result()
        if item is end:
            return
        pending.append(thread.submit(next, items, end))
        yield item


def _output_files(
    reader: VideoReader, source: str | Path, out: Path, name: str | None
) -> tuple[Path, Path]:
    """Return the two files to write, in a folder that exists and lists them as outputs."""
    own = re.sub(r"[^\w.-]+", "-", reader.source) if reader.is_live else Path(source).stem
    stem = name or own
    video, lines = out / f"{stem}.mp4", out / f"{stem}.jsonl"
    if not reader.is_live and video.resolve() == Path(source).resolve():
        raise DataError(f"{source}: would be overwritten; give another --out than its own folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = OutputFolder(out, "video")
        for file in (video, lines):
            folder.claim(file)
    except OSError as error:
        raise DataError(f"{out}: cannot be created: {error.strerror}") from None
    return video, lines
