"""``retinanet detect`` of clips and cameras."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retinanet.cli import main
from retinanet.video import detect as video
from retinanet.video import reading as video_reading

from .conftest import Cli

av: Any = __import__("av")

QUICK = ("--device=cpu", "--precision=float32")


def write_clip(file: Path, frames: int = 6, codec: str = "libx264") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    with av.open(str(file), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width = 64, 96
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, i, 1), format="rgb24")
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file


def frames_of(file: Path) -> int:
    with av.open(str(file)) as clip:
        return sum(1 for _ in clip.decode(video=0))


def lines_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_a_clip(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    out = tmp_path / "found"
    before = signal.getsignal(signal.SIGINT)
    ended = cli("detect", tiny_run, clip, "--out", out, "--every=2", "--batch-size=2", *QUICK)
    assert ended.code == 0, ended.err
    assert signal.getsignal(signal.SIGINT) is before
    assert f"{clip}: 6 frames (3 searched), " in ended.out
    assert f"in {out / 'clip.mp4'} and {out / 'clip.jsonl'}" in ended.out
    assert "torch on cpu, float32" in ended.err
    assert frames_of(out / "clip.mp4") == len(lines_of(out / "clip.jsonl")) == 6


def test_what_is_printed_as_json(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    out = tmp_path / "found"
    ended = cli("detect", tiny_run, clip, "--out", out, "--track", "--json", *QUICK)
    assert ended.code == 0
    [video] = ended.json["videos"]
    assert (video["file"], video["video"]) == (str(clip), str(out / "clip.mp4"))
    assert (video["frames"], video["searched"], video["broken"]) == (6, 6, 0)
    assert isinstance(video["tracks"], int)
    assert ended.json["failures"] == []
    assert "track" in json.dumps(lines_of(out / "clip.jsonl")) or not video["objects"]


def test_clips_of_the_same_name(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    for name in ("a/clip.mp4", "a/clip.mkv", "b/clip.mp4"):
        write_clip(tmp_path / name, 3)
    out = tmp_path / "found"
    ended = cli("detect", tiny_run, tmp_path / "a" / "*.m*4", tmp_path / "a" / "clip.mkv",
                tmp_path / "b" / "clip.mp4", "--out", out, "--json", *QUICK)  # fmt: skip
    assert ended.code == 0, ended.err
    assert sorted(one.name for one in out.glob("*.mp4")) == [
        "clip-2.mp4",
        "clip-3.mp4",
        "clip.mp4",
    ]
    assert [one["file"] for one in ended.json["videos"]] == [
        str(tmp_path / name) for name in ("a/clip.mp4", "a/clip.mkv", "b/clip.mp4")
    ]
    files = {lines_of(one)[0]["file"] for one in out.glob("*.jsonl")}
    assert len(files) == 3


def test_one_bad_clip_stops_no_other(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    good, bad = write_clip(tmp_path / "good.mp4"), tmp_path / "bad.mp4"
    bad.write_text("no video")
    out = tmp_path / "found"
    ended = cli("detect", tiny_run, bad, good, "--out", out, *QUICK)
    assert ended.code == 1
    assert "1 clip could not be read:" in ended.err
    assert f"{bad}: not a video of any known format" in ended.err
    assert frames_of(out / "good.mp4") == 6
    ended = cli("detect", tiny_run, bad, good, "--out", out, "--json", *QUICK)
    assert ended.code == 1
    assert [one["file"] for one in ended.json["failures"]] == [str(bad)]


def test_one_clip_is_not_written_over_another(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    clips = [write_clip(tmp_path / name) for name in ("a.mkv", "a.mp4")]
    before = clips[1].read_bytes()
    ended = cli("detect", tiny_run, *clips, "--out", tmp_path, *QUICK)
    assert ended.code == 1
    [said] = ended.err.splitlines()
    assert said.startswith(
        f"error: {clips[1]}: would be written over by what is found in {clips[0]}"
    )
    assert clips[1].read_bytes() == before


def test_ctrl_c_before_the_first_frame(
    cli: Cli, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = video._places

    def press(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return places(*given)

    monkeypatch.setattr(video, "_places", press)
    clip = write_clip(tmp_path / "clip.mp4")
    ended = cli("detect", tiny_run, clip, "--out", tmp_path / "found", *QUICK)
    assert ended.code == 130
    assert "no frame was read" not in ended.err
    assert not list((tmp_path / "found").iterdir())


FAILED = {
    "a text": (b"no video", "error: {clip}: not a video of any known format"),
    "nothing": (b"", "error: {clip}: is empty"),
    "no file": (None, "error: {clip}: there is no such file or folder"),
}


@pytest.mark.parametrize("name", FAILED)
def test_a_clip_that_cannot_be_read(cli: Cli, tiny_run: Path, tmp_path: Path, name: str) -> None:
    content, said = FAILED[name]
    clip = tmp_path / "clip.mp4"
    if content is not None:
        clip.write_bytes(content)
    ended = cli("detect", tiny_run, clip, "--out", tmp_path / "found", *QUICK)
    assert ended.code == 1
    assert said.format(clip=clip) in ended.err.splitlines()[-1]
    assert len(ended.err.splitlines()) == 2  # what runs the network, and why it did not


def test_broken_frames_are_a_note(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mov", codec="mjpeg")
    with av.open(str(clip)) as opened:
        places = [(one.pos, one.size) for one in opened.demux(video=0) if one.size]
    content = bytearray(clip.read_bytes())
    for pos, size in places[2:4]:
        content[pos : pos + size] = b"\xff" * size
    clip.write_bytes(content)
    ended = cli("detect", tiny_run, clip, "--out", tmp_path / "found", *QUICK)
    assert ended.code == 0
    assert f"{clip}: 2 broken frames left out" in ended.err
    assert f"{clip}: 4 frames, " in ended.out


def test_clips_and_images_are_not_mixed(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    ended = cli("detect", tiny_run, clip, tmp_path / "a.jpg", "--out", tmp_path / "found", *QUICK)
    assert ended.code == 2
    assert f"clips and images in one call ({tmp_path / 'a.jpg'} is no clip)" in ended.err


def test_a_camera_that_is_not_there(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    ended = cli("detect", tiny_run, "97", "--out", tmp_path / "found", *QUICK)
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith("error: camera 97: cannot be opened: ")


def test_int8_is_calibrated_on_the_clip(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    clip = write_clip(tmp_path / "clip.mp4")
    seen: list[Any] = []

    def load(*given: Any, **settings: Any) -> Any:
        seen.append(settings["calibrate"])
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retinanet.inference.load", load)
        cli("detect", tiny_run, clip, "--precision=int8", "--out", tmp_path / "found")
    assert {one.shape for one in seen[0]} == {(64, 96, 3)}


def test_a_missing_extra(
    cli: Cli, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    ended = cli("detect", tiny_run, clip, "--out", tmp_path / "found")
    assert ended.code == 1
    [line] = ended.err.splitlines()
    assert line.endswith(
        "PyAV is not installed; it comes with an extra: pip install 'retinanet[video]'"
    )


def test_ctrl_c_ends_a_camera(
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def endless(library: Any, number: int) -> Any:
        return library.open("testsrc2=size=96x64:rate=30", format="lavfi")

    monkeypatch.setattr(video_reading, "_open_camera", endless)
    before = signal.getsignal(signal.SIGINT)
    part = tmp_path / "camera-0.jsonl.part"

    over = threading.Event()

    def press() -> None:
        while not over.wait(0.05):
            if part.exists() and part.read_text("utf-8").count("\n") >= 5:
                os.kill(os.getpid(), signal.SIGINT)
                return

    pressing = threading.Thread(target=press)
    pressing.start()
    try:
        code = main(["detect", str(tiny_run), "0", "--out", str(tmp_path), "--json", *QUICK])
    finally:
        over.set()
        pressing.join()
    printed = capsys.readouterr()
    assert code == 130
    assert "stopped" in printed.err
    [video] = json.loads(printed.out)["videos"]
    assert video["stopped"]
    assert frames_of(tmp_path / "camera-0.mp4") == video["frames"] >= 5
    assert len(lines_of(tmp_path / "camera-0.jsonl")) == video["frames"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own(tiny_run: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 3000)
    out = tmp_path / "found"
    running = subprocess.Popen(
        [sys.executable, "-m", "retinanet", "detect", str(tiny_run), str(clip), str(clip),
         "--out", str(out), *QUICK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would its child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    part = out / "clip.jsonl.part"
    for _ in range(1200):
        if part.exists() and part.read_text("utf-8").count("\n") >= 5:
            break
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert said.splitlines()[-1] == "stopped"
    assert 5 <= frames_of(out / "clip.mp4") == len(lines_of(out / "clip.jsonl")) < 3000
    assert not list(out.glob("*.part"))
