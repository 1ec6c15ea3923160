"""The run folder: settings, machine, log, and the saved state from which a run resumes.

Tensors are stored as safetensors and the rest as JSON: opening a run executes no code.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retinanet.config import Recipe, load_recipe, setting_names, to_toml
from retinanet.errors import ConfigError, DataError, WeightsError
from retinanet.files import readable_folder, write_atomic
from retinanet.training.step import Progress

# These may change between a run and its resumption: the resulting weights do not depend on them.
# They do on train.accumulate, with which a run that is out of memory resumes: by rounding, and more
# where a micro-batch has its own normalizer or statistics of batch norm (model.norm=trained).
_MAY_CHANGE = ("data.workers", "train.trackers", "train.save_every", "train.accumulate")

_TENSORS = "training.safetensors"
_NUMBERS = "training.json"


class RunFolder:
    """The paths of a run, its log, and its lock.

    ``config.toml`` the resolved recipe; ``run.json`` versions, seed, data digest, device;
    ``log.jsonl`` a line per step; ``metrics.json`` the validation of ``best/``; ``last/`` and
    ``best/`` checkpoints, ``last/`` with the state to resume from; ``unreadable.jsonl`` the images
    that were skipped.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.last = self.path / "last"
        self.best = self.path / "best"
        self.config = self.path / "config.toml"
        self.info = self.path / "run.json"
        self.log = self.path / "log.jsonl"
        self.metrics = self.path / "metrics.json"
        self.unreadable = self.path / "unreadable.jsonl"

    def check(self) -> None:
        """Check that a run can be written or resumed here, before the data are read.

        Raises:
            ConfigError: it is a file, has other files, or cannot be created.
        """
        if not self.last.is_dir():
            self._check_empty()
        folders = (self.path, *self.path.parents)
        nearest = next(folder for folder in folders if folder.exists() or folder.is_symlink())
        try:
            with tempfile.TemporaryDirectory(prefix=".", dir=nearest):
                pass
        except OSError as error:
            raise ConfigError(
                f"--out {self.path} cannot be written: {nearest}: {error.strerror}; give a folder "
                "that can be created"
            ) from None

    def lock(self) -> AbstractContextManager[None]:
        """Keep other trainings out of the folder."""
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        return folder_lock(self.path, "training")

    def stored_recipe(self) -> Recipe | None:
        """Return the settings of the run to resume; None: there is no run."""
        if not (readable_folder(self.last).is_dir() and self.config.is_file()):
            return None
        return load_recipe(self.config)

    def stored_data(self) -> Path | None:
        """Return the data of the run, where they are files; None: there is no run."""
        if not self.info.is_file():
            return None
        info = self._read_info()
        if info.get("format") == "memory":
            raise ConfigError(
                f"{self.path} was trained on data in memory, which no command can read: resume or "
                f"extend it in Python, rn.train(data, out={str(self.path)!r}, more_epochs=..)"
            )
        data = Path(str(info.get("data", "")))
        if not data.exists():
            raise ConfigError(
                f"{self.path} was trained on {data}, which does not exist; give DATA, the folder "
                "or file where these data are now"
            )
        return data

    def recipe_to_extend(self, recipe: Recipe) -> Recipe:
        """Return the settings of the finished run, which those that `recipe` states must equal."""
        stored = self.stored_recipe()
        if stored is None:
            raise ConfigError(f"{self.path} contains no run to extend; give the --out of one")
        stated = {name: recipe.value(name) for name in setting_names() if recipe.states(name)}
        free = {name: value for name, value in stated.items() if name in _MAY_CHANGE}
        for name, value in stated.items():
            if name not in free and stored.value(name) != value:
                raise ConfigError(
                    f"{self.path} was trained with {name} = {stored.value(name)!r}, not {value!r}, "
                    f"and an extension keeps the settings: omit it, or give --init {self.path} and "
                    "another --out"
                )
        return stored.override(free)

    def _read_info(self) -> dict[str, Any]:
        try:
            stored = json.loads(self.info.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.info} cannot be read ({error}); give another --out") from None
        if not isinstance(stored, dict):
            raise ConfigError(f"{self.info} is not an object of JSON; give another --out")
        return stored

    def update_info(self, values: Mapping[str, Any]) -> None:
        """Add entries to ``run.json``."""
        stored = self._read_info()
        write_atomic(self.info, json.dumps(stored | dict(values), indent=1) + "\n")

    def check_same(self, recipe: Recipe, digest: str, rival: str | None = None) -> None:
        """Reject a run of another detector, with other settings or on other data."""
        stored = self._read_info()
        if stored.get("rival") != rival:
            raise ConfigError(
                f"{self.path} contains a run of {stored.get('rival') or 'RetinaNet'}, and now it "
                f"is {rival or 'RetinaNet'}; give another --out"
            )
        before = load_recipe(self.config)
        # train.init first: where it differs, so does the network that follows it.
        for name in sorted(setting_names(), key=lambda name: name != "train.init"):
            if name not in _MAY_CHANGE and before.value(name) != recipe.value(name):
                raise ConfigError(
                    f"{self.path} contains a run with {name} = {before.value(name)!r}, and now it "
                    f"is {recipe.value(name)!r}; give the same settings to resume it, or another "
                    "--out"
                )
        if stored.get("data_digest") != digest:
            raise ConfigError(
                f"{self.path} contains a run on other data, or the data has changed since; "
                "give another --out to train anew"
            )

    def start(self, recipe: Recipe, info: Mapping[str, Any]) -> None:
        """Write the settings and the description of a new run."""
        write_atomic(self.info, json.dumps(dict(info), indent=1) + "\n")
        write_atomic(self.config, to_toml(recipe))
        write_atomic(self.log, "")

    def _check_empty(self) -> None:
        # A run killed before its first state leaves these, and drafts: starting over is right.
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; give a folder as --out")
        own = {path.name for path in (self.config, self.info, self.log, self.unreadable)}
        present = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        others = sorted(
            name for name in present if name not in own | {"tensorboard"} and name[0] != "."
        )
        if others:
            raise ConfigError(
                f"{self.path} is not empty and contains no run to resume: found {others[0]!r}; "
                "give an empty --out"
            )

    def truncate_log(self, step: int) -> None:
        """Drop the lines after `step` and an incomplete last one: the steps are done again."""
        kept = [line for line in read_log(self.log) if line.get("step", step + 1) <= step]
        write_atomic(self.log, "".join(json.dumps(line) + "\n" for line in kept))

    def unreadable_sizes(self) -> dict[str, int]:
        """Sizes of the unreadable images by path, as recorded.

        With these the data digest stays the same after the images are repaired.
        """
        if not self.unreadable.is_file():
            return {}
        # The first record counts: the run was started with that size.
        return {line["file"]: line["size"] for line in reversed(read_log(self.unreadable))}


