"""Read a video or camera frame by frame: upright, times as stored, damage counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from retinanet.errors import DataError, MissingExtraError
from retinanet.inference.sources import hide_password, is_stream

Pixels = npt.NDArray[np.uint8]

_CAMERA_WAIT = 10.0  # seconds for a camera to open, and between two of its frames
_MAX_SAMPLES = 32  # frames of a video that int8 is calibrated on; held in memory together

# A video was cut off if it lacks so many seconds and frames of what it states.
_MIN_SECONDS, _MIN_FRAMES = 0.25, 3


class Turn(NamedTuple):
    """Turns a stored frame upright: transpose, then mirror left and right, top and bottom."""

    is_transposed: bool = False
    is_mirrored: bool = False
    is_flipped: bool = False


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded frame.

    Attributes:
        image: PyAV's frame as stored: not turned.
        number: 0, 1, ... of the frames that could be read.
        pts: its time in units of the video's time base; grows from frame to frame.
        time: the same in seconds.
    """

    image: Any
    number: int
    pts: int
    time: float


@dataclass(frozen=True, slots=True)
class Sound:
    """A packet of PyAV, still encoded, of the sound stream `stream` of the reader's `sounds`."""

    packet: Any
    stream: int


class VideoReader:
    """An opened video or camera.

    Attributes:
        source: as given, without a password; ``camera 0`` for a camera.
        size: (height, width) in pixels of the upright image; frames of another size are resized to
            that of the first frame.
        turn: how a stored frame is turned upright.
        time_base: seconds per unit of `pts`.
        rate: stated frames per second, the mean of a varying rate; None: not stated.
        frames: approximate number of frames; None: unknown, as of a camera.
        pixel_aspect: width / height of a pixel, upright.
        is_live: whether it is a camera or a stream.
        sounds: PyAV's sound streams.
        first: the first frame that can be read, for its colours.
        broken: frames that could not be decoded so far; exact once the video has been read.
        missing: frames at the end that the container states and does not contain; known once the
            video has been read.
        cut: why reading ended before the video did; empty: it did not.
    """

    def __init__(self, source: str | Path) -> None:
        """Open it and decode its first frame."""
        av = import_av()
        number = camera_number(source)
        self.is_live = number is not None or is_stream(source)
        shown = hide_password(str(source)) if self.is_live else str(source)
        self.source = shown if number is None else f"camera {number}"
        self.broken = 0
        self.missing = 0
        self.cut = ""
        try:
            if number is not None:
                self._container = _open_camera(av, number)
            elif self.is_live:
                waits = (_CAMERA_WAIT, _CAMERA_WAIT)
                # By UDP, frames of many megapixels arrive incomplete.
                options = {"rtsp_transport": "tcp"}
                self._container = av.open(str(source), options=options, timeout=waits)
            else:
                # By a container of its own, so that the video is then read from its beginning.
                with av.open(self.source) as container:
                    stream = _video_stream(container, self.source)
                    self.first = _first_frame(av, container, stream, self.source)
                self._container = av.open(self.source)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise DataError(_why_not_opened(self.source, self.is_live, error)) from None
        stream = self._stream = _video_stream(self._container, self.source)
        if self.is_live:
            self.first = _first_frame(av, self._container, stream, self.source)
        else:
            stream.thread_type = "AUTO"  # decode frames in parallel: more latency, less time
        self.turn = _turn(self.first)
        height, width = self.first.height, self.first.width
        self.size = (width, height) if self.turn.is_transposed else (height, width)
        self.time_base: Fraction = stream.time_base
        self.rate: Fraction | None = stream.average_rate or stream.guessed_rate or None
        self.frames = None if self.is_live else _frame_count(av, self._container, stream)
        aspect = stream.codec_context.sample_aspect_ratio or Fraction(1)
        self.pixel_aspect = 1 / aspect if self.turn.is_transposed else aspect
        self.sounds = [] if self.is_live else list(self._container.streams.audio)
        self._ends: dict[int, float] = {}  # of the packets read, by stream, in seconds

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
        number, last, start = 0, None, None
        packets = 0
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
                self.broken += 1
                continue
            for image in images:
                if image.is_corrupt:
                    self.broken += 1
                    continue
                pts = image.pts if image.pts is not None else image.dts
                if self.is_live and pts is not None:
                    # A camera's clock starts with the machine.
                    start = pts if start is None else start
                    pts -= start
                if pts is None or (last is not None and pts <= last):
                    pts = 0 if last is None else last + step
                last = pts
                time = float(pts * self.time_base)
                yield Frame(image, number, pts, time)
                number += 1
        if self.broken:
            # Frames that depend on a damaged key frame never leave the decoder.
            self.broken = max(self.broken, packets - number)
        if not self.is_live:
            self.missing = self._missing_frames(float(self.rate or 25))

    def rgb(self, frame: Any) -> Pixels:
        """Convert to (H, W, 3) uint8 RGB, upright, of :attr:`size`; several threads may call."""
        height, width = self.first.height, self.first.width
        pixels: Pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
        is_transposed, is_mirrored, is_flipped = self.turn
        if is_transposed:
            pixels = pixels.transpose(1, 0, 2)
        return np.ascontiguousarray(pixels[:: -1 if is_flipped else 1, :: -1 if is_mirrored else 1])

    def samples(self, max_images: int = _MAX_SAMPLES) -> list[Pixels]:
        """Return up to `max_images` frames, spread over the video."""
        if self.is_live:
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
        streams = {sound.index: i for i, sound in enumerate(self.sounds)}
        try:
            for packet in self._container.demux([self._stream, *self.sounds]):
                if packet.pts is not None:
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    before = self._ends.get(packet.stream.index, end)
                    self._ends[packet.stream.index] = max(before, end)
                if packet.stream.index == self._stream.index:
                    yield packet
                elif packet.dts is not None:
                    yield Sound(packet, streams[packet.stream.index])
        except av.FFmpegError as error:
            self.cut = error.strerror or type(error).__name__

    def _missing_frames(self, rate: float) -> int:
        """Compare the end of the packets with that which the container states."""
        length, last = self._container.duration, self._ends.get(self._stream.index)
        if not length or last is None:
            return 0
        stated = (length + (self._container.start_time or 0)) / 1_000_000  # from microseconds
        is_cut = stated - max(self._ends.values()) > max(_MIN_SECONDS, _MIN_FRAMES / rate)
        return round((stated - last) * rate) if is_cut else 0


