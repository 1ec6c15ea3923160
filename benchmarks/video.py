"""Compare ``retinanet detect CLIP`` with its slowest stage.

    python benchmarks/video.py RUN PHOTOS [--size 640x480 1280x720] [--frames N] [--rounds N]

Makes a clip with sound that pans over the photos in PHOTOS, and detects in it in interleaved
rounds: end to end as the command does; stage after stage, each timed; and the network alone on the
same frames. Prints a Markdown table of frames per second: median, minimum and maximum.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from threading import Event
from typing import Any

import av
import numpy as np
from PIL import Image

from retinanet.bench.machine import describe_machine
from retinanet.inference import Detector, load
from retinanet.inference.sources import find_sources
from retinanet.video.detect import _Item, _Pipeline, detect_video
from retinanet.video.reading import Sound, VideoReader
from retinanet.video.writing import VideoWriter

STAGES = ("decode", "prepare", "search", "draw", "encode")
_RATE, _SHOWN = 25, 50  # frames per second; frames of a photo


def make_clip(file: Path, photos: list[Any], width: int, height: int, frames: int) -> None:
    """A pan over each of `photos` for two seconds, and a tone that wanders."""
    random = np.random.default_rng(0)
    options = {"preset": "medium", "crf": "23"}
    with av.open(str(file), "w") as out:
        video: Any = out.add_stream("libx264", rate=_RATE, options=options)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio: Any = out.add_stream("aac", rate=48000)
        audio.layout = "stereo"
        for i in range(frames):
            if i % _SHOWN == 0:
                photo = Image.fromarray(
                    photos[i // _SHOWN % len(photos)].read().permute(1, 2, 0).numpy()
                )
                scale = 1.25 * max(width / photo.width, height / photo.height)
                sides = (round(photo.width * scale), round(photo.height * scale))
                pixels = np.asarray(photo.resize(sides, Image.Resampling.BICUBIC))
                room = np.array([pixels.shape[0] - height, pixels.shape[1] - width])
                begin, end = random.integers(0, room + 1, (2, 2))
            y, x = (begin + (end - begin) * (i % _SHOWN) / _SHOWN).astype(int)
            image = np.ascontiguousarray(pixels[y : y + height, x : x + width])
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, _RATE)
            out.mux(video.encode(frame))
            seconds = (np.arange(48000 // _RATE) + i * (48000 // _RATE)) / 48000
            tone = 0.2 * np.sin(2 * np.pi * (300 + 50 * np.sin(seconds)) * seconds)
            sound = av.AudioFrame.from_ndarray(
                np.stack([tone, tone]).astype(np.float32), format="fltp", layout="stereo"
            )
            sound.sample_rate, sound.pts = 48000, i * (48000 // _RATE)
            sound.time_base = Fraction(1, 48000)
            out.mux(audio.encode(sound))
        out.mux(video.encode(None))
        out.mux(audio.encode(None))


def one_after_the_other(
    detector: Detector, clip: Path, out: Path, draw_threshold: float
) -> tuple[dict[str, float], list[Any]]:
    """Seconds of each stage when nothing runs beside it, and what the network was given."""
    spent = dict.fromkeys(STAGES, 0.0)
    reader = VideoReader(clip)
    pipeline = _Pipeline(detector, reader, None, 1, 1, draw_threshold, detector.thresholds)
    writer = VideoWriter(out / "serial.mp4", reader)
    lines = io.StringIO()
    prepared = []
    frames = reader.read(Event())

    def timed(stage: str, function: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        spent[stage] += time.perf_counter() - began
        return result

    while (frame := timed("decode", next, frames, None)) is not None:
        if isinstance(frame, Sound):
            timed("encode", writer.write_sound, frame)
            continue
        item = _Item(frame, Future())
        assert item.ready is not None
        item.ready.set_result(timed("prepare", pipeline._prepare, frame.image))
        prepared.append(item.ready.result()[1])
        [(item.found, item.tracks)] = timed(
            "search", lambda item=item: [*pipeline._detect_batch([item])]
        )
        item.encodable = Future()
        item.encodable.set_result(timed("draw", pipeline._annotate, item, writer))
        timed("encode", pipeline._write, item, writer, lines)
    timed("encode", writer.finish)
    reader.close()
    return spent, prepared


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("photos")
    parser.add_argument("--size", nargs="+", default=["640x480", "1280x720"])
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--draw-threshold", type=float, default=0.2)
    chosen = parser.parse_args()
    detector = load(chosen.run, chosen.device)
    photos = find_sources(chosen.photos)
    print("\n".join(describe_machine(detector.device).lines()))
    print(f"{detector.network.description}; load {os.getloadavg()[0]:.1f} before\n")
    print(
        "| clip | " + " | ".join(STAGES) + " | one after the other | network alone | end to end |"
    )
    print("|---" * (len(STAGES) + 4) + "|")
    for size in chosen.size:
        width, height = map(int, size.split("x"))
        rows: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            clip = out / f"{size}.mp4"
            make_clip(clip, photos, width, height, chosen.frames)
            for turn in range(chosen.rounds + 1):
                threshold = chosen.draw_threshold
                summary = detect_video(detector, clip, out / "found", draw_threshold=threshold)
                spent, given = one_after_the_other(detector, clip, out, threshold)
                began = time.perf_counter()
                for one in given:
                    detector.detect_prepared([one])
                alone = time.perf_counter() - began
                if turn == 0:
                    continue  # first calls set things up
                measured = {
                    **spent,
                    "serial": sum(spent.values()),
                    "alone": alone,
                    "all": summary.seconds,
                }
                for name, seconds in measured.items():
                    rows.setdefault(name, []).append(chosen.frames / seconds)
        cells = [
            f"{statistics.median(many):.1f} ({min(many):.1f} to {max(many):.1f})"
            for many in rows.values()
        ]
        print(f"| {size} | " + " | ".join(cells) + " |", flush=True)
    print(f"\nload {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