@contextmanager
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes of the kind `what` out of a folder."""
    lock = FileLock(folder / f".{what}.lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"{folder} is in use: another {what} writes to it; wait for it or stop it, "
            "or give another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def read_log(file: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a ``log.jsonl``; a truncated last line is skipped."""
    try:
        text = Path(file).read_text("utf-8")
    except OSError as error:
        raise DataError(f"log {file} cannot be read: {error.strerror}") from None
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions and device of this process."""
    packages = ("retinanet", "torch", "torchvision", "accelerate", "hotcoco", "numpy", "pillow")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "versions": {package: metadata.version(package) for package in packages},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


# --- the state to resume from ---------------------------------------------------------------------


def save_state(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extras: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Write the training state into an existing folder."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"extra.{name}": value for name, value in extras.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if value is not None:
                tensors[f"optimizer.{index}.{name}"] = value
    # safetensors rejects views, and two names of the same memory.
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()},
        folder / _TENSORS,
    )
    text = {"progress": asdict(progress), "numbers": dict(numbers)}
    (folder / _NUMBERS).write_text(json.dumps(text, indent=1), "utf-8")


def load_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Tensor], dict[str, Any]]:
    """Restore a saved state into `model`, `optimizer` and the random generators."""
    try:
        tensors = load_file(folder / _TENSORS)
        stored = json.loads((folder / _NUMBERS).read_text("utf-8"))
        progress = Progress.from_dict(stored["progress"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder}: the training state cannot be read ({error}); "
            "delete the run folder to start again, or use its best/ with --init"
        ) from None
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "extra": {}, "random": {}, "optimizer": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    try:
        model.load_state_dict(parts["model"])
    except RuntimeError as error:
        raise WeightsError(f"{folder}: the state is of another network: {error}") from None
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in parts["optimizer"].items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _match_strides(optimizer)
    torch.set_rng_state(parts["random"]["cpu"])
    if torch.cuda.is_available() and "cuda" in parts["random"]:
        torch.cuda.set_rng_state(parts["random"]["cuda"])
    return progress, parts["extra"], stored["numbers"]


def _match_strides(optimizer: torch.optim.Optimizer) -> None:
    """Give momentum and moments the strides of their weights, which the file does not store.

    Fused kernels traverse both in memory order: on a GPU torch rejects strides that differ, on a
    CPU it mixes up the elements.
    """
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                like = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
                values[name] = like.copy_(value).detach()


def read_progress(folder: Path) -> Progress | None:
    """Read the progress saved in a ``last/`` folder; None where there is none."""
    try:
        stored = json.loads((folder / _NUMBERS).read_text("utf-8"))
        return Progress.from_dict(stored["progress"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder / _NUMBERS} cannot be read ({error}); delete the run folder to start again"
        ) from None
