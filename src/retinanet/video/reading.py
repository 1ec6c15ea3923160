"""Read a video or camera frame by frame: upright, times as stored, damage counted."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt

from retinanet.errors import DataError, MissingExtraError

Pixels = npt.NDArray[np.uint8]

_CAMERA_WAIT = 10.0  # seconds for a camera to open, and between two of its frames
_MAX_SAMPLES = 32  # frames of a video that int8 is calibrated on; held in memory together

# A video ends early, or has a hole, if it lacks so many seconds and frames of what it states.
_MIN_GAP_SECONDS, _MIN_GAP_FRAMES = 0.25, 3
_CONSTANT_RATE = 0.95  # share of the frames that follow each other at the stated rate


@dataclass(frozen=True, slots=True)
class Turn:
    """Turns the stored image upright: first transpose, then mirror.

    Attributes:
        transposed: rows become columns.
        mirrored: left becomes right.
        flipped: top becomes bottom.
    """

    transposed: bool = False
    mirrored: bool = False
    flipped: bool = False

    def apply(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) as stored to upright, contiguous."""
        if self.transposed:
            pixels = pixels.transpose(1, 0, 2)
        if self.mirrored:
            pixels = pixels[:, ::-1]
        if self.flipped:
            pixels = pixels[::-1]
        return np.ascontiguousarray(pixels)


