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

from retinanet.errors import WeightsError, import_extra

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
    """Parse ``hf://OWNER/NAME@REVISION``."""
    found = _NAME.fullmatch(_text(name))
    if found is None:
        raise WeightsError(
            f"{name} names no model: write hf://OWNER/NAME or hf://OWNER/NAME@REVISION"
        )
    return HubName(found["repository"], found["revision"])


def _text(name: str | Path) -> str:
    return name if isinstance(name, str) else name.as_posix()


def fetch_hub(name: str | Path, files: Sequence[str]) -> Path:
    """Download a checkpoint and return its folder in the cache, whose name is the commit."""
    repository, revision = parse_hub_name(name)
    hub = import_extra("huggingface_hub", "hub")
    options = {"revision": revision, "allow_patterns": list(files), "library_name": "retinanet"}
    try:
        folder = Path(hub.snapshot_download(repository, **options))
    except Exception as error:  # of the hub, the network or the disk: each has classes of its own
        raise_hub_error(error, f"hf://{repository}{f'@{revision}' if revision else ''}")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise WeightsError(
            f"hf://{repository} is no checkpoint of retinanet: it has no {', '.join(missing)}"
        )
    return folder


def hub_source(name: str | Path, folder: Path) -> str:
    """Return the name with the commit in the cache's `folder`, for reproducible downloads."""
    repository, revision = parse_hub_name(name)
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    return f"hf://{repository}@{commit}" if commit else f"hf://{repository}"


def raise_hub_error(
    error: Exception, name: str, *, pushing: bool = False, secret: str | None = None
) -> NoReturn:
    """Raise a WeightsError that explains an error of the hub in one line."""
    from huggingface_hub import constants, errors

    if type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "Error while uploading" alone says little
    hub = constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    token = "hf auth login, or HF_TOKEN"
    uncached = "" if pushing else "it is not in the cache, and "
    # httpx's errors are not OSErrors.
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    is_of_the_network = isinstance(error, ConnectionError | TimeoutError) or any(
        module.startswith("httpx") for module in modules
    )
    if isinstance(error, errors.GatedRepoError):
        why = f"accept its terms at {hub}/{name.removeprefix('hf://')}, then give a token ({token})"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = "there is no such revision"
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        why = f"it is not on {hub}, or is private and needs a token ({token})"
    elif isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        why = f"{uncached}HF_HUB_OFFLINE is set"
    elif status is None and (
        is_of_the_network or isinstance(error, errors.LocalEntryNotFoundError)
    ):
        why = f"{uncached}{hub} is not reached"
    else:
        lines = (line.strip() for line in str(error).splitlines())
        why = next((line for line in lines if line), type(error).__name__)
        why = f"{hub} responded {status}: {why}" if status else f"{type(error).__name__}: {why}"
    why = why.replace(secret, "***") if secret else why
    raise WeightsError(f"cannot {'push to' if pushing else 'load'} {name}: {why}") from None
