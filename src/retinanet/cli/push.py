"""``retinanet push``: a run on the Hugging Face hub, with a model card that the run fills in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retinanet.cli.console import note, print_json, say


def push(
    run: Annotated[Path, typer.Argument(help="A run or checkpoint folder.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where to on the hub.")],
    *,
    data: Annotated[
        Path | None,
        typer.Option(
            help="What the run was trained on: its counts and example images go into the card.",
        ),
    ] = None,
    dry_run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write what would be pushed into this new folder."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository so that only you see it.")
    ] = False,
    message: Annotated[
        str | None, typer.Option(help="Of the commit.", show_default="A trained RetinaNet")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Of the weights, as the hub names it: apache-2.0, mit, ...")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Id of the data on the hub.")] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="Of the hub; HF_TOKEN or 'hf auth login' keep it out of the shell's history.",
            show_default="huggingface_hub's own",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="For the example images: auto, cpu, cuda.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Put a trained model on the Hugging Face hub; others then load it as hf://OWNER/NAME.

    The weights, the settings, the metrics and a model card go in one commit. Paths of this machine
    do not; images do only with --data. Look at it first with --dry-run.
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
            say(f"{', '.join(files)} are in {dry_run}; nothing was pushed")
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
        tell=note,
    )
    if json:
        print_json({"name": done.name, "url": done.url, "commit": done.commit, "files": done.files})
    else:
        say(f"{done.name} is at {done.url}")
