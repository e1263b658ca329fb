"""The keys of a recipe that differ from the defaults, and between recipes."""

from __future__ import annotations

from collections.abc import Callable

from mmtune.recipe.recipe import Recipe
from mmtune.report.recipe_differences import differences_between, differences_from_defaults

MakeRecipe = Callable[..., Recipe]


def _differences(recipe: Recipe) -> dict[str, tuple[str, str]]:
    return {row["key"]: (row["this run"], row["default"]) for row in differences_from_defaults(recipe)}


def test_only_keys_with_another_value_than_the_default_are_listed(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        "tune.language={method: lora, r: 16, lora_alpha: 32, lora_dropout: 0.1, use_rslora: true}",
        "tune.projector=full",
        "tune.vision={method: lora, r: 16, lora_alpha: 32, lora_dropout: 0.1, use_rslora: true}",
        "data.mix=ratio",
        "data.max_tokens=64",
        "train.max_grad_norm=1.0",
        "train.lr_scheduler_type=cosine",
        "evaluate={data: [{path: rows.json, template: vqa, weight: 1.0, limit: 5}], batch_size: 16}",
        "evaluate.sampling.temperature=0.3",
    )
    differences = _differences(recipe)
    chosen = {
        key: value for key, value in differences.items() if not key.startswith(("data.train.0", "output_dir", "model.base"))
    }
    assert chosen == {
        "tune.vision.method": ("lora", "frozen"),
        "tune.vision.lora_dropout": ("0.1", "0.0"),
        "tune.vision.use_rslora": ("true", "false"),
        "tune.language.lora_dropout": ("0.1", "0.0"),
        "tune.language.use_rslora": ("true", "false"),
        "data.max_tokens": ("64", "null"),
        "data.mix": ("ratio", "repeats"),
        "evaluate.data.0.path": ("rows.json", "required"),
        "evaluate.data.0.template": ("vqa", "required"),
        "evaluate.data.0.limit": ("5", "null"),
        "evaluate.sampling.temperature": ("0.3", chosen["evaluate.sampling.temperature"][1]),
        "train.max_steps": ("3", "-1"),
        "train.learning_rate": ("0.005", "5e-05"),
        "train.per_device_train_batch_size": ("4", "8"),
        "train.lr_scheduler_type": ("cosine", "linear"),
        "train.logging_steps": ("1", "500"),
        "train.use_cpu": ("true", "false"),
        "train.seed": ("0", "42"),
    }
    assert differences["output_dir"][1] == "required"


def test_recipes_are_compared_key_by_key(make_recipe: MakeRecipe) -> None:
    first = make_recipe()
    second = make_recipe("tune.language={method: adalora, init_r: 8}", "train.warmup_steps=5", f"output_dir={first.output_dir}2")
    rows = {row.pop("key"): row for row in differences_between({"a": first, "b": second})}
    assert rows["tune.language.method"] == {"a": "lora", "b": "adalora"}
    assert rows["tune.language.init_r"] == {"a": "not set", "b": "8"}
    assert rows["train.warmup_steps"] == {"a": "not set", "b": "5"}
    assert not any(key.startswith(("model.", "data.", "output_dir")) for key in rows)
    assert differences_between({"a": first, "b": make_recipe()}) == []
