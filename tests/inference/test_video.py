"""Videos: boxes, times and sound of each frame are those of the source."""

from __future__ import annotations

import _thread
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from clips import av, box_at, damage, read_clip, sound_packets, walk, write_clip
from retinanet.data.drawing import PALETTE
from retinanet.errors import ConfigError, DataError, MissingExtraError
from retinanet.inference import Detector
from retinanet.model.checkpoint import Checkpoint
from retinanet.structures import Detections, Outputs
from retinanet.video import reading as video_reading
from retinanet.video import writing as video_writing
from retinanet.video.detect import detect_video
from retinanet.video.reading import VideoReader
from retinanet.video.tracking import Tracker
from retinanet.video.writing import VideoWriter
from white_finder import WhiteFinder, black


def lines_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def whites(line: Any) -> list[tuple[int, ...]]:
    """The boxes of class white in a line."""
    return [
        tuple(round(v) for v in one["box"]) for one in line["detections"] if one["class"] == "white"
    ]


def files_in(folder: Path) -> list[str]:
    """All files but the manifest."""
    return sorted(file.name for file in folder.iterdir() if file.name != ".retinanet-outputs")


def no_thread_left() -> bool:
    return not [one for one in threading.enumerate() if one.name.startswith("video-")]


def remux(
    given: Path, out: Path, *, left_out: Sequence[int] = (), options: dict[str, str] | None = None
) -> None:
    """Copy the packets of the image but some."""
    with av.open(str(given)) as source, av.open(str(out), "w", options=options or {}) as target:
        stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
        for i, packet in enumerate(source.demux()):
            if packet.size and i not in left_out:
                packet.stream = stream
                target.mux(packet)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_video_lines_have_the_boxes_of_their_frames(
    detector: Detector, tmp_path: Path, batch_size: int
) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(11), options={"crf": "10"})
    summary = detect_video(detector, clip, tmp_path / "found", batch_size=batch_size)
    lines = lines_of(tmp_path / "found" / "clip.jsonl")
    assert [line["frame"] for line in lines] == list(range(11))
    assert [whites(line) for line in lines] == [[box_at(i)] for i in range(11)]
    assert all(line["searched"] for line in lines)
    assert {(line["file"], line["height"], line["width"]) for line in lines} == {
        (str(clip), 64, 96)
    }
    assert "track" not in lines[0]["detections"][0]
    assert (summary.frames, summary.searched, summary.broken) == (11, 11, 0)
    assert summary.objects == {"white": 11, "bright": 11}
    assert files_in(tmp_path / "found") == ["clip.jsonl", "clip.mp4"]


