"""The annotated mp4: frames at their own times, sound as it was, readable after a kill."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from threading import local
from typing import Any

import numpy as np

from retinanet.errors import DataError
from retinanet.video.reading import Pixels, Sound, VideoReader, import_av

ENCODERS = ("libx264", "libopenh264", "mpeg4")
"""Those that may write the image, the first that PyAV has; all play everywhere, the last is
twice the size."""

COPIED_SOUND = frozenset({"aac", "mp3", "mp2", "ac3", "eac3", "opus", "flac", "alac"})
"""Kinds of sound that go into the mp4 as they are: those that players expect in one."""

_CONTAINER = {
    # While it is written a file of fragments, each readable; when closed an ordinary mp4.
    "movflags": "hybrid_fragmented+delay_moov+frag_keyframe",
    "flush_packets": "1",
}
_QUALITY = {"preset": "veryfast", "crf": "20", "g": "250"}
_BITS = 0.15  # a pixel, for encoders that know no constant quality
_FINEST = 65535  # units a second of MPEG-4 part 2
_SMOOTH = 60_000  # units a second that frames of 24, 25, 30, 50, 60 and their 1000/1001 fall on
_LIMITED = 1  # AVCOL_RANGE_MPEG: 16..235, what yuv420p is taken for
# Where AVCOL_SPC and SWS_CS, which PyAV takes, do not agree.
_MATRICES = {5: 5, 6: 5, 1: 1, 4: 4, 7: 7, 9: 9}

_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}  # that AAC has, by channels

_own = local()


class VideoWriter:
    """Writes what a :class:`VideoReader` reads, with other images.

    Attributes:
        codec: what encodes the image.
        sound: a few words on what becomes of each stream of sound; empty: there is none.
        lost_sound: packets of sound that could not be written.
    """

    def __init__(self, file: Path, reader: VideoReader) -> None:
        """Say what will be in the file; it is made with the first thing written.

        Raises:
            DataError: PyAV has no encoder.
        """
        av = import_av()
        self._av = av
        self._reader = reader
        self._container = av.open(str(file), "w", format="mp4", options=_CONTAINER)
        self.codec = _encoder(av)
        height, width = reader.size
        # yuv420p has one colour for 2 x 2 pixels: a last odd row or column is written twice.
        self._margin = (height % 2, width % 2)
        height, width = height + height % 2, width + width % 2
        rate = reader.rate or Fraction(25)
        self._video = self._container.add_stream(self.codec, rate=rate)
        context = self._video.codec_context
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.time_base = _time_base(self.codec, reader.time_base)
        context.sample_aspect_ratio = reader.pixel_aspect
        context.thread_count = 0  # as many as suit the machine
        self._matrix = _MATRICES.get(int(reader.first.colorspace))
        if self._matrix is not None:
            context.colorspace = reader.first.colorspace
        context.color_primaries = reader.first.color_primaries
        context.color_trc = reader.first.color_trc
        context.color_range = _LIMITED
        if self.codec == "libx264":
            context.options = _QUALITY
        else:
            context.bit_rate = round(_BITS * width * height * rate)
        self.lost_sound = 0
        self._sounds = [self._add_sound(one) for one in reader.sounds]
        # Streams made for broadcast carry in each packet what an mp4 says once.
        self._bare = {
            place: av.bitstream.BitStreamFilterContext("aac_adtstoasc", source)
            for place, source in enumerate(reader.sounds)
            if self._sounds[place][1] == "copied"
            and source.codec_context.name == "aac"
            and not source.codec_context.extradata
        }
        self.sound = "; ".join(words for _, words in self._sounds)

    def encodable(self, frame: Any, drawn: Pixels | None) -> Any:
        """A frame as the encoder takes it; may be called from several threads.

        Args:
            frame: PyAV's frame as it was read.
            drawn: what to show in its place, (H, W, 3) upright; None: the frame itself, whose
                colours then need not go through RGB.
        """
        reader = self._reader
        matrix = {} if self._matrix is None else {"dst_colorspace": self._matrix}
        if drawn is None:
            first = reader.first
            if any(self._margin) or reader.size != (first.height, first.width) or _turned(reader):
                drawn = reader.rgb(frame)
            else:
                return _reformatter().reformat(
                    frame,
                    width=first.width,
                    height=first.height,
                    format="yuv420p",
                    dst_color_range=_LIMITED,
                    **matrix,
                )
        if any(self._margin):
            drawn = np.pad(drawn, ((0, self._margin[0]), (0, self._margin[1]), (0, 0)), "edge")
        image = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(drawn), format="rgb24")
        return _reformatter().reformat(image, format="yuv420p", dst_color_range=_LIMITED, **matrix)

    def write(self, frame: Any, pts: int) -> None:
        """The next frame, of :meth:`encodable`, at `pts` of the clip's time base."""
        frame.pts, frame.time_base = pts, self._reader.time_base
        frame.pict_type = 0  # the encoder chooses its own key frames
        self._container.mux(self._video.encode(frame))

    def write_sound(self, sound: Sound) -> None:
        """A packet of sound; one that is damaged is counted and left out."""
        stream, words = self._sounds[sound.stream]
        if stream is None:
            return
        bare = self._bare.get(sound.stream)
        try:
            if words == "copied":
                packets = [sound.packet] if bare is None else bare.filter(sound.packet)
                for packet in packets:
                    packet.stream = stream
                    self._container.mux(packet)
            else:
                for frame in sound.packet.decode():
                    self._container.mux(stream.encode(frame))
        except self._av.InvalidDataError:
            self.lost_sound += 1

    def finish(self) -> None:
        """Write what the encoders still hold, and the index."""
        self._container.mux(self._video.encode(None))
        for stream, words in self._sounds:
            if stream is not None and words != "copied":
                self._container.mux(stream.encode(None))
        self._container.close()

    def close(self) -> None:
        """Close the file as it is, after an error; nothing to do after :meth:`finish`."""
        with suppress(self._av.FFmpegError):
            self._container.close()

    def _add_sound(self, source: Any) -> tuple[Any, str]:
        """A stream for it, and what becomes of it."""
        context = source.codec_context
        if context is None:
            return None, "left out: no decoder for it"
        name = context.codec.canonical_name
        if name in COPIED_SOUND:
            return self._container.add_stream_from_template(source), "copied"
        try:
            rates = self._av.codec.Codec("aac", "w").audio_rates or [context.sample_rate]
        except self._av.FFmpegError:
            return None, f"left out: no encoder for {name}"
        rate = min(rates, key=lambda one: abs(one - context.sample_rate))
        stream = self._container.add_stream("aac", rate=rate)
        stream.layout = _LAYOUTS.get(context.layout.nb_channels, "stereo")
        return stream, f"{name} encoded anew as aac"


def _encoder(av: Any) -> str:
    for name in ENCODERS:
        try:
            av.codec.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        return name
    raise DataError(f"this PyAV has no encoder for mp4 ({', '.join(ENCODERS)}); install its wheel")


def _time_base(codec: str, own: Fraction) -> Fraction:
    """Seconds a unit: the clip's own, so that no time is rounded, where the codec takes it."""
    if codec == "mpeg4" and own.denominator > _FINEST:
        return Fraction(1, _SMOOTH)
    return own


def _turned(reader: VideoReader) -> bool:
    turn = reader.turn
    return turn.transposed or turn.mirrored or turn.flipped


def _reformatter() -> Any:
    """This thread's own: it keeps its tables and threads from frame to frame."""
    if not hasattr(_own, "reformatter"):
        from av.video.reformatter import VideoReformatter

        _own.reformatter = VideoReformatter()
    return _own.reformatter
