"""The commands together, and what becomes of an error.

Exit codes: 0 it worked, 1 it failed (or something was found wrong, where a command says so), 2 the
command was not understood: an unknown option or setting. An error is one line on standard error;
``--debug`` shows where it arose.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from retinanet import __version__
from retinanet.cli import (
    bench,
    data,
    demo,
    detect,
    evaluate,
    export,
    paper,
    push,
    report,
    serve,
    train,
)
from retinanet.cli.console import STOPPED, TERMINATED, note, say
from retinanet.errors import ConfigError, RetinaNetError

# typer exports BadParameter alone; its parent is what every badly written command raises, whether
# typer carries its own click (since 0.26) or imports the separate one.
_UsageError: Any = typer.BadParameter.__base__


_SETTINGS: dict[str, Any] = {
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "rich",
    "context_settings": {"help_option_names": ["-h", "--help"]},
}

app = typer.Typer(
    name="retinanet",
    help="RetinaNet and Focal Loss: train, evaluate and use a detector on your own images.",
    **_SETTINGS,
)
data_app = typer.Typer(help="Look at labelled data: check, convert, show, anchors.", **_SETTINGS)

paper_app = typer.Typer(help="The paper's tables and figures: list, run.", **_SETTINGS)

report_app = typer.Typer(
    help="The paper's figures for your own models: loss-distribution, speed-accuracy.", **_SETTINGS
)

app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("detect")(detect.detect)
app.add_typer(data_app, name="data")
data_app.command("check")(data.check)
data_app.command("convert")(data.convert)
data_app.command("show")(data.show)
data_app.command("anchors")(data.anchors)
app.add_typer(report_app, name="report")
report_app.command("loss-distribution")(report.loss_distribution)
report_app.command("speed-accuracy")(report.speed_accuracy)
app.command("serve")(serve.serve)
app.command("push")(push.push)
app.command("export")(export.export)
app.command("bench")(bench.bench)
app.add_typer(paper_app, name="paper")
paper_app.command("list")(paper.list_experiments)
paper_app.command("run")(paper.run)
paper_app.command("work", hidden=True)(paper.work)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"retinanet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the whole traceback of an error; at any place."),
    ] = False,
) -> None:
    pass  # main() looks for --debug, so that it may stand behind the command too


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; None: this process's own.

    Returns:
        The exit code: 0, 1 (failed), 2 (bad usage), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    # Threads that spin while they wait for each other take the cores from all else that runs: on a
    # busy machine a search took over thirty times as long. OpenMP reads it when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [one for one in given if one != "--debug"]
    if given in ([], ["data"], ["paper"], ["report"]):
        given.append("--help")
    try:
        code = app(given, prog_name="retinanet", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except BrokenPipeError:
        # The reader of our output has gone, as in `| head`; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        note(f"error: {_one_line(error)}", style="red")
        return 2 if isinstance(error, ConfigError | _UsageError) else 1
    if code in (STOPPED, TERMINATED):
        goes_on = given[0] in ("train", "demo", "paper") or "ray" in given
        again = f"; to go on: {shlex.join(['retinanet', *given])}" if goes_on else ""
        note(f"stopped{again}")
    return code if isinstance(code, int) else 0


_OTHER_OPTIONS = {
    "conf": "--score-threshold",
    "conf-thres": "--score-threshold",
    "confidence": "--score-threshold",
    "confidence-threshold": "--score-threshold",
    "score-thr": "--score-threshold",
    "iou": "--nms-threshold",
    "iou-thres": "--nms-threshold",
    "nms": "--nms-threshold",
    "max-det": "--detections-per-image",
    "agnostic-nms": "--class-agnostic",
    "imgsz": "--image-size",
    "img-size": "--image-size",
    "size": "--image-size",
    "batch": "--batch-size",
    "output": "--out",
    "output-dir": "--out",
    "work-dir": "--out",
    "project": "--out",
    "name": "--out",
    "config": "--recipe",
    "config-file": "--recipe",
    "cfg": "--recipe",
    "weights": "--init",
    "pretrained": "--init",
    "vid-stride": "--every",
    "half": "--precision",
    "format": "--to",
}
"""What other tools call an option of ours."""


def _unknown_option(error: Any) -> str | None:
    """Suggest our name for an option that another tool has; None: no such option is known."""
    name = getattr(error, "option_name", None)
    if name is None or error.ctx is None:
        return None
    from retinanet.config import setting_of

    bare = name.lstrip("-").replace("_", "-")
    known = [option for param in error.ctx.command.params for option in param.opts]
    if _OTHER_OPTIONS.get(bare) in known:
        return f"no such option: {name}; did you mean {_OTHER_OPTIONS[bare]}?"
    setting = setting_of(bare.replace("-", "_"))
    if setting and "settings" in (param.name for param in error.ctx.command.params):
        return f"no such option: {name}; give the setting, without dashes: {setting}=VALUE"
    return None


def _one_line(error: Exception) -> str:
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        where = f' (see "{context.command_path} --help")' if context else ""
        return " ".join((_unknown_option(error) or error.format_message()).split()) + where
    if isinstance(error, RetinaNetError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        next_step = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            next_step = "; free space, then give the same command again"
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}{next_step}"
    first = next(iter(str(error).splitlines()), "")
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return f"out of memory: {first}; lower --batch-size, or raise train.accumulate"
    return f"{type(error).__name__}: {first} (unexpected; --debug shows where)"
