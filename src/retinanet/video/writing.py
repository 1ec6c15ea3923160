"""The annotated mp4: frames at their own times, sound as it was, readable after a kill."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from threading import local
from typing import Any

import numpy as np

from retinanet.errors import DataError
from retinanet.video.reading import Pixels, Sound, Turn, VideoReader, import_av

ENCODERS = ("libx264", "libopenh264", "mpeg4")
"""Encoders in order of preference; all play everywhere, the last is twice the size."""

COPIED_SOUND = frozenset({"aac", "mp3", "mp2", "ac3", "eac3", "opus", "flac", "alac"})
"""Codecs of sound that players expect in an mp4: they are copied."""

_CONTAINER = {
    # While it is written a file of fragments, each readable; when closed an ordinary mp4.
    "movflags": "hybrid_fragmented+delay_moov+frag_keyframe",
    "flush_packets": "1",
}
_QUALITY = {"preset": "veryfast", "crf": "20", "g": "250"}
_BITS = 0.15  # per pixel, for encoders without constant quality
_MPEG4_UNITS = 65535  # maximum units of time per second of MPEG-4 part 2
_COMMON_UNITS = 60_000  # units per second that frames of 24, 25, 30, 50, 60 and x 1000/1001 fall on
_LIMITED = 1  # AVCOL_RANGE_MPEG: 16..235, the range that players assume for yuv420p
# AVCOL_SPC to SWS_CS, which PyAV takes.
_MATRICES = {5: 5, 6: 5, 1: 1, 4: 4, 7: 7, 9: 9}
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}  # of AAC, by channels

_thread = local()


class VideoWriter:
    """Writes the frames of a :class:`VideoReader`, annotated, and its sound.

    Attributes:
        codec: encoder of the image.
        sound: what becomes of each stream of sound; empty: there is none.
        lost_sound: packets of sound that could not be written.
    """

    def __init__(self, file: Path, reader: VideoReader) -> None:
        """Set up the streams; the file is created with the first frame or packet."""
        av = import_av()
        self._av = av
        self._reader = reader
        self._container = av.open(str(file), "w", format="mp4", options=_CONTAINER)
        self.codec = _encoder(av)
        height, width = reader.size
        # yuv420p has one colour per 2 x 2 pixels: a last odd row or column is written twice.
        self._margin = (height % 2, width % 2)
        height, width = height + height % 2, width + width % 2
        rate = reader.rate or Fraction(25)
        self._video = self._container.add_stream(self.codec, rate=rate)
        context = self._video.codec_context
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        # The video's own time base, so that no time is rounded, where the codec supports it.
        context.time_base = reader.time_base
        if self.codec == "mpeg4" and reader.time_base.denominator > _MPEG4_UNITS:
            context.time_base = Fraction(1, _COMMON_UNITS)
        context.sample_aspect_ratio = reader.pixel_aspect
        context.thread_count = 0  # chosen by ffmpeg
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
        self._sounds = [self._add_sound(source) for source in reader.sounds]
        # Broadcast streams repeat in each packet a header that an mp4 has once.
        self._filters = {
            index: av.bitstream.BitStreamFilterContext("aac_adtstoasc", source)
            for index, source in enumerate(reader.sounds)
            if self._sounds[index][1] == "copied"
            and source.codec_context.name == "aac"
            and not source.codec_context.extradata
        }
        self.sound = "; ".join(result for _, result in self._sounds)

    def encodable(self, frame: Any, drawn: Pixels | None) -> Any:
        """Return a frame as the encoder takes it; several threads may call.

        Args:
            frame: PyAV's frame as it was read.
            drawn: the annotated image, (H, W, 3) upright; None: the frame itself, whose colours
                then need not go through RGB.
        """
        reader, first = self._reader, self._reader.first
        options: dict[str, Any] = {"format": "yuv420p", "dst_color_range": _LIMITED}
        if self._matrix is not None:
            options["dst_colorspace"] = self._matrix
        if drawn is None:
            if reader.turn == Turn() and not any(self._margin):
                return _reformatter().reformat(
                    frame, width=first.width, height=first.height, **options
                )
            drawn = reader.rgb(frame)
        if any(self._margin):
            drawn = np.pad(drawn, ((0, self._margin[0]), (0, self._margin[1]), (0, 0)), "edge")
        image = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(drawn), format="rgb24")
        return _reformatter().reformat(image, **options)

    def write(self, frame: Any, pts: int) -> None:
        """Write the next frame, of :meth:`encodable`, at `pts` of the video's time base."""
        frame.pts, frame.time_base = pts, self._reader.time_base
        frame.pict_type = 0  # the encoder chooses its own key frames
        self._container.mux(self._video.encode(frame))

    def write_sound(self, sound: Sound) -> None:
        """Write a packet of sound; a damaged one is counted and left out."""
        stream, result = self._sounds[sound.stream]
        if stream is None:
            return
        try:
            if result == "copied":
                bare = self._filters.get(sound.stream)
                for packet in [sound.packet] if bare is None else bare.filter(sound.packet):
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
        for stream, result in self._sounds:
            if stream is not None and result != "copied":
                self._container.mux(stream.encode(None))
        self._container.close()

    def close(self) -> None:
        """Close the file as it is, after an error; without effect after :meth:`finish`."""
        with suppress(self._av.FFmpegError):
            self._container.close()

    def _add_sound(self, source: Any) -> tuple[Any, str]:
        """Add a stream for it; returns the stream and what becomes of the sound."""
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
        rate = min(rates, key=lambda rate: abs(rate - context.sample_rate))
        stream = self._container.add_stream("aac", rate=rate)
        stream.layout = _LAYOUTS.get(context.layout.nb_channels, "stereo")
        return stream, f"{name} encoded anew as aac"


def _encoder(av: Any) -> str:
    for name in ENCODERS:
        with suppress(av.codec.codec.UnknownCodecError):
            av.codec.Codec(name, "w")
            return name
    raise DataError(f"this PyAV has no encoder for mp4 ({', '.join(ENCODERS)}); install its wheel")


def _reformatter() -> Any:
    """Return this thread's reformatter: it keeps its tables and threads from frame to frame."""
    if not hasattr(_thread, "reformatter"):
        from av.video.reformatter import VideoReformatter

        _thread.reformatter = VideoReformatter()
    return _thread.reformatter
