"""Rows of messages and their samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmtune.data.message import Sample
from mmtune.data.sources.reader import SourceReader
from mmtune.recipe.recipe import Source


def user(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def assistant(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def samples(media: Path, *rows: dict[str, Any], template: str = "messages", **settings: Any) -> list[Sample]:
    (media / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    reader = SourceReader(Source(path=str(media / "rows.json"), template=template, **settings))
    opened = reader.open()
    return [reader.sample(*opened[index]) for index in range(len(opened))]


def contents(sample: Sample) -> list[list[str]]:
    """Each message as its texts, and `<name>` for a medium."""
    return [
        [block["text"] if block["type"] == "text" else f"<{block[block['type']].name}>" for block in message["content"]]
        for message in sample.messages
    ]


def talk(first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": ["a.png"],
        "messages": [user("<image>q"), assistant("WRONG", **first), user("r"), assistant("right", **last)],
    }
