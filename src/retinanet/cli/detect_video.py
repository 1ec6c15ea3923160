"""``retinanet detect`` of videos and cameras."""

from __future__ import annotations

import glob
import itertools
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from retinanet.cli.console import count, note, note_failures, print_json, progress, say, table
from retinanet.interrupts import stop_on_signal

if TYPE_CHECKING:
    from retinanet.video.detect import VideoSummary


def detect_videos(
    model: str,
    sources: list[str],
    out: Path,
    options: dict[str, Any],
    settings: dict[str, Any],
    *,
    json: bool,
) -> bool:
    """Detect in each of `sources` and print the summaries."""
    from retinanet.errors import DataError
    from retinanet.inference import load
    from retinanet.video.detect import detect_video
    from retinanet.video.reading import import_av

    videos = _name_videos(_list_videos(sources), out)
    import_av()  # a missing package is reported before the model is loaded
    if options["precision"] == "int8" and options["calibrate"] is None:
        options["calibrate"] = _samples(list(videos))
    detector = load(model, **options)
    if not json:
        note(detector.network.description)
    summaries: list[VideoSummary] = []
    failures: dict[str, str] = {}
    with stop_on_signal() as stop:
        for video, name in videos.items():
            if stop.is_set():
                break
            try:
                with progress(Path(video).name) as update:
                    summary = detect_video(
                        detector, video, out, name=name, stop=stop, progress=update, **settings
                    )
            except DataError as error:
                if stop.is_set():
                    break  # before the first frame; the video itself may be readable
                if len(videos) == 1:
                    raise
                failures[video] = str(error)
                continue
            summaries.append(summary)
            if not json:
                _print_summary(summary)
    if json:
        print_json(
            {
                "out": out,
                "network": detector.network.description,
                "videos": [summary.to_dict() for summary in summaries],
                "failures": [
                    {"file": video, "reason": reason} for video, reason in failures.items()
                ],
            }
        )
    if failures:
        note_failures(list(failures.values()), "video")
    if stop.is_set():
        raise typer.Exit(stop.exit_code)
    return not failures and all(summary.complete for summary in summaries)


def _list_videos(sources: list[str]) -> list[str]:
    """Expand globs and drop repetitions."""
    from retinanet.errors import ConfigError, DataError
    from retinanet.inference.manifest import OutputFilter
    from retinanet.inference.sources import is_video

    outputs = OutputFilter()
    videos: list[str] = []
    for source in sources:
        matches = [] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
        inputs = [match for match in matches or [source] if not outputs.is_output(match)]
        if not inputs:
            raise DataError(
                f"{source}: is an output of an earlier detection; copy it out of that folder to "
                "use it as an input"
            )
        videos += inputs
    for video in videos:
        if not is_video(video):
            raise ConfigError(f"videos and images in one call: {video} is no video; use two calls")
    return list(dict.fromkeys(videos))


def _name_videos(videos: list[str], out: Path) -> dict[str, str | None]:
    """Choose a unique name of the output files per video; None for a camera or stream."""
    from retinanet.errors import DataError
    from retinanet.inference.sources import is_stream

    files = [video for video in videos if not (video.isdecimal() or is_stream(video))]
    inputs = {Path(video).resolve(): video for video in files}
    names: dict[str, str | None] = dict.fromkeys(videos)
    taken: set[str] = set()
    for video in files:
        stem = Path(video).stem
        candidates = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        names[video] = name = next(c for c in candidates if c.casefold() not in taken)
        taken.add(name.casefold())
        other = inputs.get((out / f"{name}.mp4").resolve())
        if other not in (None, video):
            raise DataError(
                f"{other}: would be overwritten by the output of {video}; use another --out"
            )
    return names


def _samples(videos: list[str]) -> list[Any]:
    """Return calibration images of the first video that can be read."""
    from retinanet.errors import DataError
    from retinanet.video.reading import VideoReader

    for video in videos[:-1]:
        with suppress(DataError), closing(VideoReader(video)) as reader:
            return reader.samples()
    with closing(VideoReader(videos[-1])) as reader:
        return reader.samples()


def _print_summary(summary: VideoSummary) -> None:
    source = summary.source
    skipping = "" if summary.searched == summary.frames else f" ({summary.searched} processed)"
    if summary.objects:
        table("Detections", ["class", "boxes"], summary.objects.items())
    tracks = "" if summary.tracks is None else f", {summary.tracks} tracks"
    boxes = sum(summary.objects.values())
    say(
        f"{source}: {count(summary.frames, 'frame')}{skipping}, {boxes} boxes{tracks}, "
        f"{summary.frames_a_second:.1f} frames/s, in {summary.video} and {summary.lines}"
    )
    if summary.sound and set(summary.sound.split("; ")) != {"copied"}:
        note(f"{source}: sound {summary.sound}")
    for number, noun, problem in (
        (summary.broken, "broken frame", "skipped"),
        (summary.missing, "frame", "missing: shorter, or with larger gaps, than the file states"),
        (summary.lost_sound, "broken sound packet", "skipped"),
    ):
        if number:
            note(f"{source}: {count(number, noun)} {problem}", style="yellow")
    if summary.cut:
        note(f"{source}: reading ended early: {summary.cut}", style="yellow")
