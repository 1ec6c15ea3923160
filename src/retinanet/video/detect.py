"""Videos and cameras searched frame by frame: reading, searching and writing side by side.

Three threads hand frames on through bounded queues: one reads and decodes, one runs the network,
one encodes and writes; a pool beside them resizes and draws. Nothing grows with the clip's length
but the index in an mp4 file, about 200 bytes a frame with its sound.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from time import perf_counter
from typing import Any, Generic, TextIO, TypeVar, Unpack

import numpy as np

from retinanet.config import build_recipe
from retinanet.data.drawing import PALETTE, Colour, draw_boxes
from retinanet.errors import ConfigError, DataError
from retinanet.inference.backends import Thresholds
from retinanet.inference.detections import DRAWN_SCORE, ImageDetections
from retinanet.inference.detector import Detector, Prepared
from retinanet.inference.sources import Source
from retinanet.video.reading import Pixels, Sound, Stamped, VideoReader
from retinanet.video.tracking import Tracker
from retinanet.video.writing import VideoWriter

_T = TypeVar("_T")

_POLL = 0.1  # seconds after which a waiting thread looks whether the work was given up
_UNTRACKED: Colour = (160, 160, 160)


@dataclass(frozen=True, slots=True)
class VideoSummary:
    """What came of a clip.

    Attributes:
        source: as given; ``camera 0`` for a camera.
        video: the annotated mp4.
        lines: the JSON lines.
        frames: written.
        searched: of those, searched.
        broken: frames that could not be read; they are in neither file.
        objects: boxes found in searched frames, by class.
        tracks: numbers given; None: nothing was tracked.
        codec: what encoded the image.
        sound: what became of the sound, such as ``copied``; empty: there was none.
        lost_sound: damaged packets of sound, left out.
        cut: why reading ended before the clip did; empty: it did not.
        stopped: whether `stop` ended it.
        seconds: from the first frame read to the last one written.
    """

    source: str
    video: Path
    lines: Path
    frames: int
    searched: int
    broken: int
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
        """Written in a second."""
        return self.frames / max(self.seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "file": self.source,
            "video": str(self.video),
            "lines": str(self.lines),
            "frames": self.frames,
            "searched": self.searched,
            "broken": self.broken,
            "objects": self.objects,
            "tracks": self.tracks,
            "codec": self.codec,
            "sound": self.sound,
            "lost_sound": self.lost_sound,
            "cut": self.cut,
            "stopped": self.stopped,
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
    progress: Callable[[int, int | None], None] | None = None,
    **thresholds: Unpack[Thresholds],
) -> VideoSummary:
    """Search a video or a camera; write an annotated mp4 and a JSON line a frame.

    ``out/NAME.mp4`` has the clip's frames at their own times, upright, and its sound;
    ``out/NAME.jsonl`` for each :meth:`ImageDetections.to_dict`, and ``frame`` (0, 1, ...),
    ``time`` (seconds), ``searched``; with `track` each detection has ``track`` (a number, or null).
    Both are written as ``NAME.mp4.part`` and ``NAME.jsonl.part``, readable up to the last key frame
    and the last line at any time, and renamed when the clip ends.

    Args:
        detector: what searches.
        source: a file, or a camera's number.
        out: folder of the files; made where it is missing.
        name: of the files; None: the source's without its suffix, ``camera-0`` for a camera.
        every: search each so-many-th frame; on those between, its boxes stay.
        track: give each object a number that it keeps (:class:`Tracker`); of its colour it is
            drawn.
        batch_size: frames that the network takes at once.
        draw_threshold: score from which a box is drawn, and with `track` begins a track.
        workers: threads that resize and draw; None is one a processor, four at the most.
        stop: set it from elsewhere to end the clip early; both files are then as for a clip that
            ended there. Ctrl-C does the same, and is raised again afterwards.
        progress: called with frames written and frames in all (None: not known), in this thread.
        thresholds: laid over :attr:`Detector.thresholds`.

    Raises:
        DataError: the source cannot be opened, holds no frame, or would be written over.
        ConfigError: `every` or `batch_size` is under 1, or an unknown or bad threshold.
        MissingExtraError: PyAV or trackers is not installed.
    """
    for setting, value in (("every", every), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{setting} {value} is under 1")
    laid: Any = {**detector.thresholds, **thresholds}
    build_recipe({"detect": laid}, "detector options")
    workers = workers or min(4, os.cpu_count() or 1)
    stop = stop or Event()
    reader = VideoReader(source)
    try:
        video, lines = _places(reader, source, Path(out), name)
        tracker = (
            Tracker(
                float(reader.rate or 25),
                threshold=draw_threshold,
                across_classes=laid["class_agnostic_nms"],
            )
            if track
            else None
        )
        work = _Work(
            detector, reader, tracker, every, batch_size, draw_threshold, Thresholds(**thresholds)
        )
        began = perf_counter()
        parts = [file.with_name(f"{file.name}.part") for file in (video, lines)]
        writer = VideoWriter(parts[0], reader)
        try:
            with parts[1].open("w", encoding="utf-8", newline="\n") as text:
                work.run(writer, text, workers, stop, progress)
        except DataError:
            if work.interrupted:  # before a frame was read
                raise KeyboardInterrupt from None
            raise
        finally:
            writer.close()
            if not work.written:
                for part in parts:
                    part.unlink(missing_ok=True)
    finally:
        reader.close()
    for part, file in zip(parts, (video, lines), strict=True):
        part.replace(file)
    if work.interrupted:
        raise KeyboardInterrupt
    return VideoSummary(
        source=reader.source,
        video=video,
        lines=lines,
        frames=work.written,
        searched=work.searched,
        broken=reader.broken,
        objects=dict(work.objects.most_common()),
        tracks=None if tracker is None else tracker.count,
        codec=writer.codec,
        sound=writer.sound,
        lost_sound=writer.lost_sound,
        cut=reader.cut,
        stopped=stop.is_set(),
        seconds=perf_counter() - began,
    )


@dataclass(slots=True)
class _Item:
    """A frame on its way.

    Attributes:
        stamped: as it was read.
        ready: its RGB and what the network takes; None: it is not searched.
        found: its objects, or those of the last frame that was searched.
        tracks: their numbers.
        encodable: the annotated frame.
    """

    stamped: Stamped
    ready: Future[tuple[Pixels, Prepared]] | None
    found: ImageDetections | None = None
    tracks: Sequence[int | None] = ()
    encodable: Future[Any] | None = None


@dataclass(slots=True)
class _Work:
    """One clip being searched."""

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
    interrupted: bool = False

    def run(
        self,
        writer: VideoWriter,
        lines: TextIO,
        workers: int,
        stop: Event,
        progress: Callable[[int, int | None], None] | None,
    ) -> None:
        """Search and write the clip; returns when it has ended or `stop` was set."""
        gave_up = Event()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="video-pool")
        room = self.batch_size + workers
        threads: list[_Ahead[Any]] = []

        def ahead(things: Iterator[_T], room: int, name: str) -> _Ahead[_T]:
            one = _Ahead(things, room, gave_up, name)
            threads.append(one)
            return one

        try:
            read = ahead(self._read(pool, stop), room, "video-read")
            searched = ahead(self._search(read, pool, writer), workers + 1, "video-search")
            done = ahead(self._write(searched, writer, lines), 1, "video-write")
            while True:
                try:
                    for total in done:
                        if progress is not None:
                            progress(self.written, total)
                    break
                except KeyboardInterrupt:
                    if self.interrupted:
                        raise
                    self.interrupted = True
                    stop.set()  # what has been read is still searched and written
        finally:
            gave_up.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for one in threads:
                one.join()
            pool.shutdown()

    def _read(self, pool: ThreadPoolExecutor, stop: Event) -> Iterator[_Item | Sound]:
        for one in self.reader.read(stop):
            if isinstance(one, Sound):
                yield one
            elif one.number % self.every:
                yield _Item(one, None)
            else:
                yield _Item(one, pool.submit(self._prepare, one.frame))

    def _search(
        self, items: Iterator[_Item | Sound], pool: ThreadPoolExecutor, writer: VideoWriter
    ) -> Iterator[_Item | Sound]:
        waiting: list[_Item] = []
        last: tuple[ImageDetections, Sequence[int | None]] | None = None

        def flush() -> Iterator[_Item]:
            nonlocal last
            ready = [one.ready.result()[1] for one in waiting if one.ready is not None]
            found = iter(self.detector.detect_prepared(ready, **self.thresholds))
            for one in waiting:
                if one.ready is not None:
                    size = self.reader.size
                    objects = next(found)
                    source = Source(self.reader.source, Path(self.reader.source).name)
                    tracks = self.tracker.update(objects, one.stamped.time) if self.tracker else ()
                    last = (self.detector.image_detections(objects, source, size), tracks)
                    self.searched += 1
                    self.objects.update(self.detector.classes[i] for i in objects.labels.tolist())
                assert last is not None  # the first frame is searched
                one.found, one.tracks = last
                one.encodable = pool.submit(self._annotate, one, writer)
                yield one
            waiting.clear()

        for one in items:
            if isinstance(one, Sound):
                yield one  # need not wait for the network: the file puts it in its place
                continue
            waiting.append(one)
            # Frames in memory are bounded, however few of them are searched.
            if sum(item.ready is not None for item in waiting) == self.batch_size or len(
                waiting
            ) >= max(32, self.batch_size):
                yield from flush()
        yield from flush()

    def _write(
        self, items: Iterator[_Item | Sound], writer: VideoWriter, lines: TextIO
    ) -> Iterator[int | None]:
        """Gives the expected number of frames after each that was written."""
        for one in items:
            if isinstance(one, Sound):
                writer.write_sound(one)
                continue
            assert one.encodable is not None
            writer.write(one.encodable.result(), one.stamped.pts)
            lines.write(json.dumps(self._line(one), ensure_ascii=False, allow_nan=False) + "\n")
            lines.flush()
            self.written += 1
            total = self.reader.frames
            yield None if total is None else max(total, self.written)
        if not self.written:
            raise DataError(f"{self.reader.source}: no frame was read")
        writer.finish()

    def _prepare(self, frame: Any) -> tuple[Pixels, Prepared]:
        pixels = self.reader.rgb(frame)
        return pixels, self.detector.prepare(Source(pixels, self.reader.source))

    def _annotate(self, one: _Item, writer: VideoWriter) -> Any:
        assert one.found is not None
        found = one.found
        tracks = one.tracks or [None] * len(found)
        kept = [i for i, score in enumerate(found.scores.tolist()) if score >= self.draw_threshold]
        frame = one.stamped.frame
        if not kept:
            return writer.encodable(frame, None)
        pixels = self.reader.rgb(frame) if one.ready is None else one.ready.result()[0]
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
        return writer.encodable(frame, np.asarray(drawn))

    def _line(self, one: _Item) -> dict[str, Any]:
        assert one.found is not None
        line = {
            "frame": one.stamped.number,
            "time": round(one.stamped.time, 6),
            "searched": one.ready is not None,
            **one.found.to_dict(),
        }
        if self.tracker is not None:
            for detection, number in zip(line["detections"], one.tracks, strict=True):
                detection["track"] = number
        return line


class _Ahead(Generic[_T]):
    """What an iterator gives, worked out by a thread of its own, at most `room` things ahead.

    An error in the thread is raised to whoever asks for the next thing. Asking can be interrupted
    and taken up again. Once `gave_up` is set the thread ends with its next thing, and whoever asks
    is told so by :class:`_GaveUp`.
    """

    def __init__(self, things: Iterator[_T], room: int, gave_up: Event, name: str) -> None:
        self._queue: Queue[tuple[str, Any]] = Queue(room)
        self._gave_up = gave_up
        self._ended = False
        self._thread = Thread(target=self._run, args=(things,), name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[_T]:
        return self

    def __next__(self) -> _T:
        if self._ended:
            raise StopIteration
        while True:
            if self._gave_up.is_set():
                raise _GaveUp
            try:
                kind, thing = self._queue.get(timeout=_POLL)
            except Empty:
                continue
            if kind == "thing":
                return thing  # type: ignore[no-any-return]
            self._ended = True
            if kind == "error":
                raise thing
            raise StopIteration

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _run(self, things: Iterator[_T]) -> None:
        try:
            for thing in things:
                if not self._put("thing", thing):
                    return
        except _GaveUp:
            return
        except BaseException as error:
            self._put("error", error)
        else:
            self._put("end", None)

    def _put(self, kind: str, thing: Any) -> bool:
        while not self._gave_up.is_set():
            try:
                self._queue.put((kind, thing), timeout=_POLL)
            except Full:
                continue
            return True
        return False


class _GaveUp(Exception):
    """The work was given up, by an error elsewhere."""


def _track_colour(number: int | None) -> Colour:
    return _UNTRACKED if number is None else PALETTE[number % len(PALETTE)]


def _places(
    reader: VideoReader, source: str | Path, out: Path, name: str | None
) -> tuple[Path, Path]:
    """The files to be written, in a folder that exists."""
    stem = name or (reader.source.replace(" ", "-") if reader.live else Path(source).stem)
    video, lines = out / f"{stem}.mp4", out / f"{stem}.jsonl"
    if not reader.live and video.resolve() == Path(source).resolve():
        raise DataError(f"{source}: would be written over; give another --out than its own folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be made: {error.strerror}") from None
    return video, lines