UPRIGHT = Turn()


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded frame.

    Attributes:
        image: PyAV's frame as stored: not turned.
        number: 0, 1, ... of the frames that could be read.
        pts: its time in units of the clip's time base; grows from frame to frame.
        time: the same in seconds.
    """

    image: Any
    number: int
    pts: int
    time: float


@dataclass(frozen=True, slots=True)
class Sound:
    """A packet of a sound stream, still encoded.

    Attributes:
        packet: PyAV's.
        stream: the place of its stream among :attr:`VideoReader.sounds`.
    """

    packet: Any
    stream: int


class VideoReader:
    """An opened clip or camera.

    Attributes:
        source: as given; ``camera 0`` for a camera.
        size: (height, width) in pixels of the upright image; a clip that changes it on the way is
            resized to that of its first frame.
        turn: what makes a stored frame upright.
        time_base: seconds a unit of `pts`.
        rate: frames a second as the clip states it, its mean where they vary; None: not stated.
        frames: how many frames there are about; None: not known, as of a camera.
        pixel_aspect: width / height of a pixel, upright.
        live: whether it is a camera.
        sounds: PyAV's streams of sound.
        first: the first frame that can be read, for its colours.
        broken: frames that could not be decoded so far; exact once the video has been read.
        missing: frames that the container states, or its times imply, and does not contain; known
            once the video has been read.
        cut: why reading ended before the video did; empty: it did not.
    """

    def __init__(self, source: str | Path) -> None:
        """Open it and decode its first frame.

        Raises:
            DataError: there is no such file or camera, it is no video, or holds no frame.
            MissingExtraError: PyAV is not installed.
        """
        av = import_av()
        number = camera_number(source)
        self.live = number is not None
        self.source = f"camera {number}" if self.live else str(source)
        self.broken = 0
        self.missing = 0
        self.cut = ""
        try:
            if number is not None:
                self._container = _open_camera(av, number)
            else:
                # By a container of its own, so that the clip is then read from its beginning.
                with av.open(self.source) as container:
                    stream = _video_stream(container, self.source)
                    self.first = _first_frame(av, container, stream, self.source)
                self._container = av.open(self.source)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise DataError(_why_not_opened(self.source, self.live, error)) from None
        self._stream = _video_stream(self._container, self.source)
        if self.live:
            self.first = _first_frame(av, self._container, self._stream, self.source)
        else:
            self._stream.thread_type = "AUTO"  # frames side by side: costs latency, saves time
        self.turn = _turn(self.first)
        height, width = self.first.height, self.first.width
        self.size = (width, height) if self.turn.transposed else (height, width)
        self.time_base: Fraction = self._stream.time_base
        self.rate: Fraction | None = self._stream.average_rate or self._stream.guessed_rate or None
        self.frames = None if self.live else _frame_count(av, self._container, self._stream)
        aspect = self._stream.codec_context.sample_aspect_ratio or Fraction(1)
        self.pixel_aspect = 1 / aspect if self.turn.transposed else aspect
        self.sounds = [] if self.live else list(self._container.streams.audio)
        self._sound_indices = {sound.index: i for i, sound in enumerate(self.sounds)}
        self._times = _Times(self._container, self._stream, float(self.rate or 25))

    def close(self) -> None:
        """Close the file or the camera."""
        self._container.close()

    def read(self, stop: Event) -> Iterator[Frame | Sound]:
        """Yield frames and packets of sound in their stored order until `stop` is set.

        A frame that the decoder cannot decode, or marks as damaged, is counted in :attr:`broken`
        and left out.
        """
        av = import_av()
        step = max(1, round(1 / (self.time_base * (self.rate or 25))))
        number, last, begin = 0, None, None
        packets = damaged = 0
        for packet in self._packets(av):
            if stop.is_set():
                return
            if isinstance(packet, Sound):
                yield packet
                continue
            packets += packet.size > 0  # the last ones are empty: they flush the decoder
            try:
                images = packet.decode()
            except av.FFmpegError:
                damaged += 1
                self.broken += 1
                continue
            for image in images:
                if image.is_corrupt:
                    damaged += 1
                    self.broken += 1
                    continue
                pts = image.pts if image.pts is not None else image.dts
                if self.live and pts is not None:
                    # A camera's clock counts from when the machine was started.
                    begin = pts if begin is None else begin
                    pts -= begin
                if pts is None or (last is not None and pts <= last):
                    pts = 0 if last is None else last + step
                last = pts
                time = float(pts * self.time_base)
                self._times.add(time)
                yield Frame(image, number, pts, time)
                number += 1
        if damaged:
            # Frames that depend on a damaged key frame never leave the decoder.
            self.broken = max(self.broken, packets - number)
        if not self.live:
            self.missing = self._times.missing(self.broken)

    def rgb(self, frame: Any) -> Pixels:
        """(H, W, 3) uint8 RGB, upright, of :attr:`size`; may be called from several threads."""
        height, width = self.first.height, self.first.width
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
        return self.turn.apply(pixels) if self.turn != UPRIGHT else np.ascontiguousarray(pixels)

    def samples(self, max_images: int = _MAX_SAMPLES) -> list[Pixels]:
        """Return up to `max_images` frames, spread over the video.

        Raises:
            DataError: it is a camera, which has no frames yet.
        """
        if self.live:
            raise DataError(
                f"{self.source}: there is nothing to calibrate int8 on yet; "
                "name a folder of such images with --calibrate"
            )
        av = import_av()
        images: list[Pixels] = []
        with av.open(self.source) as container:
            stream = _video_stream(container, self.source)
            length = container.duration or 0  # microseconds
            for i in range(max_images if length else 1):
                try:
                    container.seek(i * length // max_images)
                    images.append(self.rgb(next(container.decode(stream))))
                except (av.FFmpegError, StopIteration):
                    continue
        return images or [self.rgb(self.first)]

    def _packets(self, av: Any) -> Iterator[Any]:
        """Yield packets of the image as they are, of sound as :class:`Sound`."""
        try:
            for packet in self._container.demux([self._stream, *self.sounds]):
                self._times.add_packet(packet)
                if packet.stream.index == self._stream.index:
                    yield packet
                elif packet.dts is not None:
                    yield Sound(packet, self._sound_indices[packet.stream.index])
        except av.FFmpegError as error:
            self.cut = error.strerror or type(error).__name__


class _Times:
    """Compares the times of a video's frames and packets with what its container states."""

    def __init__(self, container: Any, stream: Any, rate: float) -> None:
        self._step = 1 / rate
        self._stated_end = None
        if container.duration:
            # Both in microseconds.
            self._stated_end = (container.duration + (container.start_time or 0)) / 1_000_000
        # An index lists every frame: there a longer interval is the video's own.
        self._has_index = bool(stream.frames)
        self._intervals: Counter[int] = Counter()  # in steps
        self._last: float | None = None
        self._image = stream.index
        self._ends: dict[int, float] = {}  # of the packets, by stream, in seconds

    def add_packet(self, packet: Any) -> None:
        """Take a packet of image or sound into account."""
        if packet.pts is not None:
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            index = packet.stream.index
            self._ends[index] = max(self._ends.get(index, end), end)

    def add(self, time: float) -> None:
        """Take the next frame's time in seconds into account."""
        if self._last is not None:
            self._intervals[round((time - self._last) / self._step)] += 1
        self._last = time

    def missing(self, broken: int) -> int:
        """Return how many frames are missing at the end and in holes, beside the `broken` ones."""
        threshold = max(_MIN_GAP_SECONDS, _MIN_GAP_FRAMES * self._step)
        total = 0
        stated = self._stated_end
        if stated is not None and self._image in self._ends:  # noqa: SIM102
            if stated - max(self._ends.values()) > threshold:
                total += round((stated - self._ends[self._image]) / self._step)
        regular = self._intervals[1] >= _CONSTANT_RATE * self._intervals.total()
        if regular and not self._has_index:
            gaps = {steps: n for steps, n in self._intervals.items() if steps > 1}
            holes = sum(
                (steps - 1) * n for steps, n in gaps.items() if steps * self._step > threshold
            )
            total += max(0, holes - broken)
        return total


