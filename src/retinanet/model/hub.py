"""Checkpoints on the Hugging Face Hub: ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION``.

huggingface_hub downloads and caches them, and reads the token (``hf auth login`` or ``HF_TOKEN``),
the address of the hub (``HF_ENDPOINT``) and offline mode (``HF_HUB_OFFLINE=1``). Of a repository
only the two files of a checkpoint are downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from retinanet.errors import MissingExtraError, WeightsError

# Path replaces "//" by "/".
_NAME = re.compile(r"hf:/{1,2}(?P<repository>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>[^@\s]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubName(NamedTuple):
    """A parsed name; `revision` is a branch, a tag or a commit; None: the newest."""

    repository: str
    revision: str | None


def is_hub_name(name: str | Path) -> bool:
    """Return True if `name` is on the hub rather than on this disk."""
    return _text(name).startswith("hf:/")


def parse_hub_name(name: str | Path) -> HubName:
    """Parse ``hf://OWNER/NAME@REVISION``.

    Raises:
        WeightsError: the name is not of that form.
    """
    found = _NAME.fullmatch(_text(name))
    if found is None:
        raise WeightsError(
            f"{name} names no model: write hf://OWNER/NAME or hf://OWNER/NAME@REVISION"
        )
    return HubName(found["repository"], found["revision"])


def _text(name: str | Path) -> str:
    return name if isinstance(name, str) else name.as_posix()


def fetch_hub(name: str | Path, files: Sequence[str]) -> Path:
    """Download a checkpoint and return its folder in the cache, whose name is the commit.

    Args:
        name: ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION``.
        files: names of the files of a checkpoint.

    Raises:
        WeightsError: there is no such model or revision, or access is denied; it is not a
            checkpoint; or it is not in the cache and the hub cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    repository, revision = parse_hub_name(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub") from None
    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=list(files), library_name="retinanet"
            )
        )
    except Exception as error:  # of the hub, the network or the disk: each has classes of its own
        raise_hub_error(error, f"hf://{repository}", revision)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise WeightsError(
            f"hf://{repository} holds no {' and no '.join(missing)}: it is no checkpoint of "
            "retinanet's"
        )
    return folder


def hub_source(name: str | Path, folder: Path) -> str:
    """Return the name with the commit in the cache's `folder`, for reproducible downloads."""
    repository, revision = parse_hub_name(name)
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    return f"hf://{repository}@{commit}" if commit else f"hf://{repository}"


def raise_hub_error(
    error: Exception,
    name: str,
    revision: str | None = None,
    *,
    pushing: bool = False,
    secret: str | None = None,
) -> NoReturn:
    """Raise a WeightsError that explains an error of the hub in one line.

    Args:
        error: raised by huggingface_hub.
        name: of the model, ``hf://OWNER/NAME``.
        revision: of the model.
        pushing: True for an upload.
        secret: a token to remove from the message.

    Raises:
        WeightsError: always.
    """
    from huggingface_hub import constants, errors

    if type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "Error while uploading" alone says little
    hub = constants.ENDPOINT
    cannot = "cannot be pushed to" if pushing else "cannot be had"
    status = getattr(getattr(error, "response", None), "status_code", None)
    detail = _first(error) if not secret else _first(error).replace(secret, "***")
    if isinstance(error, errors.HFValidationError):
        why = f"is no name on the hub: {detail}"
    elif isinstance(error, errors.GatedRepoError):
        why = f"is gated: accept its terms at {hub}/{name.removeprefix('hf://')}, then give a token"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = f"has no revision {revision!r}"
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        token = "your token (hf auth login, or HF_TOKEN)"
        if pushing:
            why = f"cannot be pushed to: {hub} does not know {token}"
        else:
            why = f"is not on {hub}, or is private and {token} does not reach it"
    elif status == 403:
        why = f"may not be changed with this token: {detail}"
    elif isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        why = "is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"
        why = "cannot be pushed to: HF_HUB_OFFLINE is set" if pushing else why
    elif status is not None:
        why = f"{cannot}: {hub} answered {status}: {detail}"
    elif isinstance(error, errors.LocalEntryNotFoundError) or _is_of_the_network(error):
        why = f"{cannot}: {hub} is not reached{'' if pushing else ', and it is not in the cache'}"
    else:
        why = f"{cannot}: {type(error).__name__}: {detail}"
    raise WeightsError(f"{name} {why}") from None


def _is_of_the_network(error: Exception) -> bool:
    """Return True if the connection failed: httpx's errors are not OSErrors."""
    return any(
        kind.__module__.startswith("httpx") or kind in (ConnectionError, TimeoutError)
        for kind in type(error).__mro__
    )


def _first(error: Exception) -> str:
    """Return the first line of a message that is not empty."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
