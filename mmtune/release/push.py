"""Upload a release to the hub, after showing what would go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from mmtune.utils.errors import UserError
from mmtune.utils.manifest import NAME as MANIFEST
from mmtune.utils.manifest import check_manifest, list_again

CARD = "README.md"
"""The model card."""


def push(folder: Path, repository: str, *, upload: bool = False, private: bool = True) -> dict[str, Any]:
    """Check a release against its manifest, list its files, and upload them if `upload`.

    The model card may have been edited since the release was written; its entry in the manifest is brought up to date before the
    upload.

    Args:
        folder: what `mmtune merge` wrote.
        repository: `owner/name` on the hub; made if it does not exist.
        upload: nothing leaves the machine without it.
        private: of a repository that is made.

    Returns:
        What went, or would go: `repository`, `files` with their sizes in bytes, `bytes`, `uploaded`, and the commit's `url`.

    Raises:
        UserError: no release there, a model card whose front matter is not valid, or the hub refuses.
        CheckFailed: the release is not what its manifest says.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository}: expected OWNER/NAME as on the hub: {error}") from error
    files = check_manifest(folder, may_change=(CARD,))
    _check_card(folder / CARD)
    result: dict[str, Any] = {"repository": repository, "files": files, "bytes": sum(files.values()), "uploaded": False}
    for name, size in files.items():
        print(f"{size:>15,}  {name}")
    print(f"{result['bytes']:>15,}  bytes in {len(files)} files, for {repository}")
    if not upload:
        print("a dry run: nothing was uploaded; --upload does it")
        return result
    if CARD in files and list_again(folder, CARD):
        print(f"{CARD} was edited after the release; its entry in {MANIFEST} is brought up to date")
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a release")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{repository}: the hub refused: {reason}") from error
    except httpx2.HTTPError as error:
        raise UserError(f"{repository}: the hub cannot be reached: {str(error) or type(error).__name__}") from error
    print(f"uploaded: {commit.commit_url}")
    return result | {"uploaded": True, "url": commit.commit_url}


def _check_card(card: Path) -> None:
    """
    Raises:
        UserError: a model card whose front matter the hub would refuse, with the line.
    """
    if not card.is_file():  # of a folder whose manifest lists none
        return
    try:
        lines = card.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{card}: not UTF-8 text (byte {error.start})") from error
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        raise UserError(f"{card}: expected YAML front matter between two lines `---` at its beginning, as the release had it")
    try:
        values = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = 1 if mark is None else mark.line + 2
        raise UserError(f"{card}:{line}: the front matter is not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{card}: the front matter is {type(values).__name__}; expected lines `key: value`")
