"""``retinanet serve``: a page and REST about one model or several."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import fields
from typing import Annotated, Any

import typer

from retinanet.cli.console import STOPPED, note, say
from retinanet.cli.settings import (
    Backend,
    ClassAgnostic,
    DetectionsPerImage,
    Device,
    NmsThreshold,
    Precision,
    ScoreThreshold,
    thresholds_of,
)

_KEY = "RETINANET_API_KEY"


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Run folders, checkpoints, exported files, torchvision/NAME or hf://OWNER/NAME; "
            "NAME=MODEL gives it another name. The first answers where none is named.",
        ),
    ],
    *,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0: all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: one that is free.")] = 8000,
    workers: Annotated[
        int, typer.Option(help="Threads that run the network, which share the cores of a CPU.")
    ] = 1,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images of one size that the network takes at once.",
            show_default="1 on a CPU, else 8",
        ),
    ] = None,
    max_wait_ms: Annotated[
        float | None, typer.Option(help="Wait so long for a batch to fill.", show_default="0")
    ] = None,
    queue: Annotated[
        int | None,
        typer.Option(help="Images in work and waiting; over it: 503.", show_default="128"),
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="Of a request.", show_default="33,554,432")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Of an image.", show_default="50,000,000")
    ] = None,
    max_images: Annotated[int | None, typer.Option(help="Of a request.", show_default="32")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds for a request, upload included.", show_default="60"),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help=f"Ask for it. In the environment, as {_KEY}, other users of this machine do not "
            "see it.",
            show_default="none",
        ),
    ] = None,
    score_threshold: ScoreThreshold = None,
    nms_threshold: NmsThreshold = None,
    class_agnostic: ClassAgnostic = False,
    detections_per_image: DetectionsPerImage = None,
    image_size: Annotated[
        int | None, typer.Option(help="Shorter side in pixels.", show_default="the model's")
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    backend: Backend = "auto",
    calibrate: Annotated[
        str | None, typer.Option(help="Images on which int8 is calibrated.")
    ] = None,
) -> None:
    """Serve models to browsers (a page) and programs (REST), until Ctrl-C.

    Requests that run are finished first; a second Ctrl-C ends at once.
    """
    from retinanet.serve import Settings, build_app, check_installed
    from retinanet.serve.models import judged, model_names

    check_installed()
    given: dict[str, Any] = {
        "workers": workers,
        "batch_size": batch_size,
        "max_wait_ms": max_wait_ms,
        "queue": queue,
        "max_bytes": max_bytes,
        "max_pixels": max_pixels,
        "max_images": max_images,
        "timeout": timeout,
        "api_key": os.environ.get(_KEY) if api_key is None else api_key,
    }
    assert given.keys() <= {one.name for one in fields(Settings)}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    named = model_names(models)

    from retinanet.inference import load
    from retinanet.serve.server import bind, serve, share_cores

    thresholds = thresholds_of(
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        class_agnostic=class_agnostic,
        detections_per_image=detections_per_image,
    )
    with bind(host, port) as listening:
        share_cores(settings.workers)
        detectors = {}
        for name, path in named.items():
            detectors[name] = load(
                path,
                device,
                precision=precision,
                backend=backend,
                calibrate=calibrate,
                image_size=image_size,
                **thresholds,
            )
            note(f"{name}: {detectors[name].network.description}")
        app = build_app(
            detectors, settings, judged={name: judged(path) for name, path in named.items()}
        )
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"
        if settings.api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
            note("whoever reaches this address may use it: --api-key asks for a key")
        ended = serve(
            app, listening, settings, ready=lambda: say(f"serving at {address}; Ctrl-C ends it")
        )
    if ended.at_once:
        # Threads are in the middle of a network: Python's own end would pull it from under them.
        note("stopped at once: requests were left")
        sys.stdout.flush()
        os._exit(STOPPED)
    if ended.signal == signal.SIGINT:
        raise typer.Exit(STOPPED)