def import_av() -> Any:
    """Import PyAV.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import av
    except ImportError:
        raise MissingExtraError("PyAV", "video") from None
    return av


def camera_number(source: str | Path) -> int | None:
    """Return the number of the camera; None: `source` is a file."""
    text = str(source)
    return int(text) if text.isascii() and text.isdecimal() and not Path(text).exists() else None


def _open_camera(av: Any, number: int) -> Any:
    waits = (_CAMERA_WAIT, _CAMERA_WAIT)
    if sys.platform == "darwin":
        # It opens at no rate but one that the camera has; 30 is what nearly all have.
        return av.open(
            str(number), format="avfoundation", options={"framerate": "30"}, timeout=waits
        )
    if sys.platform == "win32":
        from av.device import enumerate_input_devices

        cameras = [
            camera for camera in enumerate_input_devices("dshow") if "video" in camera.media_types
        ]
        if number >= len(cameras):
            raise FileNotFoundError(2, f"there are {len(cameras)} cameras")
        return av.open(f"video={cameras[number].name}", format="dshow", timeout=waits)
    return av.open(f"/dev/video{number}", format="v4l2", timeout=waits)


def _video_stream(container: Any, source: str) -> Any:
    from av.stream import Disposition

    for stream in container.streams.video:
        if Disposition.attached_pic not in stream.disposition:  # the cover of a song is no video
            if stream.codec_context is None:
                raise DataError(f"{source}: this PyAV has no decoder for its codec")
            return stream
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
    raise DataError(f"{source}: holds no video stream (streams: {kinds})")


def _first_frame(av: Any, container: Any, stream: Any, source: str) -> Any:
    damaged = 0
    try:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                damaged += 1
                continue
            for frame in frames:
                if not frame.is_corrupt:
                    return frame
                damaged += 1
    except av.FFmpegError:
        damaged += 1
    many = f"; {damaged} damaged ones" if damaged else ""
    raise DataError(f"{source}: holds no frame that can be read{many}")


def _frame_count(av: Any, container: Any, stream: Any) -> int | None:
    """As stated, or by length and rate."""
    if stream.frames:
        return int(stream.frames)
    if container.duration and stream.average_rate:
        return max(1, round(float(container.duration / av.time_base * stream.average_rate)))
    return None


def _turn(frame: Any) -> Turn:
    """Of the display matrix: x' = a x + c y, y' = b x + d y; the nearest of right angles."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Turn(True, c < 0, b < 0)
    return Turn(False, a < 0, d < 0)


def _why_not_opened(source: str, live: bool, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    if live:
        return f"{source}: cannot be opened: {reason}; is it plugged in, and used by no one else?"
    path = Path(source)
    if not path.exists():
        return f"{source}: there is no such file or folder"
    if path.is_dir():
        return f"{source}: is a folder, not a video"
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError as unreadable:
        return f"{source}: cannot be read: {unreadable.strerror}"
    if not start:
        return f"{source}: is empty"
    if start[4:8] == b"ftyp":
        return f"{source}: cannot be read as a video: its index is missing; it was cut off"
    return f"{source}: not a video of any known format (it begins with {start!r}): {reason}"