def test_video_boxes_are_drawn_where_they_were_detected(detector: Detector, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    # Twice the size of the network's input: boxes of 16 x 16, with room inside of the lines.
    images = [np.kron(one, np.ones((4, 4, 1), np.uint8)) for one in walk(6)]
    write_clip(clip, images, options={"crf": "10"})
    detect_video(detector, clip, tmp_path / "found", score_threshold=0.98)
    shown, _ = read_clip(tmp_path / "found" / "clip.mp4")
    assert len(shown) == 6
    for i, image in enumerate(shown):
        x1, y1, x2, y2 = (4 * value for value in box_at(i))
        middle = (y1 + y2) // 2
        assert image.shape == (256, 384, 3)
        assert image[middle, (x1 + x2) // 2].min() > 230
        for x in (x1 + 1, x2 - 2):  # a line two pixels wide in the colour of class 0
            assert np.abs(image[middle, x].astype(int) - PALETTE[0]).max() < 60
        assert image[middle, (x1 - 40) % 384].max() < 30


def test_video_times_and_sound_are_those_of_the_source(detector: Detector, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    times = np.cumsum([6400, 512, 1024, 300, 301, 7000, 512, 90, 512, 512]).tolist()
    seconds = write_clip(clip, walk(10), times=times, sound="aac")
    assert seconds[0] == 0.5
    summary = detect_video(detector, clip, tmp_path / "found")
    _, source = read_clip(clip)
    _, shown = read_clip(summary.video)
    assert shown == source == seconds
    assert [line["time"] for line in lines_of(summary.lines)] == [round(t, 6) for t in seconds]
    assert summary.sound == "copied"
    heard = sound_packets(summary.video)
    assert heard == sound_packets(clip)
    assert len(heard) > 15


CONTAINERS = {
    # suffix: codec, pixels, sound, what becomes of the sound, time base
    ".webm": ("libvpx-vp9", "yuv420p", "libopus", "copied"),
    ".mkv": ("libx264", "yuv420p", "libmp3lame", "copied"),
    ".mov": ("mpeg4", "yuv420p", "pcm_s16le", "pcm_s16le encoded anew as aac"),
    ".avi": ("mjpeg", "yuvj420p", "libmp3lame", "copied"),
    ".ts": ("libx264", "yuv420p", "aac", "copied"),
    ".flv": ("libx264", "yuv420p", "aac", "copied"),
    ".wmv": ("wmv2", "yuv420p", "wmav2", "wmav2 encoded anew as aac"),
    ".mpg": ("mpeg2video", "yuv420p", "mp2", "copied"),
}


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_video_containers_and_sound_codecs(detector: Detector, tmp_path: Path, suffix: str) -> None:
    codec, form, sound, becomes = CONTAINERS[suffix]
    clip = tmp_path / f"clip{suffix}"
    base = Fraction(1, 25) if codec in ("mjpeg", "mpeg2video", "mpeg4") else Fraction(1, 1000)
    options = {"crf": "10"} if codec == "libx264" else {"b": "4M"}
    write_clip(clip, walk(12), codec=codec, form=form, sound=sound, time_base=base, options=options)
    summary = detect_video(detector, clip, tmp_path / "found")
    assert (summary.frames, summary.broken, summary.sound) == (12, 0, becomes)
    assert summary.complete
    assert [whites(line) for line in lines_of(summary.lines)] == [[box_at(i)] for i in range(12)]
    _, shown = read_clip(summary.video)
    _, source = read_clip(clip)
    assert shown == pytest.approx(source, abs=1e-6)
    assert [line["time"] for line in lines_of(summary.lines)] == pytest.approx(source, abs=1e-6)
    with av.open(str(summary.video)) as found, av.open(str(clip)) as given:
        lasts = [
            sum(frame.samples / frame.sample_rate for frame in one.decode(audio=0))
            for one in (found, given)
        ]
    assert lasts[0] == pytest.approx(lasts[1], abs=0.06)
    assert lasts[0] > 0.4
    if becomes == "copied":
        packets = [content for _, content in sound_packets(clip)]
        if suffix == ".ts":
            packets = [one[7:] for one in packets]  # its packets carry a header of their own each
        assert [content for _, content in sound_packets(summary.video)] == packets


@pytest.mark.parametrize(
    ("degrees", "mirrored"), [(0, False), (90, False), (180, False), (-90, False), (90, True)]
)
def test_video_rotated_frames_are_upright(
    detector: Detector, tmp_path: Path, degrees: int, mirrored: bool
) -> None:
    clip = tmp_path / "clip.mp4"
    upright = black(64, 96, (16, 8, 24, 16), (72, 40, 80, 48))
    upright[:, :, 1:] //= 2  # red, to see the colours too
    upright[8:16, 16:24] = upright[40:48, 72:80] = 255
    # What is stored is turned the other way; a mirror comes after the turn.
    turned = upright[:, ::-1] if mirrored else upright
    stored = np.rot90(turned, -degrees // 90)
    write_clip(
        clip,
        [stored] * 4,
        options={"crf": "5"},
        change=lambda stream: stream.set_display_rotation(degrees, hflip=mirrored),
    )
    summary = detect_video(detector, clip, tmp_path / "found", draw_threshold=1.0)
    for line in lines_of(summary.lines):
        assert sorted(whites(line)) == [(16, 8, 24, 16), (72, 40, 80, 48)]
        assert (line["height"], line["width"]) == (64, 96)
    shown, _ = read_clip(summary.video)
    with av.open(str(summary.video)) as found:
        assert next(found.decode(video=0)).rotation == 0
    assert shown[0].shape == upright.shape
    assert np.abs(shown[0].astype(int) - upright).max() < 40


FORMS = {
    "odd sides": ("ffv1", "yuv444p", (63, 95)),
    "ten bits": ("libx264", "yuv420p10le", (64, 96)),
    "twelve bits": ("ffv1", "yuv444p12le", (64, 96)),
    "grey": ("ffv1", "gray", (64, 96)),
    "sixteen bits of grey": ("ffv1", "gray16le", (64, 96)),
    "rgb": ("ffv1", "bgr0", (64, 96)),
    "with transparency": ("ffv1", "yuva420p", (64, 96)),
    "full range": ("mjpeg", "yuvj444p", (64, 96)),
    "4:2:2": ("libx264", "yuv422p", (64, 96)),
}


@pytest.mark.parametrize("name", FORMS)
def test_video_of_any_pixel_format(detector: Detector, tmp_path: Path, name: str) -> None:
    codec, form, (height, width) = FORMS[name]
    clip = tmp_path / "clip.mkv"
    image = black(height, width, (16, 8, 24, 16))
    image[40:56, 8:40] = (200, 60, 60) if "grey" not in name else (90, 90, 90)
    image[40:56, 56:88] = (40, 120, 170) if "grey" not in name else (60, 60, 60)
    base = Fraction(1, 25) if codec == "mjpeg" else Fraction(1, 1000)
    options = {"crf": "5"} if codec == "libx264" else {}
    write_clip(clip, [image] * 3, codec=codec, form=form, time_base=base, options=options)
    for draw_threshold in (0.99, 1.0):  # with boxes, and as it is
        summary = detect_video(detector, clip, tmp_path / "found", draw_threshold=draw_threshold)
        for line in lines_of(summary.lines):
            assert whites(line) == [(16, 8, 24, 16)]
            assert (line["height"], line["width"]) == (height, width)
        with av.open(str(summary.video)) as found:
            stream = found.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        shown, _ = read_clip(summary.video)
        assert shown[0].shape == (height + height % 2, width + width % 2, 3)
        # An odd side is lengthened by a pixel, not stretched: the right patch ends at column 88.
        brightness = shown[0][44:52, 86:90].mean((0, 2))
        assert brightness[:2].min() > 2 * brightness[2:].max()
        for columns in (slice(12, 36), slice(60, 84)):
            wanted = image[44:52, columns].mean((0, 1))
            # The encoder blurs colours near lines; another matrix or range would be 20 off.
            assert shown[0][44:52, columns].mean((0, 1)) == pytest.approx(wanted, abs=10)


@pytest.mark.parametrize("space", [1, 5])
def test_video_colour_matrix_is_kept(detector: Detector, tmp_path: Path, space: int) -> None:
    def tagged(stream: Any) -> None:
        stream.codec_context.colorspace = space
        stream.codec_context.color_primaries = space
        stream.codec_context.color_trc = 1

    clip = tmp_path / "clip.mp4"
    image = black(64, 96, (16, 8, 24, 16))
    image[40:56, 8:40] = (40, 200, 30)
    write_clip(clip, [image] * 3, options={"crf": "5"}, change=tagged)
    for draw_threshold in (0.99, 1.0):
        summary = detect_video(detector, clip, tmp_path / "found", draw_threshold=draw_threshold)
        shown, _ = read_clip(summary.video)
        assert shown[0][48, 24].tolist() == pytest.approx((40, 200, 30), abs=5)
        with av.open(str(summary.video)) as found:
            assert next(found.decode(video=0)).colorspace in ((1,) if space == 1 else (5, 6))


def test_video_pixel_aspect_is_kept(detector: Detector, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"

    def anamorphic(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        stream.set_display_rotation(90)

    write_clip(clip, walk(3), change=anamorphic)
    summary = detect_video(detector, clip, tmp_path / "found")
    with av.open(str(summary.video)) as found:
        assert found.streams.video[0].sample_aspect_ratio == Fraction(3, 4)


def test_video_every_keeps_boxes_between_frames(detector: Detector, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(10), options={"crf": "10"})
    summary = detect_video(detector, clip, tmp_path / "found", every=4, batch_size=2)
    lines = lines_of(summary.lines)
    assert [line["searched"] for line in lines] == [i % 4 == 0 for i in range(10)]
    assert [whites(line) for line in lines] == [[box_at(i - i % 4)] for i in range(10)]
    assert (summary.frames, summary.searched, summary.objects["white"]) == (10, 3, 3)
    shown, _ = read_clip(summary.video)
    assert len(shown) == 10


def test_video_every_bounds_the_frames_in_memory(detector: Detector, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(80))
    batches: list[int] = []
    search = detector.detect_prepared

    def counted(images: Any, **thresholds: Any) -> Any:
        batches.append(len(images))
        return search(images, **thresholds)

    detector.detect_prepared = counted  # type: ignore[method-assign]
    summary = detect_video(detector, clip, tmp_path / "found", every=16, batch_size=5)
    assert batches == [2, 2, 1]  # of 32 frames each, though the batch is not full
    assert summary.frames == 80


def test_video_without_x264_uses_another_encoder(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_writing, "ENCODERS", ("libnone", "mpeg4"))
    clip = tmp_path / "clip.mp4"
    base = Fraction(1, 90000)  # finer than MPEG-4 can count
    write_clip(clip, walk(8), time_base=base, times=[3003 * i for i in range(8)])
    summary = detect_video(detector, clip, tmp_path / "found")
    shown, seconds = read_clip(summary.video)
    assert summary.codec == "mpeg4"
    assert len(shown) == 8
    assert seconds == pytest.approx([i * 3003 / 90000 for i in range(8)], abs=1e-6)
    monkeypatch.setattr(video_writing, "ENCODERS", ("libnone",))
    with pytest.raises(DataError, match=r"no encoder for mp4 \(libnone\)"):
        detect_video(detector, clip, tmp_path / "found")


def test_video_with_two_streams_of_sound(detector: Detector, tmp_path: Path) -> None:
    clip, second = tmp_path / "clip.mkv", tmp_path / "second.mkv"
    write_clip(second, walk(6), sound="libopus")
    with av.open(str(second)) as given, av.open(str(clip), "w") as out:
        video = out.add_stream_from_template(given.streams.video[0], opaque=True)
        sounds = [out.add_stream_from_template(given.streams.audio[0]) for _ in range(2)]
        for packet in given.demux():
            if not packet.size:
                continue
            if packet.stream.type == "video":
                packet.stream = video
                out.mux(packet)
            else:
                for sound in sounds:
                    packet.stream = sound
                    out.mux(packet)
    summary = detect_video(detector, clip, tmp_path / "found")
    assert summary.sound == "copied; copied"
    for stream in range(2):
        assert sound_packets(summary.video, stream) == sound_packets(clip, stream)


def boxes(*corners: tuple[float, float], side: float = 20, scores: Any = None) -> Detections:
    placed = torch.tensor([[x, y, x + side, y + side] for x, y in corners]).reshape(-1, 4)
    count = len(corners)
    return Detections(
        placed.float(),
        torch.tensor(scores or [0.9] * count, dtype=torch.float32),
        torch.zeros(count, dtype=torch.int64),
    )


@pytest.fixture
def tracker() -> Tracker:
    return Tracker(25, threshold=0.5, across_classes=False)


def test_tracker_crossing_objects_keep_their_numbers(tracker: Tracker) -> None:
    seen = []
    for i in range(30):
        # One to the right, one down; they meet at (100, 100) in frame 15, half a box apart.
        numbers = tracker.update(boxes((25 + 5 * i, 100), (110, 25 + 5 * i)), i / 25)
        seen.append(numbers)
    assert seen[0] == [None, None]
    assert all(one == seen[1] for one in seen[1:])
    assert sorted(seen[1]) == [1, 2]  # type: ignore[type-var]
    assert tracker.count == 2


def test_tracker_number_survives_a_short_gap_only(tracker: Tracker) -> None:
    times = [i / 25 for i in range(5)] + [0.6, 0.64]
    assert [tracker.update(boxes((50, 50)), t) for t in times] == [[None], *[[1]] * 6]
    for i in range(40):
        assert tracker.update(boxes(), 0.68 + i / 25) == []
    assert tracker.update(boxes((50, 50)), 2.5) == [None]
    assert tracker.update(boxes((50, 50)), 2.54) == [2]


def test_tracker_uses_the_times_of_the_frames(tracker: Tracker) -> None:
    # 125 pixels a second; then for .4 s no frame, in which it goes 50, more than twice its side.
    times = [*(i / 25 for i in range(12)), 0.84, 0.88]
    numbers = [tracker.update(boxes((20 + 125 * time, 50)), time) for time in times]
    assert numbers == [[None], *[[1]] * 13]


def test_tracker_weak_boxes_only_continue_tracks(tracker: Tracker) -> None:
    for i in range(3):
        numbers = tracker.update(boxes((50, 50), (120, 50), scores=[0.9, 0.3]), i / 25)
    assert numbers == [1, None]
    numbers = tracker.update(boxes((50, 50), (120, 50), scores=[0.2, 0.3]), 3 / 25)
    assert numbers == [1, None]
    assert tracker.update(boxes((50, 50), scores=[0.05]), 4 / 25) == [None]


def test_tracker_classes_of_equal_boxes_keep_their_numbers() -> None:
    for across, wanted in ((False, [[1, 2], [2, 1]]), (True, None)):
        tracker = Tracker(25, threshold=0.5, across_classes=across)
        seen = []
        for i in range(4):
            order = torch.tensor([0, 1] if i % 2 else [1, 0])
            both = boxes((50, 50), (50, 50))
            numbers = tracker.update(Detections(both.boxes, both.scores, order), i / 25)
            seen.append(numbers)
        if wanted is not None:
            assert seen[1:] == [wanted[0], wanted[1], wanted[0]]
    # An object whose class changes keeps its number if it may.
    numbers = []
    for i in range(4):
        one = boxes((200, 50))
        numbers = tracker.update(
            Detections(one.boxes, one.scores, torch.tensor([i % 2])), 4 / 25 + i / 25
        )
    assert numbers == [3]
    assert tracker.count == 3


def test_tracker_forgets_ended_tracks(tracker: Tracker) -> None:
    for i in range(400):
        tracker.update(boxes((10 + 100 * (i // 4), 10)), i / 25)
    assert tracker.count == 100
    assert len(tracker._numbers[0]) < 20


class WideFinder(WhiteFinder):
    """The boxes about white cells are 32 x 32: they overlap as the cell moves on."""

    def forward(self, images: Tensor) -> Outputs:
        outputs = super().forward(images)
        deltas = outputs.deltas[0].clone()
        deltas[:, 2:] = np.log(2)
        return Outputs(outputs.logits, (deltas,))


def test_video_tracks_are_drawn_and_written(tmp_path: Path) -> None:
    model: Any = WideFinder()
    checkpoint = Checkpoint(model, ("white", "bright"), (7, 9), 128, 256, {})
    detector = Detector(checkpoint, device="cpu", precision="float32")
    clip = tmp_path / "clip.mp4"
    images = []
    for i in range(16):
        x = 32 + 8 * i
        images.append(black(128, 256, (x, 32, x + 8, 40), (216 - x, 80, 224 - x, 88)))
    write_clip(clip, images, options={"crf": "10"})
    summary = detect_video(
        detector, clip, tmp_path / "found", track=True, score_threshold=0.98, draw_threshold=0.5
    )
    assert summary.tracks == 2
    ids: dict[int, set[int]] = {}
    for line in lines_of(summary.lines):
        assert len(line["detections"]) == 2
        for one in line["detections"]:
            ids.setdefault(one["box"][1] > 50, set()).add(one["track"])
    assert ids in ({False: {None, 1}, True: {None, 2}}, {False: {None, 2}, True: {None, 1}})
    # Coloured by number, grey before there is one.
    shown, _ = read_clip(summary.video)
    upper = ids[False] - {None}
    for frame, colour in ((0, (160, 160, 160)), (8, PALETTE[upper.pop()])):
        x = 32 + 8 * frame + 4 - 16
        assert np.abs(shown[frame][36, x : x + 2].mean(0) - colour).max() < 70
    # Between searched frames they stay as they are.
    summary = detect_video(
        detector, clip, tmp_path / "found", track=True, every=2, score_threshold=0.98
    )
    lines = lines_of(summary.lines)
    assert [one["track"] for one in lines[5]["detections"]] == [
        one["track"] for one in lines[4]["detections"]
    ]
    assert {one["track"] for one in lines[-1]["detections"]} == {1, 2}


def test_video_broken_frames_are_counted_and_left_out(detector: Detector, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mov"
    # Without reordering, and each frame for itself: the damage is exactly where it is put.
    write_clip(
        clip, walk(20), codec="mjpeg", form="yuvj420p", time_base=Fraction(1, 25), sound="aac"
    )
    damage(clip, [5, 12, 13])
    summary = detect_video(detector, clip, tmp_path / "found", every=2)
    kept = [i for i in range(20) if i not in (5, 12, 13)]
    lines = lines_of(summary.lines)
    assert (summary.frames, summary.broken) == (17, 3)
    assert [round(line["time"] * 25) for line in lines] == kept
    assert [line["frame"] for line in lines] == list(range(17))
    searched = [whites(line) for line in lines if line["searched"]]
    assert searched == [[box_at(i)] for i in kept[::2]]
    _, seconds = read_clip(summary.video)
    assert seconds == pytest.approx([i / 25 for i in kept], abs=1e-3)
    assert len(sound_packets(summary.video)) == len(sound_packets(clip))


def test_video_frames_that_depend_on_a_broken_frame_are_counted(
    detector: Detector, tmp_path: Path
) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(40), options={"g": "10", "keyint_min": "10", "bf": "0", "refs": "1"})
    damage(clip, [20])  # a key frame: nothing can be shown until the next one
    summary = detect_video(detector, clip, tmp_path / "found")
    assert summary.frames + summary.broken == 40
    read = [round(line["time"] * 25) for line in lines_of(summary.lines)]
    assert summary.broken in (9, 10)  # the decoder may trust the last one before it
    assert set(read) - {29} == {*range(20), *range(30, 40)}


def test_video_incomplete_frames_are_counted_as_broken(detector: Detector, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(60), options={"g": "20", "crf": "10"})
    damage(clip, [5, 20, 33], share=0.5)  # the decoder makes up the rest, and says so
    summary = detect_video(detector, clip, tmp_path / "found")
    assert (summary.frames, summary.broken) == (57, 3)


def test_video_cut_off_is_read_as_far_as_possible(detector: Detector, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mkv"
    noise = np.random.default_rng(0).integers(0, 60, (64, 96, 3), np.uint8)
    images = [np.maximum(one, np.roll(noise, i)) for i, one in enumerate(walk(40))]
    write_clip(clip, images, options={"crf": "10", "g": "5"})
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2])
    summary = detect_video(detector, clip, tmp_path / "found")
    assert 8 < summary.frames < 36
    assert summary.missing + summary.broken == 40 - summary.frames
    assert not summary.complete
    for i, line in enumerate(lines_of(summary.lines)):
        assert whites(line) == [box_at(i)]


def test_video_cut_off_after_its_index_has_missing_frames(
    detector: Detector, tmp_path: Path
) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(60), codec="mjpeg", form="yuvj420p", time_base=Fraction(1, 25))
    fast = tmp_path / "fast.mp4"
    remux(clip, fast, options={"movflags": "faststart"})
    content = fast.read_bytes()
    fast.write_bytes(content[: len(content) // 2])
    summary = detect_video(detector, fast, tmp_path / "found")
    assert 20 < summary.frames < 35
    assert summary.frames + summary.missing + summary.broken == 60


def test_video_with_varying_intervals_misses_nothing(detector: Detector, tmp_path: Path) -> None:
    """Frames at long intervals now and then, as screen recorders write them; and sound."""
    for suffix in (".mkv", ".mp4"):
        clip = tmp_path / f"clip{suffix}"
        times = np.cumsum([40, 40, 1000, 40, 80, 2000, 40, 40, 40, 500]).tolist()
        write_clip(clip, walk(10), times=times, time_base=Fraction(1, 1000), sound="aac")
        summary = detect_video(detector, clip, tmp_path / "found")
        assert (summary.frames, summary.missing, summary.complete) == (10, 0, True)


def refused(detector: Detector, clip: Path, out: Path) -> str:
    with pytest.raises(DataError) as caught:
        detect_video(detector, clip, out)
    assert "\n" not in str(caught.value)
    assert no_thread_left()
    assert not out.exists() or not list(out.iterdir())
    return str(caught.value)


def test_video_that_cannot_be_read_is_an_error(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found"
    clip = tmp_path / "clip.mp4"
    assert refused(detector, clip, out) == f"{clip}: there is no such file or folder"
    clip.write_bytes(b"")
    assert refused(detector, clip, out) == f"{clip}: is empty"
    clip.write_text("dear diary, today I had no camera with me\n")
    assert "not a video of any known format (it begins with b'dear diary," in refused(
        detector, clip, out
    )
    write_clip(clip, walk(20))
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) - 1200])
    assert refused(detector, clip, out).endswith("its index is missing; it was cut off")
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("socket.mp4")
        assert refused(detector, Path("socket.mp4"), out).startswith("socket.mp4: cannot be read: ")
    folder = tmp_path / "folder.mp4"
    folder.mkdir()
    assert refused(detector, folder, out) == f"{folder}: is a folder, not a video"


def test_video_without_frames_is_an_error(detector: Detector, tmp_path: Path) -> None:
    out = tmp_path / "found"
    clip = tmp_path / "clip.mp4"
    with av.open(str(clip), "w") as file:
        stream = file.add_stream("aac", rate=48000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    assert refused(detector, clip, out) == f"{clip}: contains no video stream (streams: audio)"
    clip = tmp_path / "clip.mov"
    write_clip(clip, walk(4), codec="mjpeg", form="yuvj420p", time_base=Fraction(1, 25))
    damage(clip, range(4))
    assert refused(detector, clip, out) == (
        f"{clip}: contains no frame that can be read; 4 damaged ones"
    )


def test_video_is_not_overwritten(detector: Detector, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(3))
    before = clip.read_bytes()
    with pytest.raises(DataError, match="would be overwritten; give another --out"):
        detect_video(detector, clip, tmp_path / "." / "x" / "..")
    assert clip.read_bytes() == before


def test_video_stages_run_in_parallel(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(8))
    third = threading.Event()
    searches = 0
    search, write = detector.detect_prepared, VideoWriter.write

    def counted(images: Any, **thresholds: Any) -> Any:
        nonlocal searches
        searches += len(images)
        if searches == 3:
            third.set()
        return search(images, **thresholds)

    def waiting(self: Any, *frame: Any) -> None:
        assert third.wait(20)  # the first frame is not written before the third is searched
        write(self, *frame)

    detector.detect_prepared = counted  # type: ignore[method-assign]
    monkeypatch.setattr(VideoWriter, "write", waiting)
    assert detect_video(detector, clip, tmp_path / "found").frames == 8


@pytest.mark.parametrize(
    ("target", "where"),
    [
        (video_reading, "Frame"),
        (Detector, "prepare"),
        (Detector, "detect_prepared"),
        (VideoWriter, "encodable"),
        (VideoWriter, "write"),
        (None, "progress"),
    ],
)
def test_error_in_any_stage_ends_the_video(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any, where: str
) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(120), options={"g": "5"})
    calls = count(1)

    def failing(function: Any) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            if next(calls) == 80:
                raise RuntimeError(f"no {where}")
            return function(*given, **named)

        return run

    progress = None
    if target is None:
        progress = failing(lambda done, total: None)
    else:
        monkeypatch.setattr(target, where, failing(getattr(target, where)))
    with pytest.raises(RuntimeError, match=f"no {where}"):
        detect_video(detector, clip, tmp_path / "found", progress=progress)
    assert no_thread_left()
    # What was written until then can be read.
    assert files_in(tmp_path / "found") == ["clip.jsonl.part", "clip.mp4.part"]
    lines = lines_of(tmp_path / "found" / "clip.jsonl.part")
    assert [whites(line) for line in lines] == [[box_at(i)] for i in range(len(lines))]
    assert len(lines) > 40


def test_video_error_at_the_first_frame_leaves_no_files(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(5))
    monkeypatch.setattr(detector, "detect_prepared", lambda *given, **named: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        detect_video(detector, clip, tmp_path / "found")
    assert files_in(tmp_path / "found") == []
    assert no_thread_left()


def test_video_stop_leaves_complete_files(detector: Detector, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(300), sound="aac", options={"crf": "10"})
    stop = threading.Event()

    def at_ten(done: int, total: int | None) -> None:
        assert total == 300
        if done == 10:
            stop.set()

    summary = detect_video(detector, clip, tmp_path / "found", stop=stop, progress=at_ten)
    assert summary.stopped
    assert 10 <= summary.frames < 100
    shown, _ = read_clip(summary.video)
    lines = lines_of(summary.lines)
    assert len(shown) == len(lines) == summary.frames
    assert [whites(line) for line in lines] == [[box_at(i)] for i in range(len(lines))]


def test_video_ctrl_c_leaves_complete_files(detector: Detector, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(300))

    def interrupted(done: int, total: int | None) -> None:
        if done == 10:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        detect_video(detector, clip, tmp_path / "found", progress=interrupted)
    assert signal.getsignal(signal.SIGINT) is before
    shown, _ = read_clip(tmp_path / "found" / "clip.mp4")
    assert 10 <= len(shown) == len(lines_of(tmp_path / "found" / "clip.jsonl")) < 100
    assert no_thread_left()


def test_video_ctrl_c_before_the_first_frame_leaves_no_files(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(reader: Any, stop: Event) -> Iterator[Any]:
        _thread.interrupt_main()
        assert stop.wait(10)
        yield from ()

    monkeypatch.setattr(video_reading.VideoReader, "read", read)
    write_clip(tmp_path / "clip.mp4", walk(3))
    with pytest.raises(KeyboardInterrupt):
        detect_video(detector, tmp_path / "clip.mp4", tmp_path / "found")
    assert files_in(tmp_path / "found") == []
    assert no_thread_left()


def test_video_second_ctrl_c_aborts(detector: Detector, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(50))

    def interrupted(done: int, total: int | None) -> None:
        if done == 10:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        detect_video(detector, clip, tmp_path / "found", progress=interrupted)
    assert "clip.jsonl.part" in files_in(tmp_path / "found")
    assert not (tmp_path / "found" / "clip.mp4").exists()
    assert no_thread_left()


def test_camera_is_read_until_stopped(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ffmpeg's endless test image in the place of the camera, its clock long running."""
    opened = []

    def endless(library: Any, number: int) -> Any:
        opened.append(number)
        return library.open("testsrc2=size=96x64:rate=30,setpts=PTS+300000/TB", format="lavfi")

    monkeypatch.setattr(video_reading, "_open_camera", endless)
    stop = threading.Event()
    totals = set()

    def at_twenty(done: int, total: int | None) -> None:
        totals.add(total)
        if done == 20:
            stop.set()

    summary = detect_video(detector, "3", tmp_path, stop=stop, progress=at_twenty)
    assert opened == [3]
    assert totals == {None}
    assert (summary.source, summary.stopped, summary.sound) == ("camera 3", True, "")
    assert summary.video == tmp_path / "camera-3.mp4"
    lines = lines_of(tmp_path / "camera-3.jsonl")
    assert [line["time"] for line in lines] == [round(i / 30, 6) for i in range(len(lines))]
    assert {line["file"] for line in lines} == {"camera 3"}
    shown, _ = read_clip(summary.video)
    assert 20 <= len(shown) == summary.frames < 60
    reader = VideoReader("3")
    with pytest.raises(DataError, match="name a folder of such images with --calibrate"):
        reader.samples()
    reader.close()


def test_stream_is_read_like_a_camera(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, address = tmp_path / "clip.mp4", "rtsp://me:secret@camera:554/live?channel=1"
    write_clip(clip, walk(6), options={"crf": "10"})
    opened: list[Any] = []
    own = av.open

    def open_clip(source: str, *rest: Any, **options: Any) -> Any:
        if source == address:
            opened.append((options["timeout"], options["options"]))
            return own(str(clip))
        return own(source, *rest, **options)

    monkeypatch.setattr(av, "open", open_clip)
    summary = detect_video(detector, address, tmp_path)
    assert opened == [((10, 10), {"rtsp_transport": "tcp"})]
    assert summary.source == "rtsp://camera:554/live?channel=1"  # without the password
    assert summary.video == tmp_path / "rtsp-camera-554-live-channel-1.mp4"
    lines = lines_of(summary.lines)
    # The first frame only shows the size, as a camera has no beginning.
    assert [whites(line) for line in lines] == [[box_at(i)] for i in range(6 - len(lines), 6)]
    assert len(lines) >= 5

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(111, "Connection refused")

    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(DataError, match=r"camera:554/live\?channel=1: cannot be opened: Connec.*; "
                       "check the address and the password") as error:  # fmt: skip
        detect_video(detector, address, tmp_path)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("track", [False, True])
def test_video_in_tiles(detector: Detector, tmp_path: Path, track: bool) -> None:
    clip = tmp_path / "clip.mp4"
    # Four times the network's size: the square of 8 pixels is a quarter of a cell there.
    images = [black(256, 384, (128 + 8 * i, 64, 136 + 8 * i, 72)) for i in range(3)]
    write_clip(clip, images, options={"crf": "10"})
    whole = detect_video(detector, clip, tmp_path / "whole")
    assert whole.objects == {}
    tiles = detect_video(detector, clip, tmp_path / "tiles", tile=64, overlap=0, track=track)
    lines = lines_of(tiles.lines)
    assert [whites(line) for line in lines] == [
        [(128 + 8 * i, 64, 136 + 8 * i, 72)] for i in range(3)
    ]
    # As in images, a model that was trained on tiles runs on tiles.
    detector.info["tile"] = {"side": 64, "overlap": 0.0}
    assert detect_video(detector, clip, tmp_path / "own").objects["white"] == 3
    assert detect_video(detector, clip, tmp_path / "none", tile="none").objects == {}
    with pytest.raises(ConfigError, match="tile 7 is neither auto, none nor"):
        detect_video(detector, clip, tmp_path, tile=7)


def test_samples_are_spread_over_the_video(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, [black(64, 96) + np.uint8(2 * i) for i in range(100)], options={"g": "5"})
    reader = VideoReader(clip)
    levels = [int(one.mean()) for one in reader.samples(10)]
    reader.close()
    assert len(levels) == 10
    assert np.abs(np.array(levels) - np.arange(0, 200, 20)).max() < 15


def test_video_settings_out_of_range_are_errors(detector: Detector, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(3))
    for settings, said in (
        ({"every": 0}, "every 0 is under 1"),
        ({"batch_size": 0}, "batch_size 0 is under 1"),
        ({"score_threshold": 2.0}, "score_threshold"),
    ):
        with pytest.raises(ConfigError, match=said):
            detect_video(detector, clip, tmp_path / "found", **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize(
    ("module", "named"), [("av", "PyAV"), ("trackers", "trackers"), ("supervision", "supervision")]
)
def test_video_missing_extra_is_named(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, named: str
) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(3))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{named} is not .*'retinanet\[video\]'"):
        detect_video(detector, clip, tmp_path / "found", track=True)


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from white_finder import WhiteFinder
from retinanet.inference import Detector
from retinanet.video.detect import detect_video
from retinanet.model.checkpoint import Checkpoint
torch.set_num_threads(1)
made = Checkpoint(WhiteFinder(), ("white", "bright"), (7, 9), 64, 128, {})
detector = Detector(made, device="cpu", precision="float32")


def kill(done, total):
    if done >= 560:
        os.kill(os.getpid(), 9)


detect_video(detector, sys.argv[2], sys.argv[3], progress=kill)
"""


@pytest.mark.slow
def test_video_files_of_a_killed_process_can_be_read(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, walk(600), sound="aac", options={"crf": "10"})
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), str(clip)]
    ended = subprocess.run(
        [*command, str(tmp_path / "found")], stderr=subprocess.PIPE, text=True, check=False
    )
    assert ended.returncode == -9, ended.stderr
    text = (tmp_path / "found" / "clip.jsonl.part").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()[:560]]
    assert [whites(line) for line in lines] == [[box_at(i)] for i in range(560)]
    shown, seconds = read_clip(tmp_path / "found" / "clip.mp4.part")
    assert len(shown) >= 250  # up to the last key frame but one, 250 frames apart
    assert seconds == pytest.approx([i / 25 for i in range(len(shown))])


def test_video_memory_does_not_grow_with_its_length(detector: Detector, tmp_path: Path) -> None:
    """1,500 frames of 74 kB: the last 1,000 would be 74 MB if they were kept."""
    clip = tmp_path / "clip.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (128, 192, 3), np.uint8)
    images = (np.roll(noise, i, axis=1) for i in range(1500))
    write_clip(clip, images, sound="aac", options={"preset": "ultrafast", "crf": "40"})
    process = psutil.Process()
    held: list[float] = []

    def look(done: int, total: int | None) -> None:
        if done % 100 == 0:
            held.append(process.memory_info().rss / 2**20)

    detect_video(detector, clip, tmp_path / "found", progress=look, every=2)
    assert len(held) == 15
    assert max(held[10:]) - max(held[:5]) < 40, held
