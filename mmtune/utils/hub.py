"""Hugging Face hub: local path or hub id, and whether a repository can be reached."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from mmtune.utils.errors import UserError
from mmtune.utils.files import nearest_path, path_hint

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""`owner/name`."""
FILE_ENDINGS = (".yaml", ".yml", ".json", ".jsonl", ".jinja", ".safetensors", ".bin", ".pt", ".gguf")
"""Names with these endings are files, not repositories."""
TIMEOUT_S = 5.0
"""Timeout of a request to the hub, after which the hub counts as unreachable."""


def is_local_name(name: str) -> bool:
    """Whether a name that does not exist as a path can only be a misspelt local path, so that the hub is not requested.

    `owner/name` may be either. It counts as a local path if a folder `owner` or a path of almost this name exists, unless the
    hub's cache contains a repository of this name.
    """
    if not HUB_ID.fullmatch(name) or name.lower().endswith(FILE_ENDINGS):
        return True
    return (Path(name).parent.is_dir() or nearest_path(Path(name)) is not None) and cached_snapshot(name) is None


def missing_path_message(name: str, what: str = "directory") -> str:
    """The message about a local path that does not exist or is a file, with the nearest existing path."""
    if name.startswith("builtin:"):
        return f"{name} is a built-in model; expected the path of a {what}"
    if Path(name).is_file():
        of_recipe = (
            "; the run of a recipe is the directory output_dir" if "run" in what and name.endswith((".yaml", ".yml")) else ""
        )
        return f"{name} is a file; expected a directory{'' if what == 'directory' else f' of a {what}'}{of_recipe}"
    hub = ""
    if HUB_ID.fullmatch(name) and not name.lower().endswith(FILE_ENDINGS) and Path(name).parent.is_dir():
        hub = f"; it counts as a local path, not as a hub id, because the folder {Path(name).parent} exists"
    return f"no such {what}: {name}{hub}{path_hint(Path(name))}"


def cached_snapshot(repository: str, file: str = "config.json", kind: str = "model") -> Path | None:
    """The folder of a repository in the hub's local cache; None where it does not hold `file`."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file, repo_type=kind)
    return Path(cached).parent if isinstance(cached, str) else None


def locate_checkpoint(name: str, what: str = "directory") -> str:
    """Where transformers should load a checkpoint from.

    A hub id is looked up with one request of `TIMEOUT_S` at most: without a network, transformers would try again for half a
    minute for every file. Where the hub cannot be reached, the local cache serves.

    Args:
        name: a directory or a hub id.
        what: what the path should be, for the message about a local path.

    Returns:
        The directory, the hub id, or the cached copy of its files.

    Raises:
        UserError: the hub has no such repository, or cannot be reached and the cache does not contain it.
    """
    if Path(name).is_dir():
        return name
    if is_local_name(name):
        raise UserError(missing_path_message(name, what))
    reason = unreachable_reason(name)
    if reason is None:
        return name
    from huggingface_hub import constants, is_offline_mode

    if (snapshot := cached_snapshot(name)) is not None:
        if not is_offline_mode():
            _print_cached(name, reason)
        return str(snapshot)
    alternative = "unset it" if is_offline_mode() else "set HF_ENDPOINT to another hub"
    raise UserError(
        f"no local directory {name}; {reason}; and the cache {constants.HF_HUB_CACHE} does not contain it. Give the path of a "
        f"downloaded checkpoint, set HF_HOME to a cache that contains it (HF_HUB_OFFLINE=1 uses only the cache), or {alternative}"
        f"{path_hint(Path(name), only_close=True)}"
    )


@functools.cache
def _print_cached(name: str, reason: str) -> None:
    print(f"{name}: loaded from the local cache: {reason}")


def unreachable_reason(repository: str, file: str = "config.json", kind: str = "model") -> str | None:
    """Why a repository of the hub cannot be reached, from one short request; None if it can be reached.

    Args:
        repository: `owner/name`.
        file: a file in it.
        kind: model or dataset.

    Raises:
        UserError: there is no such repository or file, or it is private or gated.
    """
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return _request_metadata(repository, file, kind, constants.ENDPOINT)


@functools.cache
def _request_metadata(repository: str, file: str, kind: str, endpoint: str) -> str | None:
    import httpx2
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    local = f"there is no local directory {repository}, and "
    try:
        url = hf_hub_url(repository, file, repo_type=kind, endpoint=endpoint)
        metadata = get_hf_file_metadata(url, timeout=TIMEOUT_S, endpoint=endpoint)
    except GatedRepoError as error:
        raise UserError(
            f"{repository} on {endpoint} is gated: accept its terms there, then log in (hf auth login) or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        close = path_hint(Path(repository), only_close=True)
        raise UserError(
            f"{local}{endpoint} has no {kind} {repository}, or it is private: check the name, or log in (hf auth login){close}"
        ) from error
    except RemoteEntryNotFoundError as error:
        if kind == "dataset":  # data sets may have no README.md
            return None
        raise UserError(f"{repository} on {endpoint} has no {file}: expected a checkpoint that transformers loads") from error
    except HFValidationError as error:
        raise UserError(f"{local}it is not a valid hub id: {error}") from error
    except HfHubHTTPError as error:
        return f"the hub {endpoint} answers {error.response.status_code}"
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        return f"the hub {endpoint} cannot be reached ({str(error) or type(error).__name__})"
    return None if metadata.commit_hash else f"{endpoint} does not answer like a hub"


def hub_revision(name: str | None) -> str | None:
    """The commit of a model that is in the hub's cache; None for any other directory, and for no model.

    Args:
        name: a directory or a hub id.
    """
    if name is None:
        return None
    folder = cached_snapshot(name, "config.json") if HUB_ID.fullmatch(name) and not Path(name).is_dir() else Path(name)
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None
