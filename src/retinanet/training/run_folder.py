"""The run folder: what was asked for, with what, and a line for each step."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from retinanet.config import Recipe, load_recipe, to_toml
from retinanet.errors import ConfigError
from retinanet.files import recover_folder, write_atomic

# What may change between a run and its resumption without changing the weights that come out.
_FREE_TO_CHANGE = ("data.workers", "train.trackers", "train.save_every")


class RunFolder:
    """The paths of a run, and the log.

    ``config.toml`` the resolved recipe; ``run.json`` versions, seed, data digest, device, git;
    ``log.jsonl`` a line a step; ``metrics.json`` what ``best/`` reached; ``last/`` and ``best/``
    checkpoints, ``last/`` with the state to resume from.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.last = self.path / "last"
        self.best = self.path / "best"
        self.config = self.path / "config.toml"
        self.info = self.path / "run.json"
        self.log = self.path / "log.jsonl"
        self.metrics = self.path / "metrics.json"

    def recover(self) -> None:
        """Finish the renames that a kill may have interrupted."""
        recover_folder(self.last)
        recover_folder(self.best)

    def check_same(self, recipe: Recipe, digest: str, rival: str | None = None) -> None:
        """Refuse to resume a run of another detector, with other settings or on other data.

        Args:
            recipe: the settings now.
            digest: of the data now.
            rival: which other detector is trained now; None: RetinaNet.

        Raises:
            ConfigError: names the first setting that differs, with both values.
        """
        stored = json.loads(self.info.read_text("utf-8"))
        if stored.get("rival") != rival:
            raise ConfigError(
                f"{self.path} holds a run of {stored.get('rival') or 'RetinaNet'}, and now it is "
                f"{rival or 'RetinaNet'}; give another --out"
            )
        before = _flat(load_recipe(self.config))
        now = _flat(recipe)
        for name, value in now.items():
            if name not in _FREE_TO_CHANGE and before.get(name) != value:
                raise ConfigError(
                    f"{self.path} holds a run with {name} = {before.get(name)!r}, and now it is "
                    f"{value!r}; give the same settings to resume it, or another --out"
                )
        if stored.get("data_digest") != digest:
            raise ConfigError(
                f"{self.path} holds a run on other data, or the data has changed since; "
                "give another --out to start anew"
            )

    def begin(self, recipe: Recipe, info: Mapping[str, Any]) -> None:
        """Write what a new run was asked to do.

        Raises:
            ConfigError: the folder holds other things than a run.
        """
        # A run killed before its first state leaves these, and drafts: starting over is right.
        own = {self.config.name, self.info.name, self.log.name, "tensorboard"}
        held = [one.name for one in self.path.iterdir()] if self.path.is_dir() else []
        strangers = sorted(one for one in held if one not in own and not one.startswith("."))
        if strangers:
            raise ConfigError(
                f"{self.path} holds {strangers[0]!r} but no run to resume; give an empty --out"
            )
        write_atomic(self.info, json.dumps(dict(info), indent=1) + "\n")
        write_atomic(self.config, to_toml(recipe))
        write_atomic(self.log, "")

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line to the log."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")

    def cut_log(self, step: int) -> None:
        """Drop the lines after `step`, and a half-written last one: they will come again."""
        kept = []
        for line in self.log.read_text("utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue
        write_atomic(self.log, "".join(line + "\n" for line in kept))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions, device and source revision of this process."""
    names = ("retinanet", "torch", "torchvision", "accelerate", "hotcoco", "numpy", "pillow")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "versions": {one: metadata.version(one) for one in names},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "git": _git_revision(),
    }


def _git_revision() -> str | None:
    """The revision of the source tree that this package runs from; None for an installed one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _flat(recipe: Recipe) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for section, settings in recipe.model_dump(mode="json").items():
        if isinstance(settings, dict):
            values |= {f"{section}.{key}": value for key, value in settings.items()}
    return values