def import_av() -> Any:
    """Import PyAV."""
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
        # It opens only at a rate that the camera supports; nearly all support 30.
        return av.open(
            str(number), format="avfoundation", options={"framerate": "30"}, timeout=waits
        )
    if sys.platform == "win32":
        from av.device import enumerate_input_devices

        devices = enumerate_input_devices("dshow")
        cameras = [device for device in devices if "video" in device.media_types]
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
    raise DataError(f"{source}: contains no video stream (streams: {kinds})")


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
    details = f"; {damaged} damaged ones" if damaged else ""
    raise DataError(f"{source}: contains no frame that can be read{details}")


def _frame_count(av: Any, container: Any, stream: Any) -> int | None:
    """Return the stated number of frames, else length times rate."""
    if stream.frames:
        return int(stream.frames)
    if container.duration and stream.average_rate:
        return max(1, round(float(container.duration / av.time_base * stream.average_rate)))
    return None


def _turn(frame: Any) -> Turn:
    """Return the nearest right angle of the display matrix: x' = a x + c y, y' = b x + d y."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return Turn()
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Turn(True, c < 0, b < 0)
    return Turn(False, a < 0, d < 0)


def _why_not_opened(source: str, is_live: bool, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    if is_live:
        hint = "is it plugged in, and used by no one else?"
        if is_stream(source):
            hint = "check the address and the password, and that the camera is on"
        return f"{source}: cannot be opened: {reason}; {hint}"
    try:
        with open(source, "rb") as file:
            start = file.read(12)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # such as a null byte
        return f"{source}: there is no such file or folder"
    except IsADirectoryError:
        return f"{source}: is a folder, not a video"
    except OSError as unreadable:
        return f"{source}: cannot be read: {unreadable.strerror}"
    if not start:
        return f"{source}: is empty"
    if start[4:8] == b"ftyp":
        return f"{source}: cannot be read as a video: its index is missing; it was cut off"
    return f"{source}: not a video of any known format (it begins with {start!r}): {reason}"
