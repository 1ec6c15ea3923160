"""``retinanet push``: push a run to the Hugging Face hub, with a model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from retinanet.cli.console import note, print_json, say
from retinanet.cli.settings import Json, option


@dataclass(frozen=True)
class CardOptions:
    """The model card."""

    data: Path | None = option("The run's training data, for example images in the card.")
    license: str | None = option(
        "License of the weights by its name on the hub: apache-2.0, mit, ..."
    )
    dataset: str | None = option("Id of the data set on the hub.")
    device: str = option("Device for the example images: auto, cpu, cuda.", "auto")


@dataclass(frozen=True)
class PushOptions:
    """The push."""

    private: bool = option("Create a private repository.", False)
    message: str | None = option("Commit message.", shown="A trained RetinaNet")
    token: str | None = option(
        "Access token; HF_TOKEN or 'hf auth login' keep it out of the shell history.",
        shown="that of huggingface_hub",
    )


def push(
    run: Annotated[Path, typer.Argument(help="A run or checkpoint folder.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.")],
    *,
    card: CardOptions,
    dry_run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the files into this new folder, without pushing."),
    ] = None,
    options: PushOptions,
    json: Json = False,
) -> None:
    """Push a trained model to the Hugging Face hub; it then loads as hf://OWNER/NAME.

    Weights, settings, metrics and a model card are pushed in one commit, without paths of this
    machine, and with images only for --data. See the files first with --dry-run.
    """
    from retinanet.hub.push import prepare
    from retinanet.hub.push import push as push_run

    if dry_run is not None:
        files = prepare(run, repository, dry_run, **vars(card))
        if json:
            print_json({"folder": dry_run, "files": files})
        else:
            say(f"{dry_run} has {', '.join(files)}; nothing was pushed")
        return
    done = push_run(run, repository, progress=note, **vars(card), **vars(options))
    if json:
        print_json(done._asdict())
    else:
        say(f"{done.name} is at {done.url}")
