"""The command line: all commands, and the conversion of exceptions to messages and exit codes.

Exit codes: 0 success, 1 failure (or faults found, where a command says so), 2 bad usage (an unknown
option or setting), 130 and 143 stopped by Ctrl-C and SIGTERM. An error is one line on standard
error; ``--debug`` prints the traceback.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from retinanet import __version__
from retinanet.cli import paper, report
from retinanet.cli.bench import bench
from retinanet.cli.console import STOPPED, TERMINATED, note, say
from retinanet.cli.data import anchors, check, convert, show
from retinanet.cli.demo import demo
from retinanet.cli.detect import detect
from retinanet.cli.evaluate import evaluate
from retinanet.cli.export import export
from retinanet.cli.push import push
from retinanet.cli.serve import serve
from retinanet.cli.settings import expand_groups
from retinanet.cli.suspects import suspects
from retinanet.cli.train import train
from retinanet.cli.tune import tune
from retinanet.errors import ConfigError, RetinaNetError

# Base class of all usage errors, of typer's own click (since 0.26) or of the separate package.
_UsageError: Any = typer.BadParameter.__base__


_COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "": {
        "demo": demo,
        "train": train,
        "tune": tune,
        "evaluate": evaluate,
        "detect": detect,
        "serve": serve,
        "push": push,
        "export": export,
        "bench": bench,
    },
    "data": {
        "check": check,
        "convert": convert,
        "show": show,
        "anchors": anchors,
        "suspects": suspects,
    },
    "report": {
        "loss-distribution": report.loss_distribution,
        "speed-accuracy": report.speed_accuracy,
    },
    "paper": {"list": paper.list_experiments, "run": paper.run, "work": paper.work},
}
_HIDDEN = ("work",)
_HELP = {
    "": "RetinaNet and Focal Loss: train, evaluate and use a detector on your own images.",
    "data": "Labelled data: check, convert, show, anchors, suspects.",
    "report": "The paper's figures for your own models: loss-distribution, speed-accuracy.",
    "paper": "The paper's tables and figures: list, run.",
}


def _build_app() -> typer.Typer:
    apps = {
        group: typer.Typer(
            name=group or "retinanet",
            help=text,
            pretty_exceptions_enable=False,
            rich_markup_mode="rich",
            context_settings={"help_option_names": ["-h", "--help"]},
        )
        for group, text in _HELP.items()
    }
    for group, commands in _COMMANDS.items():
        for name, function in commands.items():
            apps[group].command(name, hidden=name in _HIDDEN)(expand_groups(function))
        if group:
            apps[""].add_typer(apps[group])
    return apps[""]


app = _build_app()


def _version(wanted: bool) -> None:
    if wanted:
        say(f"retinanet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of an error.")
    ] = False,
) -> None:
    pass  # main() handles --debug, so that it works after the command too


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    # Spinning threads take the cores from other processes: on a busy machine detection took over
    # thirty times as long. OpenMP reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if " ".join(words) in _COMMANDS:  # a group alone
        words.append("--help")
    try:
        code = app(words, prog_name="retinanet", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except BrokenPipeError:
        # The pipe is closed, as by `| head`; Python would raise the error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        note(f"error: {describe_error(error)}", style="red")
        return 2 if isinstance(error, ConfigError | _UsageError) else 1
    if code in (STOPPED, TERMINATED):
        resumable = words[0] in ("train", "tune", "demo", "paper") or "ray" in words
        command = f"; to resume: {shlex.join(['retinanet', *words])}" if resumable else ""
        note(f"stopped{command}")
    return code if isinstance(code, int) else 0


_OTHER_OPTIONS = {
    "--score-threshold": "conf conf-thres confidence confidence-threshold score-thr",
    "--nms-threshold": "iou iou-thres nms",
    "--detections-per-image": "max-det",
    "--class-agnostic": "agnostic-nms",
    "--image-size": "imgsz img-size size",
    "--batch-size": "batch",
    "--out": "output output-dir work-dir project name",
    "--recipe": "config config-file cfg",
    "--init": "weights pretrained",
    "--every": "vid-stride",
    "--precision": "half",
    "--to": "format",
}
"""Names of our options in other tools."""


def _unknown_option(error: Any) -> str | None:
    """Suggest our name for an option that another tool has; None: no such option is known."""
    name = getattr(error, "option_name", None)
    if name is None or error.ctx is None:
        return None
    from retinanet.config import setting_of

    bare = name.lstrip("-").replace("_", "-")
    known = [option for param in error.ctx.command.params for option in param.opts]
    for option, names in _OTHER_OPTIONS.items():
        if bare in names.split() and option in known:
            return f"no such option: {name}; did you mean {option}?"
    setting = setting_of(bare.replace("-", "_"))
    if setting and "settings" in (param.name for param in error.ctx.command.params):
        return f"no such option: {name}; give the setting, without dashes: {setting}=VALUE"
    return None


def describe_error(error: Exception) -> str:
    """Describe an error in a line, with what to do next."""
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
