"""Upload a release to the hub, after showing what would go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from mmtune.errors import UserError
from mmtune.manifest import check_manifest


def push(folder: Path, repository: str, *, upload: bool = False, private: bool = True) -> dict[str, Any]:
    """Check a release against its manifest, list its files, and upload them if `upload`.

    Args:
        folder: what `mmtune merge` wrote.
        repository: `owner/name` on the hub; made if it does not exist.
        upload: nothing leaves the machine without it.
        private: of a repository that is made.

    Returns:
        What went, or would go: `repository`, `files` with their sizes in bytes, `bytes`, `uploaded`, and the commit's `url`.

    Raises:
        UserError: no release there, or the hub refuses.
        CheckFailed: the release is not what its manifest says.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository}: expected OWNER/NAME as on the hub: {error}") from error
    files = check_manifest(folder)
    result: dict[str, Any] = {"repository": repository, "files": files, "bytes": sum(files.values()), "uploaded": False}
    for name, size in files.items():
        print(f"{size:>15,}  {name}")
    print(f"{result['bytes']:>15,}  bytes in {len(files)} files, for {repository}")
    if not upload:
        print("a dry run: nothing was uploaded; --upload does it")
        return result
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
