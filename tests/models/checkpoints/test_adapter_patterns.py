"""Regular expressions in an adapter's configuration: same modules as PEFT, and a time limit on matching."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText

from mmtune.methods import selectors
from mmtune.models.checkpoints.adapter_patterns import expand_patterns
from mmtune.models.load import load_adapter
from mmtune.utils.errors import UserError

ENDLESS = r"((.|\w)+)+(?<!j)"  # catastrophic backtracking on a path that ends with j

MODEL = nn.ModuleDict(
    {"a_module_with_a_name_that_is_long": nn.ModuleDict({"q_proj": nn.Linear(2, 2, False), "k_proj": nn.Linear(2, 2, False)})}
)


def settings_of(model: PeftModel) -> dict[str, tuple[int, float]]:
    return {n: (m.r["default"], m.scaling["default"]) for n, m in model.named_modules() if hasattr(m, "lora_A")}


def test_an_adapter_with_expressions_equals_the_one_that_peft_loads(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        target_modules=r".*language_model.*layers\.[0-3]\..*(q|v|down)_proj",
        exclude_modules=r".*layers\.2\..*",
        rank_pattern={"layers.1.*": 6, r"layers\.3\.self_attn\.q_proj": 2, "v_proj": 3},  # sorted, as in the saved file
        alpha_pattern={r".*\.down_proj|nothing": 16},
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
    )
    get_peft_model(AutoModelForImageTextToText.from_pretrained(base), config).save_pretrained(tmp_path)
    written = (tmp_path / "adapter_config.json").read_bytes()
    expected = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), tmp_path)
    config = json.loads(written) | {"base_model_name_or_path": str(base)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    loaded = load_adapter(tmp_path)

    assert settings_of(loaded) == settings_of(expected)
    assert {rank for rank, _ in settings_of(expected).values()} == {2, 3, 4, 6}
    tensors, reference = loaded.state_dict(), expected.state_dict()
    assert tensors.keys() == reference.keys()
    assert all(torch.equal(tensors[key], value) for key, value in reference.items())
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == config


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("target_modules", ENDLESS, "takes more than"),
        ("exclude_modules", ENDLESS, "takes more than"),
        ("rank_pattern", {ENDLESS: 2}, "takes more than"),
        ("alpha_pattern", {"q_proj": 4, ENDLESS: 2}, "takes more than"),
        ("target_modules", "(", "is not a regular expression"),
        ("layers_pattern", [ENDLESS], "expected the name of a module"),
        ("modules_to_save", ["lm_head", ENDLESS], "expected the name of a module"),
        ("rank_pattern", [2], "expected an object"),
    ],
)
def test_an_invalid_or_slow_expression_is_an_error(
    setting: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selectors, "SECONDS", 0.05)
    config = LoraConfig(target_modules=["q_proj"])
    setattr(config, setting, value)
    with pytest.raises(UserError, match=f"^adapter_config.json: {setting}: .*{message}"):
        expand_patterns(config, MODEL, Path("adapter_config.json"))


def test_expressions_are_replaced_by_the_paths_that_they_match() -> None:
    config = LoraConfig(
        target_modules="((.*)*)*x",  # `re` never returns
        exclude_modules=".*k_proj",
        rank_pattern={".*_proj": 2, "q_proj": 3},
    )
    expand_patterns(config, MODEL, Path("adapter_config.json"))
    assert config.target_modules == re.escape("((.*)*)*x")
    assert config.exclude_modules == r"a_module_with_a_name_that_is_long\.k_proj"
    long = r"a_module_with_a_name_that_is_long\."
    assert list(config.rank_pattern) == [rf"^(?:{long}q_proj|{long}k_proj)", "q_proj"]
    for targets in ("all-linear", ["q_proj"]):
        config = LoraConfig(target_modules=targets)
        expand_patterns(config, MODEL, Path("adapter_config.json"))
        assert config.target_modules == LoraConfig(target_modules=targets).target_modules
