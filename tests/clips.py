"""Clips for tests: small, quick, each frame known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from white_finder import Pixels, black

av: Any = __import__("av")

TICKS = Fraction(1, 12800)
"""Time base of clips unless another is given; a frame is 512 of it, 25 a second."""


def write_clip(
    file: Path,
    images: Iterable[Pixels],
    *,
    times: Sequence[int] | None = None,
    time_base: Fraction = TICKS,
    codec: str = "libx264",
    form: str = "yuv420p",
    sound: str | None = None,
    options: dict[str, str] | None = None,
    change: Callable[[Any], None] = lambda stream: None,
) -> list[float]:
    """Write RGB images and a tone as long; gives their times in seconds."""
    seconds = []
    with av.open(str(file), "w") as out:
        video = audio = None
        for i, image in enumerate(images):
            if video is None:
                video = out.add_stream(codec, rate=25, options=options or {})
                video.height, video.width = image.shape[:2]
                video.pix_fmt = form
                video.codec_context.time_base = time_base
                change(video)
                if sound is not None:
                    audio = out.add_stream(sound, rate=48000)
                    audio.layout = "mono"
                    audio.bit_rate = 96000
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(
                format=form,
                dst_colorspace=video.codec_context.colorspace if form != "gray" else None,
            )
            frame.pts = times[i] if times else i * round(1 / (25 * time_base))
            frame.time_base = time_base
            seconds.append(float(frame.pts * time_base))
            out.mux(video.encode(frame))
            if audio is not None:
                place = np.arange(1920) + 1920 * i
                tone = np.sin(place * (2 * np.pi * 440 / 48000)).astype(np.float32)[None]
                heard = av.AudioFrame.from_ndarray(tone * 0.3, format="fltp", layout="mono")
                heard.sample_rate, heard.pts, heard.time_base = 48000, 1920 * i, Fraction(1, 48000)
                out.mux(audio.encode(heard))
        for stream in (video, audio):
            if stream is not None:
                out.mux(stream.encode(None))
    return seconds


def walk(count: int, height: int = 64, width: int = 96) -> list[Pixels]:
    """A white square of 8 x 8 pixels that goes a cell to the right with each frame."""
    return [black(height, width, box_at(i, width)) for i in range(count)]


def box_at(frame: int, width: int = 96) -> tuple[int, int, int, int]:
    """Where the square of :func:`walk` is."""
    x = 8 * (frame % (width // 8))
    return (x, 16, x + 8, 24)


def read_clip(file: Path) -> tuple[list[Pixels], list[float]]:
    """RGB images and times in seconds, as players see them."""
    images, seconds = [], []
    with av.open(str(file)) as clip:
        for frame in clip.decode(video=0):
            images.append(frame.to_ndarray(format="rgb24"))
            seconds.append(float(frame.pts * frame.time_base))
    return images, seconds


def sound_packets(file: Path, stream: int = 0) -> list[tuple[float, bytes]]:
    """Time in seconds and content of each packet of sound."""
    with av.open(str(file)) as clip:
        return [
            (float(packet.pts * packet.time_base), bytes(packet))
            for packet in clip.demux(audio=stream)
            if packet.size
        ]


def damage(file: Path, packets: Iterable[int], *, share: float = 1) -> None:
    """Overwrite these packets of the image, or their last `share`, as a bad disk would."""
    with av.open(str(file)) as clip:
        places = [(one.pos, one.size) for one in clip.demux(video=0) if one.size]
    content = bytearray(file.read_bytes())
    for packet in packets:
        pos, size = places[packet]
        kept = int(size * (1 - share))
        content[pos + kept : pos + size] = b"\xff" * (size - kept)
    file.write_bytes(content)
