"""``retinanet serve``: serve models to browsers and programs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from retinanet.cli.console import STOPPED, note, say
from retinanet.cli.settings import ClassOptions, DetectorOptions, ThresholdOptions, option

_KEY = "RETINANET_API_KEY"


@dataclass(frozen=True)
class ServiceOptions:
    """Limits and threads of the service; what is not given is the default of its settings."""

    host: str = option("Address to listen on; 0.0.0.0 for all interfaces.", "127.0.0.1")
    port: int = option("Port; 0 picks a free one.", 8000)
    workers: int | None = option(
        "Threads that run the network; they share the CPU cores.",
        shown="one per core, at most 4, with torch on a CPU; else 1",
    )
    batch_size: int | None = option(
        "Maximum images per batch, all of one size.", shown="1 on a CPU, else 8"
    )
    queue: int | None = option("Maximum waiting images.", shown="128")
    max_bytes: int | None = option("Maximum request size in bytes.", shown="33,554,432")
    max_pixels: int | None = option("Maximum pixels per image.", shown="50,000,000")
    timeout: float | None = option("Maximum seconds per request, upload included.", shown="60")
    api_key: str | None = option(
        f"Key that requests must send. Prefer the environment variable {_KEY}: other users of "
        "this machine can read a command line.",
        shown="none",
    )

    def given(self) -> dict[str, Any]:
        """Return the given settings of the service, and the API key of the environment."""
        key = os.environ.get(_KEY) if self.api_key is None else self.api_key
        values = {**vars(self), "api_key": key, "host": None, "port": None}
        return {name: value for name, value in values.items() if value is not None}


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Run folders, checkpoints, exported files, coco, torchvision/NAME or "
            "hf://OWNER/NAME; NAME=MODEL sets the model's name. The first is the default model.",
        ),
    ],
    *,
    service: ServiceOptions,
    selection: ClassOptions,
    thresholds: ThresholdOptions,
    detector: DetectorOptions,
) -> None:
    """Serve models to browsers (a page) and programs (REST) until Ctrl-C.

    Running requests are finished first; a second Ctrl-C exits at once.
    """
    from retinanet.inference import load
    from retinanet.inference.tiles import whole_images_warning
    from retinanet.serve import Settings, build_app, check_installed
    from retinanet.serve.models import model_metrics, model_names
    from retinanet.serve.server import bind
    from retinanet.serve.server import serve as serve_app

    check_installed()
    host = service.host
    paths = model_names(models)
    settings = Settings(**service.given())
    with bind(service.host, service.port) as listener:
        detectors = {}
        for name, path in paths.items():
            options = {**vars(detector), **selection.given(), **thresholds.given()}
            detectors[name] = load(path, **options)
            note(f"{name}: {detectors[name].network.description}")
            if (warning := whole_images_warning(detectors[name].info)) is not None:
                note(f"{name}: {warning}")
        metrics = {name: model_metrics(path) for name, path in paths.items()}
        app = build_app(detectors, settings, metrics=metrics)
        if settings.api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
            note(
                "warning: no API key set; anyone who can reach this address can use the service; "
                "set one with --api-key"
            )
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        ready = f"serving at {url}; Ctrl-C to stop"
        is_finished = serve_app(app, listener, settings, on_ready=lambda: say(ready))
    if not is_finished:
        note("stopped without finishing running requests")
        sys.stdout.flush()
        os._exit(STOPPED)  # Python's own exit would free memory that network threads still use
