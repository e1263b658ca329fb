"""The base of a run is resolved once: its configuration and its processor are read from their files one time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoConfig, AutoProcessor

from mmtune.models.checkpoints import locate_base
from mmtune.recipe.recipe import Recipe
from mmtune.train import train


def test_a_run_reads_the_configuration_and_the_processor_of_its_base_once(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    running: list[str] = []

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[owner.__name__] += not running  # transformers' own reading of a config for a processor does not count
            running.append(owner.__name__)
            try:
                return real(*args, **kwargs)
            finally:
                running.pop()

        monkeypatch.setattr(owner, name, call)

    counted(AutoConfig, "from_pretrained")
    counted(AutoProcessor, "from_pretrained")
    monkeypatch.setattr(locate_base, "locate_checkpoint", _once(locate_base.locate_checkpoint))
    train(make_recipe("train.max_steps=1"), ["test"])
    assert calls == {"AutoConfig": 1, "AutoProcessor": 1}


def _once(locate: Callable[[str], str]) -> Callable[[str], str]:
    names: list[str] = []

    def call(name: str) -> str:
        assert name not in names, f"{name} was located before"
        names.append(name)
        return locate(name)

    return call
