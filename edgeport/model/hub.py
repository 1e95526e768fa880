"""Download a hub repository: the only place that asks the hub, and only for an id that the user names."""

from __future__ import annotations

import os
from pathlib import Path

from edgeport.errors import BadInputError, first_line
from edgeport.model.huggingface import quiet
from edgeport.packages import Progress


def download(repository: str, *, allow_pickle: bool = False, progress: Progress | None = None) -> Path:
    """The local folder of a hub repository: from the hub's own cache, or downloaded (HF_HUB_OFFLINE forbids it).

    Raises:
        BadInputError: it can't be reached, does not exist, or is not in the cache while offline.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    offline = os.environ.get("EDGEPORT_OFFLINE", "0") not in ("", "0")
    if progress is not None and not offline:
        progress(f"looking up {repository} on the hub")
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *(["*.bin"] if allow_pickle else [])]
    try:
        with quiet():
            return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=offline))
    except RepositoryNotFoundError as error:
        raise BadInputError(
            f"The hub has no repository {repository!r}, or it is private.", next_step="Check the name, or log in."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise BadInputError(
            f"The hub repository {repository!r} is not in the local cache and can't be downloaded.",
            where=first_line(error),
            next_step="Check the network and HF_HUB_OFFLINE, or give a local folder; `edgeport zoo` needs no hub.",
        ) from error
