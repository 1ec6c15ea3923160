"""``retinanet detect`` of clips and cameras."""

from __future__ import annotations

import json
import os
import signal
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clips
from retinanet.cli import main
from retinanet.video import detect as video
from retinanet.video import reading as video_reading

from .conftest import Cli

QUICK = ("--device=cpu", "--precision=float32")


def write_clip(file: Path, frames: int = 6, codec: str = "libx264") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    images = [np.roll(noise, i, 1) for i in range(frames)]
    form = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    clips.write_clip(file, images, codec=codec, form=form, time_base=Fraction(1, 25))
    return file


def num_frames(file: Path) -> int:
    return len(clips.read_clip(file)[0])


def read_lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip.mp4")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "found"


def test_video_is_annotated(cli: Cli, tiny_run: Path, clip: Path, out: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    ended = cli("detect", tiny_run, clip, "--out", out, "--every=2", "--batch-size=2",
                "--tile=40", "--overlap=.1", *QUICK)  # fmt: skip
    assert ended.code == 0, ended.err
    assert signal.getsignal(signal.SIGINT) is before
    assert f"{clip}: 6 frames (3 processed), " in ended.out
    assert f"in {out / 'clip.mp4'} and {out / 'clip.jsonl'}" in ended.out
    assert "torch on cpu, float32" in ended.err
    assert num_frames(out / "clip.mp4") == len(read_lines(out / "clip.jsonl")) == 6


def test_video_summary_as_json(cli: Cli, tiny_run: Path, clip: Path, out: Path) -> None:
    ended = cli("detect", tiny_run, clip, "--out", out, "--track", "--json", *QUICK)
    assert ended.code == 0
    [video] = ended.json["videos"]
    assert (video["file"], video["video"]) == (str(clip), str(out / "clip.mp4"))
    assert (video["frames"], video["searched"], video["broken"]) == (6, 6, 0)
    assert isinstance(video["tracks"], int)
    assert ended.json["failures"] == []
    assert "track" in json.dumps(read_lines(out / "clip.jsonl")) or not video["objects"]


def test_videos_of_the_same_name_are_numbered(
    cli: Cli, tiny_run: Path, tmp_path: Path, out: Path
) -> None:
    names = ("a/clip.mp4", "a/clip.mkv", "b/clip.mp4")
    for name in names:
        write_clip(tmp_path / name, 3)
    ended = cli("detect", tiny_run, tmp_path / "a" / "*.m*4", tmp_path / "a" / "clip.mkv",
                tmp_path / "b" / "clip.mp4", "--out", out, "--json", *QUICK)  # fmt: skip
    assert ended.code == 0, ended.err
    written = sorted(file.name for file in out.glob("*.mp4"))
    assert written == ["clip-2.mp4", "clip-3.mp4", "clip.mp4"]
    assert [video["file"] for video in ended.json["videos"]] == [
        str(tmp_path / name) for name in names
    ]
    assert len({read_lines(file)[0]["file"] for file in out.glob("*.jsonl")}) == 3


def test_unreadable_video_is_listed_and_the_others_processed(
    cli: Cli, tiny_run: Path, clip: Path, tmp_path: Path, out: Path
) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    ended = cli("detect", tiny_run, bad, clip, "--out", out, "--json", *QUICK)
    assert ended.code == 1
    assert "1 video could not be read:" in ended.err
    assert f"{bad}: not a video of any known format" in ended.err
    assert [failure["file"] for failure in ended.json["failures"]] == [str(bad)]
    assert num_frames(out / "clip.mp4") == 6


def test_video_is_not_overwritten_by_another(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    clips = [write_clip(tmp_path / name) for name in ("a.mkv", "a.mp4")]
    before = clips[1].read_bytes()
    ended = cli("detect", tiny_run, *clips, "--out", tmp_path, *QUICK)
    assert ended.code == 1
    [line] = ended.err.splitlines()
    assert line.startswith(f"error: {clips[1]}: would be overwritten by the output of {clips[0]}")
    assert clips[1].read_bytes() == before


def test_ctrl_c_before_the_first_frame(
    cli: Cli, tiny_run: Path, clip: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(video.VideoReader):
        def __init__(self, source: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            super().__init__(source)

    monkeypatch.setattr(video, "VideoReader", Interrupted)
    ended = cli("detect", tiny_run, clip, "--out", out, *QUICK)
    assert ended.code == 130
    assert "no frame was read" not in ended.err
    assert [file.name for file in out.iterdir()] == [".retinanet-outputs"]


def test_broken_frames_are_counted_with_exit_code_1(
    cli: Cli, tiny_run: Path, tmp_path: Path, out: Path
) -> None:
    clip = write_clip(tmp_path / "clip.mov", codec="mjpeg")
    clips.damage(clip, (2, 3))
    ended = cli("detect", tiny_run, clip, "--out", out, *QUICK)
    assert ended.code == 1
    assert f"{clip}: 2 broken frames skipped" in ended.err
    assert f"{clip}: 4 frames, " in ended.out
    assert num_frames(out / "clip.mp4") == 4


def test_truncated_video_is_kept_with_exit_code_1(
    cli: Cli, tiny_run: Path, tmp_path: Path, out: Path
) -> None:
    clip = write_clip(tmp_path / "clip.mkv", 40, codec="mjpeg")
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2])
    ended = cli("detect", tiny_run, clip, "--out", out, "--json", *QUICK)
    assert ended.code == 1
    [summary] = ended.json["videos"]
    assert summary["frames"] + summary["broken"] + summary["missing"] == 40
    assert 10 < summary["frames"] < 25
    assert num_frames(out / "clip.mp4") == summary["frames"]


def test_outputs_are_not_inputs_of_the_next_call(
    cli: Cli, tiny_run: Path, clip: Path, tmp_path: Path, out: Path
) -> None:
    for _ in range(2):
        ended = cli("detect", tiny_run, tmp_path / "**/*.mp4", "--out", out, "--json", *QUICK)
        assert ended.code == 0, ended.err
        assert [summary["file"] for summary in ended.json["videos"]] == [str(clip)]
    ended = cli("detect", tiny_run, out / "clip.mp4", "--out", tmp_path / "other", *QUICK)
    assert ended.code == 1
    assert "is an output of an earlier detection" in ended.err


def test_missing_camera_is_an_error(cli: Cli, tiny_run: Path, out: Path) -> None:
    ended = cli("detect", tiny_run, "97", "--out", out, *QUICK)
    assert ended.code == 1
    _, error = ended.err.splitlines()  # the network, and the error
    assert error.startswith("error: camera 97: cannot be opened: ")
    assert "is it plugged in" in error


def test_int8_is_calibrated_on_the_first_readable_video(
    cli: Cli, tiny_run: Path, clip: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrations: list[Any] = []

    def load(*_: Any, **options: Any) -> Any:
        calibrations.append(options["calibrate"])
        raise KeyboardInterrupt

    monkeypatch.setattr("retinanet.inference.load", load)
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    cli("detect", tiny_run, bad, clip, "--precision=int8", "--out", out)
    assert {image.shape for image in calibrations[0]} == {(64, 96, 3)}
    ended = cli("detect", tiny_run, bad, "--precision=int8", "--out", out)
    assert f"{bad}: not a video of any known format" in ended.err


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_a_camera(
    number: signal.Signals,
    expected: int,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def endless(library: Any, number: int) -> Any:
        return library.open("testsrc2=size=96x64:rate=30", format="lavfi")

    monkeypatch.setattr(video_reading, "_open_camera", endless)
    before = signal.getsignal(number)
    part = tmp_path / "camera-0.jsonl.part"

    over = threading.Event()

    def press() -> None:
        while not over.wait(0.05):
            if part.exists() and part.read_text("utf-8").count("\n") >= 5:
                os.kill(os.getpid(), number)
                return

    pressing = threading.Thread(target=press)
    pressing.start()
    try:
        code = main(["detect", str(tiny_run), "0", "--out", str(tmp_path), "--json", *QUICK])
    finally:
        over.set()
        pressing.join()
    printed = capsys.readouterr()
    assert code == expected, printed.err
    assert "stopped" in printed.err
    [video] = json.loads(printed.out)["videos"]
    assert video["stopped"]
    assert num_frames(tmp_path / "camera-0.mp4") == video["frames"] >= 5
    assert len(read_lines(tmp_path / "camera-0.jsonl")) == video["frames"]
    assert signal.getsignal(number) is before
