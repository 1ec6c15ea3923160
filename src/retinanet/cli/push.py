"""``retinanet push``: push a run to the Hugging Face hub, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retinanet.cli.console import note, print_json, say
from retinanet.cli.settings import Json


def push(
    run: Annotated[Path, typer.Argument(help="A run or checkpoint folder.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.")],
    *,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The run's training data, for counts and example images in the card.",
        ),
    ] = None,
    dry_run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the files into this new folder, without pushing."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Create a private repository.")
    ] = False,
    message: Annotated[
        str | None, typer.Option(help="Commit message.", show_default="A trained RetinaNet")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="License of the weights by its name on the hub: apache-2.0, mit, ..."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Id of the data set on the hub.")] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="Access token; HF_TOKEN or 'hf auth login' keep it out of the shell history.",
            show_default="that of huggingface_hub",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device for the example images: auto, cpu, cuda.")
    ] = "auto",
    json: Json = False,
) -> None:
    """Push a trained model to the Hugging Face hub; it then loads as hf://OWNER/NAME.

    Weights, settings, metrics and a model card are pushed in one commit, without paths of this
    machine, and with images only for --data. See the files first with --dry-run.
    """
    from retinanet.hub.push import prepare
    from retinanet.hub.push import push as push_run

    if dry_run is not None:
        files = prepare(
            run, repository, dry_run, data=data, license=license, dataset=dataset, device=device
        )
        if json:
            print_json({"folder": dry_run, "files": files})
        else:
            say(f"{dry_run} has {', '.join(files)}; nothing was pushed")
        return
    done = push_run(
        run,
        repository,
        private=private,
        message=message,
        token=token,
        data=data,
        license=license,
        dataset=dataset,
        device=device,
        progress=note,
    )
    if json:
        print_json({"name": done.name, "url": done.url, "commit": done.commit, "files": done.files})
    else:
        say(f"{done.name} is at {done.url}")
