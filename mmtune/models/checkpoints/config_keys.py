"""Values of a model's config that decide something, without those that do not."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def without_keys(config: Any, names: Collection[str]) -> Any:
    """A config as `to_dict` returns it, without keys of these names, in its parts too."""
    if not isinstance(config, dict):
        return config
    return {key: without_keys(value, names) for key, value in config.items() if key not in names}
