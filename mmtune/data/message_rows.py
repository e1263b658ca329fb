"""Samples as rows in the form of the data template `messages`: writing a row, and reading a file of one row."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

from mmtune.data.media.media import ImageView, Media, MediaRules, open_media
from mmtune.data.media.media_names import MAX_DATA_URI, is_utf8
from mmtune.data.message import Message, RowError, Sample
from mmtune.data.sources.rows import Row
from mmtune.data.sources.source import open_rows
from mmtune.data.templates.template import load_data_template
from mmtune.utils.errors import UserError, reason_of
from mmtune.utils.hub import missing_path_message

ROW_FILES = (".json", ".jsonl")
"""File extensions of a file of one row."""
_INSTEAD_OF_SETTING = {
    "media_outside_root": "copy the file into this folder",
    "media_url": "download it into the folder of the row's file, and give its path",
}
"""What to do where a recipe's source would need another setting, by issue type."""


def messages_row(sample: Sample, root: Path) -> Row:
    """A sample as a row in the form of the data template `messages`.

    Args:
        sample: the conversation; image settings (window, augmentation) are not part of a row.
        root: the row's media root, without links: media inside it are written as relative paths, all others as `data:` URIs.

    Raises:
        UserError: a file cannot be read, or is too large for a `data:` URI.
    """
    row: Row = {"id": sample.id, "messages": [_turn(message, root) for message in sample.messages]}
    if sample.task is not None:
        row["task"] = sample.task
    if sample.tools:
        row["tools"] = list(sample.tools)
    return row


def _turn(message: Message, root: Path) -> dict[str, Any]:
    blocks = [
        block if block["type"] == "text" else {"type": block["type"], block["type"]: _reference(block[block["type"]], root)}
        for block in message["content"]
    ]
    turn = {key: value for key, value in message.items() if key != "supervised"} | {"content": blocks}
    if message["role"] == "assistant":
        turn["content"] = "".join(block["text"] for block in blocks)
    return turn if message.get("supervised", True) else {**turn, "weight": 0}


def _reference(media: Media, root: Path) -> str:
    file = media.image if isinstance(media, ImageView) else media
    if isinstance(file, Path) and file.is_relative_to(root) and is_utf8(name := os.path.relpath(file, root)):
        return name
    try:
        with open_media(file) as opened:
            uri = f"data:image;base64,{base64.b64encode(opened.read()).decode('ascii')}"
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {reason_of(error)}") from error
    if len(uri) > MAX_DATA_URI:
        size = f"{len(uri) / 2**20:.0f} MiB in base64, more than the {MAX_DATA_URI // 2**20} MiB of a data: URI"
        raise UserError(f"{file}: {size}; copy the image into {root}, so that the row has its path")
    return uri


def check_messages_row(row: Row, root: Path, row_id: str) -> Sample:
    """The sample that the data template `messages` reads from a row, with media inside `root` only.

    Raises:
        RowError: the row is not valid.
    """
    return load_data_template("messages").sample(row_id, row, MediaRules(root))


def read_messages_row(path: Path) -> Sample:
    """The sample of a file of one row, read with the data template `messages`; media are inside the file's folder.

    Raises:
        UserError: a missing or unreadable file, another number of rows, or a row that is not valid.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: expected a file" if path.exists() else missing_path_message(str(path), "file"))
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, a null character, a loop of links
        raise UserError(f"{str(path)[:100]}: cannot be read: {reason_of(error)}") from error
    if path.suffix.lower() not in ROW_FILES:
        raise UserError(f"{path}: expected a {' or '.join(ROW_FILES)} file with one row in the form of the template `messages`")
    try:
        rows = open_rows(path)
        if len(rows) != 1:
            raise UserError(f"{path}: expected a file of one row, got {len(rows)}")
        row_id, row = rows[0]
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from error
    if "messages" not in row:
        keys = ", ".join(map(str, row))[:200]
        detail = f"expected a row in the form of the template `messages`, got the keys {keys}"
        raise RowError(row_id, "messages", detail, "field_missing")
    try:
        return check_messages_row(row, path.parent, row_id)
    except RowError as error:
        if error.issue not in _INSTEAD_OF_SETTING:
            raise
        detail = f"{error.detail.partition('; set `')[0]}; {_INSTEAD_OF_SETTING[error.issue]}"
        raise RowError(error.row, error.field, detail, error.issue) from error
