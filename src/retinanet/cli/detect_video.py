"""``retinanet detect`` of clips and cameras."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from retinanet.cli.console import err, note, print_json, say, table
from retinanet.interrupts import stop_on_signal

if TYPE_CHECKING:
    from retinanet.video.detect import VideoSummary


def detect_videos(
    model: str,
    sources: list[str],
    out: Path,
    *,
    every: int,
    track: bool,
    batch_size: int,
    draw_threshold: float,
    calibrate: str | None,
    device: str,
    json: bool,
    precision: str,
    backend: str,
    image_size: int | None,
    **thresholds: Any,
) -> None:
    """Search each of `sources`; one that cannot be read is named at the end.

    Args:
        model: as of ``retinanet detect``, and so are the options that follow.
        sources: clips, globs of clips, cameras' numbers.

    Raises:
        ConfigError: images are among the sources.
        DataError: there is one clip, and it cannot be read.
        typer.Exit: 1 if a clip or a part of it could not be read, 130 after Ctrl-C, 143 after
            SIGTERM.
    """
    from retinanet.errors import DataError
    from retinanet.inference import load
    from retinanet.video.detect import detect_video
    from retinanet.video.reading import import_av

    clips = _clips(sources)
    names = _names(clips)
    _spare(clips, names, out)
    import_av()  # a missing one is said before the model is loaded
    calibration: Any = calibrate
    if precision == "int8" and calibrate is None:
        calibration = _samples(clips)
    detector = load(
        model,
        device,
        calibrate=calibration,
        precision=precision,
        backend=backend,
        image_size=image_size,
        **thresholds,
    )
    if not json:
        note(detector.network.description)
    done: list[VideoSummary] = []
    failures: list[tuple[str, str]] = []
    with stop_on_signal() as stop:
        for clip, name in zip(clips, names, strict=True):
            if stop.is_set():
                break
            try:
                with _progress(Path(clip).name) as show:
                    summary = detect_video(
                        detector,
                        clip,
                        out,
                        name=name,
                        every=every,
                        track=track,
                        batch_size=batch_size,
                        draw_threshold=draw_threshold,
                        stop=stop,
                        progress=show,
                    )
            except DataError as error:
                if stop.is_set():
                    break  # before a frame was written, and nothing is the matter with the clip
                if len(clips) == 1:
                    raise
                failures.append((clip, str(error)))
                continue
            done.append(summary)
            if not json:
                _tell(summary)
    if json:
        print_json(
            {
                "out": out,
                "network": detector.network.description,
                "videos": [one.to_dict() for one in done],
                "failures": [{"file": clip, "reason": reason} for clip, reason in failures],
            }
        )
    if failures:
        many = "clip" if len(failures) == 1 else "clips"
        note(f"{len(failures)} {many} could not be read:", style="red")
        for _, reason in failures:
            note(f"  {reason}")
    if stop.is_set():
        raise typer.Exit(stop.exit_code)
    if failures or not all(summary.complete for summary in done):
        raise typer.Exit(1)


def _clips(sources: list[str]) -> list[str]:
    """The clips and cameras that `sources` stand for, each once."""
    import glob

    from retinanet.errors import ConfigError, DataError
    from retinanet.inference.manifest import OutputFilter
    from retinanet.inference.sources import is_video

    outputs = OutputFilter()
    found: dict[str, None] = {}
    for source in sources:
        matches = [] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
        inputs = [match for match in matches or [source] if not outputs.is_output(match)]
        if not inputs:
            raise DataError(
                f"{source}: is an output of an earlier detection; copy it out of that folder to "
                "use it as an input"
            )
        found.update(dict.fromkeys(inputs))
    for clip in found:
        if not is_video(clip):
            raise ConfigError(
                f"clips and images in one call ({clip} is no clip); search them in two calls"
            )
    return list(found)


def _names(clips: list[str]) -> list[str | None]:
    """What the files of each are called, where two of them would be called the same."""
    taken: set[str] = set()
    names: list[str | None] = []
    for clip in clips:
        if clip.isdecimal():
            names.append(None)
            continue
        stem = name = Path(clip).stem
        number = 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _spare(clips: list[str], names: list[str | None], out: Path) -> None:
    """See that what is written for one clip is not another clip of the call.

    Raises:
        DataError: it is.
    """
    from retinanet.errors import DataError

    places = {Path(clip).resolve(): clip for clip in clips if not clip.isdecimal()}
    for clip, name in zip(clips, names, strict=True):
        other = places.get((out / f"{name}.mp4").resolve())
        if name is not None and other not in (None, clip):
            raise DataError(
                f"{other}: would be overwritten by the output of {clip}; give another --out "
                "than its own folder"
            )


def _samples(clips: list[str]) -> list[Any]:
    """Images to calibrate on, of the first clip that can be read."""
    from retinanet.errors import DataError
    from retinanet.video.reading import VideoReader

    for place, clip in enumerate(clips):
        try:
            reader = VideoReader(clip)
        except DataError:
            if place == len(clips) - 1:
                raise
            continue
        try:
            return list(reader.samples())
        finally:
            reader.close()
    return []


def _tell(one: VideoSummary) -> None:
    searched = "" if one.searched == one.frames else f" ({one.searched} searched)"
    if one.objects:
        table("Found", ["class", "boxes"], one.objects.items())
    tracks = "" if one.tracks is None else f", {one.tracks} tracks"
    boxes = sum(one.objects.values())
    say(
        f"{one.source}: {one.frames} frames{searched}, {boxes} boxes{tracks}, "
        f"{one.frames_a_second:.1f} frames/s, in {one.video} and {one.lines}"
    )
    if one.sound and set(one.sound.split("; ")) != {"copied"}:
        note(f"{one.source}: sound {one.sound}")
    for count, problem in (
        (one.broken, "{} broken {frames} left out"),
        (one.missing, "{} {frames} missing: shorter, or with larger gaps, than the file states"),
        (one.lost_sound, "{} broken packets of sound left out"),
    ):
        if count:
            text = problem.format(count, frames="frame" if count == 1 else "frames")
            note(f"{one.source}: {text}", style="yellow")
    if one.cut:
        note(f"{one.source}: reading ended early: {one.cut}", style="yellow")


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar with frames/s and the time left; of a camera the frames and frames/s alone."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.1f} frames/s")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Speed(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(name, total=None)

        def update(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        yield update
