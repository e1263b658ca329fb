"""Upload of a release to the hub; a dry run unless `upload` is set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from mmtune.utils.errors import UserError
from mmtune.utils.manifest import MANIFEST, check_manifest, refresh_entry

CARD = "README.md"
"""The model card."""


def push(folder: Path, repository: str, *, upload: bool = False, private: bool = True) -> dict[str, Any]:
    """Check a release against its manifest, list its files, and upload them if `upload` is set.

    The model card may be edited after the release; its entry in the manifest is updated before the upload.

    Args:
        folder: a release that `mmtune merge` wrote.
        repository: `owner/name` on the hub; created if it does not exist.
        upload: upload the files; otherwise nothing is sent.
        private: whether a new repository is private.

    Returns:
        `repository`, `files` with their sizes in bytes, `bytes`, `uploaded`, and after an upload the `url` of the commit.

    Raises:
        UserError: not a release, a model card with invalid front matter, or an error of the hub.
        CheckFailed: the files differ from the manifest.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository}: expected OWNER/NAME of a hub repository: {error}") from error
    files = check_manifest(folder, may_change=(CARD,))
    _check_card(folder / CARD)
    result: dict[str, Any] = {"repository": repository, "files": files, "bytes": sum(files.values()), "uploaded": False}
    for name, size in files.items():
        print(f"{size:>15,}  {name}")
    print(f"{result['bytes']:>15,}  bytes in {len(files)} files, for {repository}")
    if not upload:
        print("dry run: nothing was uploaded; add --upload to upload")
        return result
    if CARD in files and refresh_entry(folder, CARD):
        print(f"{CARD} was edited after the release; its entry in {MANIFEST} is updated")
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a release")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{repository}: the hub rejected the upload: {reason}") from error
    except httpx2.HTTPError as error:
        raise UserError(f"{repository}: cannot reach the hub: {str(error) or type(error).__name__}") from error
    print(f"uploaded: {commit.commit_url}")
    return result | {"uploaded": True, "url": commit.commit_url}


def _check_card(card: Path) -> None:
    """Check the front matter of a model card.

    Raises:
        UserError: front matter that the hub would reject, with its line.
    """
    if not card.is_file():  # the manifest lists no card
        return
    try:
        lines = card.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{card}: expected UTF-8 text, got an invalid byte at offset {error.start}") from error
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        raise UserError(f"{card}:1: expected YAML front matter between two `---` lines at the start of the file")
    try:
        values = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = 1 if mark is None else mark.line + 2
        raise UserError(f"{card}:{line}: the front matter is not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{card}:2: front matter: expected `key: value` lines, got a {type(values).__name__}")
