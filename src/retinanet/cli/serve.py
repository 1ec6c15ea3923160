"""``retinanet serve``: serve models to browsers and programs."""

from __future__ import annotations

import os
import sys
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


def _option(help_text: str, default: str) -> Any:
    return typer.Option(help=help_text, show_default=default)


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Run folders, checkpoints, exported files, torchvision/NAME or hf://OWNER/NAME; "
            "NAME=MODEL sets the model's name. The first is the default model.",
        ),
    ],
    *,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8000,
    workers: Annotated[
        int, typer.Option(help="Threads that run the network; they share the CPU cores.")
    ] = 1,
    batch_size: Annotated[
        int | None, _option("Maximum images per batch, all of one size.", "1 on a CPU, else 8")
    ] = None,
    max_wait_ms: Annotated[
        float | None, _option("Milliseconds to wait for a batch to fill.", "0")
    ] = None,
    queue: Annotated[
        int | None, _option("Maximum images waiting or in work; others get a 503.", "128")
    ] = None,
    max_bytes: Annotated[
        int | None, _option("Maximum request size in bytes.", "33,554,432")
    ] = None,
    max_pixels: Annotated[int | None, _option("Maximum pixels per image.", "50,000,000")] = None,
    max_images: Annotated[int | None, _option("Maximum images per request.", "32")] = None,
    timeout: Annotated[
        float | None, _option("Maximum seconds per request, upload included.", "60")
    ] = None,
    api_key: Annotated[
        str | None,
        _option(
            f"Key that requests must send. Prefer the environment variable {_KEY}: other users of "
            "this machine can read a command line.",
            "none",
        ),
    ] = None,
    score_threshold: ScoreThreshold = None,
    nms_threshold: NmsThreshold = None,
    class_agnostic: ClassAgnostic = False,
    detections_per_image: DetectionsPerImage = None,
    image_size: Annotated[
        int | None, _option("Shorter side of the network input in pixels.", "the model's")
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    backend: Backend = "auto",
    calibrate: Annotated[
        str | None, typer.Option(help="Images for the calibration of int8.")
    ] = None,
) -> None:
    """Serve models to browsers (a page) and programs (REST) until Ctrl-C.

    Running requests are finished first; a second Ctrl-C exits at once.
    """
    from retinanet.serve import Settings, check_installed
    from retinanet.serve.models import model_names

    check_installed()
    limits = {
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
    settings = Settings(**{name: value for name, value in limits.items() if value is not None})  # type: ignore[arg-type]
    thresholds = thresholds_of(
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        class_agnostic=class_agnostic,
        detections_per_image=detections_per_image,
    )
    load_options = {
        "device": device,
        "precision": precision,
        "backend": backend,
        "calibrate": calibrate,
        "image_size": image_size,
        **thresholds,
    }
    _run(model_names(models), settings, (host, port), load_options)


def _run(
    paths: dict[str, str], settings: Any, address: tuple[str, int], load_options: dict[str, Any]
) -> None:
    """Load the models and serve them; `address` is (host, port)."""
    from retinanet.inference import load
    from retinanet.serve import build_app
    from retinanet.serve.models import model_metrics
    from retinanet.serve.server import bind, serve, share_cores

    host = address[0]
    with bind(*address) as listener:
        share_cores(settings.workers)
        detectors = {}
        for name, path in paths.items():
            detectors[name] = load(path, **load_options)
            note(f"{name}: {detectors[name].network.description}")
        metrics = {name: model_metrics(path) for name, path in paths.items()}
        app = build_app(detectors, settings, metrics=metrics)
        if settings.api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
            note(
                "warning: no API key set; anyone who can reach this address can use the service; "
                "set one with --api-key"
            )
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        ready = f"serving at {url}; Ctrl-C to stop"
        is_finished = serve(app, listener, settings, on_ready=lambda: say(ready))
    if not is_finished:
        note("stopped without finishing running requests")
        sys.stdout.flush()
        os._exit(STOPPED)  # Python's own exit would free memory that network threads still use
