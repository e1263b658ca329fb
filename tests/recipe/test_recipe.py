"""Recipes: valid values, error messages, and that `to_yaml` loads back to an equal recipe."""

from __future__ import annotations

import importlib
import json
import pickle
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from peft import LoraConfig
from pydantic import ValidationError
from transformers import TrainingArguments

from mmtune.methods.method_table import METHODS
from mmtune.recipe.pass_through.arguments import EARLY_STOPPING, method_arguments, train_arguments
from mmtune.recipe.recipe import ComponentTuning, Recipe, Source, check_files, load_recipe, recipe_schema
from mmtune.utils.errors import UserError
from mmtune.utils.shipped import copy_recipe, shipped_dir, shipped_recipes

RECIPE = """\
model:
  base: builtin:tiny-llava
tune:
  vision: frozen
  projector: {method: full, learning_rate: 2e-5}
  language:
    method: lora
    r: 8
    target_modules: [q_proj, v_proj]
data:
  train:
    - path: rows.jsonl
      template: llava
  supervise: last
evaluate:
  data: [{path: held_out.jsonl, template: llava}]
  answer_after: "answer:"
train:
  learning_rate: 1e-3
  max_steps: 200
  save_strategy: no
output_dir: runs/quickstart
"""


def bomb(level: str) -> str:
    """Nine lists or mappings, each of which names the one before ten times: a billion values."""
    return "".join(f"data{n}: &a{n} " + level.format(", ".join([f"*a{n - 1}"] * 10)) + "\n" for n in range(1, 10))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def write_recipe(text: str = RECIPE, name: str = "x.yaml") -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write_recipe


def errors(path: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as raised:
        load_recipe(path, overrides)
    return str(raised.value).splitlines()


def changed(old: str, new: str) -> str:
    assert RECIPE.count(old) == 1
    return RECIPE.replace(old, new)


# Valid recipes.


def test_sections_are_typed_and_defaults_filled(write: Any) -> None:
    recipe = load_recipe(Path(write()))
    assert recipe.model.base == "builtin:tiny-llava"
    assert recipe.model.precision == "fp32"
    assert recipe.tune.vision == ComponentTuning(method="frozen")
    assert recipe.tune.projector.learning_rate == 2e-5
    assert recipe.tune.language.method == "lora"
    lora = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    assert dict(recipe.tune.language.settings) == lora
    assert recipe.data.train == (Source(path="rows.jsonl", template="llava"),)
    assert (recipe.data.max_bad_fraction, recipe.data.check_rows, recipe.data.max_tokens) == (0.0, 2000, None)
    assert recipe.evaluate is not None
    assert (recipe.evaluate.max_new_tokens, recipe.evaluate.batch_size, recipe.evaluate.samples) == (64, 16, 24)
    assert dict(recipe.train) == {
        "max_steps": 200, "learning_rate": 0.001, "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
    assert recipe.output_dir == "runs/quickstart"


def test_tune_defaults_to_lora_and_a_full_projector(write: Any) -> None:
    text = "model: {base: b}\ndata: {train: [{path: p, template: t}]}\noutput_dir: o\n"
    recipe = load_recipe(write(text + "tune:\ntrain:\n  # all commented out\n"))
    assert recipe == load_recipe(write(text + "tune: {language: lora}\n", "y.yaml"))
    assert [c.method for c in (recipe.tune.vision, recipe.tune.projector, recipe.tune.language)] == [
        "frozen", "full", "lora",
    ]  # fmt: skip
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
    assert dict(recipe.tune.language.settings) == lora
    assert recipe.evaluate is None
    # A mapping without its method takes the component's default method.
    assert load_recipe("x.yaml", ["tune.language.r=4"]).tune.language.settings["r"] == 4
    assert load_recipe("x.yaml", ["tune.projector.learning_rate=1"]).tune.projector.method == "full"


def test_an_assembled_model_has_a_projector_by_name_or_mapping(write: Any) -> None:
    parts = changed("base: builtin:tiny-llava", "vision: openai/clip\n  language: lmsys/vicuna")
    for override in ([], ["model.projector=mlp"], ["model.projector.type=mlp"]):
        recipe = load_recipe(write(parts), override)
        assert recipe.model.projector is not None
        assert (recipe.model.projector.type, recipe.model.projector.weights) == ("mlp", None)
        assert recipe.model.vision_feature_layer == -2
    recipe = load_recipe(write(parts), ["model.projector=mlp", "model.projector.weights=p.safetensors"])
    assert recipe.model.projector is not None
    assert recipe.model.projector.weights == "p.safetensors"


def test_pass_through_arguments_of_peft_and_the_trainer(write: Any, tmp_path: Path) -> None:
    recipe = load_recipe(
        write(),
        [
            "tune.language.eva_config={rho: 2.5}",
            "tune.language.init_lora_weights=eva",
            "train.lr_scheduler_type=cosine",
            "train.use_cpu=true",
        ],
    )
    assert load_recipe("x.yaml", ["tune.language.init_lora_weights=pissa_niter_4"])
    assert len(errors("x.yaml", "tune.language.init_lora_weights=pissa_niter_few")) == 1
    config = LoraConfig(**recipe.tune.language.settings)
    assert (config.r, config.target_modules, config.eva_config.rho) == (8, {"q_proj", "v_proj"}, 2.5)
    arguments = TrainingArguments(output_dir=str(tmp_path), **recipe.train)
    assert (arguments.lr_scheduler_type.value, arguments.learning_rate, arguments.report_to) == ("cosine", 0.001, [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5), ("2E5", 2e5), (".5e1", 5.0), ("1.", 1.0), ("-3e-1", -0.3), ("1e+3", 1000.0), ("7", 7),
        ("0x10", 16), ("010", 10), (".inf", float("inf")), ("'2e-5'", "2e-5"), ("no", "no"), ("on", "on"),
        ("2024-01-01", "2024-01-01"), ("1:30", "1:30"), ("true", True), ("~", None), ("", None), ("e5", "e5"),
        ("[1e-2, x]", [0.01, "x"]), ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)  # fmt: skip
def test_yaml_values_are_those_of_the_core_schema(write: Any, text: str, value: object) -> None:
    from mmtune.recipe.yaml_lines import read_document

    value_read = read_document(Path(write(f"key: {text}\n"))).values["key"]
    assert value_read == value
    assert type(value_read) is type(value)


def test_anchors_and_merge_keys(write: Any) -> None:
    text = changed("data: [{path: held_out.jsonl, template: llava}]", "data: [{<<: *rows, path: held_out.jsonl}]")
    text = text.replace("    - path: rows.jsonl", "    - &rows\n      path: rows.jsonl")
    recipe = load_recipe(write(text))
    assert recipe.evaluate is not None
    assert recipe.evaluate.data == (Source(path="held_out.jsonl", template="llava"),)
    assert recipe.origin("evaluate.data.0.path") == "x.yaml:17"
    assert recipe.origin("evaluate.data.0.template") == "x.yaml:14"


# Error messages.


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "    r: 8",
            "    lora_alhpa: 8",
            "x.yaml:8: tune.language.lora_alhpa: unknown key; did you mean 'lora_alpha'?",
        ),
        ("    r: 8", "    r: eight", "x.yaml:8: tune.language.r: expected an integer >= 1, got 'eight'"),
        ("    r: 8", "    r: 0", "x.yaml:8: tune.language.r: expected an integer >= 1, got 0"),
        ("    r: 8", "    r: 8.5", "x.yaml:8: tune.language.r: expected an integer >= 1, got 8.5"),
        ("    r: 8", "    r: '8'", "x.yaml:8: tune.language.r: expected an integer >= 1, got '8'"),
        ("    r: 8", "    r: true", "x.yaml:8: tune.language.r: expected an integer >= 1, got true"),
        (
            "    r: 8",
            "    lora_dropout: 1",
            "x.yaml:8: tune.language.lora_dropout: expected a number >= 0 and < 1, got 1",
        ),
        ("    r: 8", "    use_dora: yes", "x.yaml:8: tune.language.use_dora: expected true or false, got 'yes'; write true"),
        (
            "    r: 8",
            "    bias: al",
            "x.yaml:8: tune.language.bias: expected 'none', 'all', 'lora_only', got 'al'; did you mean 'all'?",
        ),
        (
            "    r: 8",
            "    eva_config: {roh: 1}",
            "x.yaml:8: tune.language.eva_config: unknown key 'roh'; did you mean 'rho'?",
        ),
        (
            "    r: 8",
            "    modules_to_save: [x]",
            "x.yaml:8: tune.language.modules_to_save: not supported in a recipe: give another component the method "
            "full, and it is saved with the adapter",
        ),
        ("    r: 8", "    task_type: x", "x.yaml:8: tune.language.task_type: not supported in a recipe: mmtune sets it"),
        (
            "    method: lora",
            "    method: lorra",
            "x.yaml:7: tune.language.method: expected frozen, full or a method of `mmtune methods`, got 'lorra'; "
            "did you mean 'lora'?",
        ),
        (
            "  vision: frozen",
            "  vision: prefix_tuning",
            "x.yaml:4: tune.vision: prefix_tuning works in tune.language only; use frozen, full or lora here",
        ),
        (
            "  vision: frozen",
            "  vision: oft",
            "x.yaml:3: tune: one adapter directory holds one method, beside full: vision: oft, language: lora; use lora for each "
            "of them",
        ),
        (
            "  vision: frozen",
            "  vision: {method: lora, use_dora: true}",
            "x.yaml:3: tune: components of one adapter differ in learning_rate, target_modules, r, lora_alpha, "
            "loraplus_lr_ratio, target_parameters, trainable_token_indices, soft_verbalizer only; make the rest equal",
        ),
        (
            "    r: 8",
            "    bias: all",
            "x.yaml:8: tune.language.bias: 'all' is not supported: it would train biases of every component; lora_only trains "
            "those of the tuned layers",
        ),
        (
            "    r: 8",
            "    init_lora_weights: loftq",
            "x.yaml:8: tune.language.init_lora_weights: expected ",
        ),
        ("  vision: frozen", "  vision: 3", "x.yaml:4: tune.vision: expected a method's name or a mapping, got 3"),
        (
            "  vision: frozen",
            "  vision: {method: full, r: 3}",
            "x.yaml:4: tune.vision.r: not supported with method: full; leave it out",
        ),
        (
            "  vision: frozen",
            "  vision: {learning_rate: 1}",
            "x.yaml:4: tune.vision.learning_rate: a frozen component has no learning rate",
        ),
        (
            "  vision: frozen",
            "  vision: {method: full, learning_rte: 3}",
            "x.yaml:4: tune.vision.learning_rte: unknown key; did you mean 'learning_rate'?",
        ),
        (
            "learning_rate: 2e-5",
            "learning_rate: -1",
            "x.yaml:5: tune.projector.learning_rate: expected more than 0, got -1",
        ),
        ("learning_rate: 1e-3", "learning_rate: fast", "x.yaml:19: train.learning_rate: expected a number > 0, got 'fast'"),
        (
            "max_steps: 200",
            "per_device_batch_size: 1",
            "x.yaml:20: train.per_device_batch_size: unknown key; did you mean 'per_device_train_batch_size'?",
        ),
        (
            "max_steps: 200",
            "lr_scheduler_type: cosin",
            "x.yaml:20: train.lr_scheduler_type: expected 'linear', 'cosine', ",
        ),
        ("max_steps: 200", "optim: adamw_torc", "x.yaml:20: train.optim: expected one of "),
        (
            "max_steps: 200",
            "warmup_ratio: 0.03",
            "x.yaml:20: train.warmup_ratio: unknown key; a float warmup_steps below 1 is the ratio, as in warmup_steps: 0.03",
        ),
        ("max_steps: 200", "bf16: true", "x.yaml:20: train.bf16: not supported in a recipe: give model.precision"),
        (
            "max_steps: 200",
            "output_dir: o",
            "x.yaml:20: train.output_dir: not supported in a recipe: give output_dir at the top of the recipe",
        ),
        (
            "max_steps: 200",
            "do_eval: true",
            "x.yaml:20: train.do_eval: not supported in a recipe: give eval_strategy",
        ),
        (
            "max_steps: 200",
            "parallelism_config: {}",
            "x.yaml:20: train.parallelism_config: not supported in a recipe: mmtune does not support it; use DDP, DeepSpeed ZeRO "
            "or FSDP2",
        ),
        ("      template: llava\n", "", "x.yaml:12: data.train.0.template: required, and not given"),
        (
            "      template: llava\n",
            "      template: llava\n      limit: 0\n",
            "x.yaml:14: data.train.0.limit: expected at least 1, got 0",
        ),
        (
            "supervise: last",
            "over_length: drop",
            "x.yaml:14: data.over_length: expected 'error', 'drop_sample', 'drop_media' or 'shrink_media', got 'drop'",
        ),
        (
            "supervise: last",
            "max_bad_fraction: 1.5",
            "x.yaml:14: data.max_bad_fraction: expected at most 1, got 1.5",
        ),
        (
            "supervise: last",
            "max_token: 5",
            "x.yaml:14: data.max_token: unknown key; did you mean 'max_tokens'?",
        ),
        ('answer_after: "answer:"', "before: 1", "x.yaml:17: evaluate.before: expected true or false, got 1; write true"),
        ("output_dir: runs/quickstart", "output_dir: 7", "x.yaml:22: output_dir: expected a string, got 7"),
        (
            "output_dir: runs/quickstart",
            "outputdir: x",
            "x.yaml:22: outputdir: unknown key; did you mean 'output_dir'?",
        ),
        (
            "base: builtin:tiny-llava",
            "base: builtin:tiny-lava",
            "x.yaml:2: model.base: unknown built-in model 'builtin:tiny-lava'; did you mean 'builtin:tiny-llava'?",
        ),
        (
            "base: builtin:tiny-llava",
            "base: b\n  precision: bf61",
            "x.yaml:3: model.precision: expected 'fp32', 'bf16', 'int8' or 'nf4', got 'bf61'; did you mean 'bf16'?",
        ),
        (
            "base: builtin:tiny-llava",
            "base: b\n  vision_feature_layer: -1",
            "x.yaml:3: model.vision_feature_layer: not supported with base: it is for a model assembled from vision and "
            "language; leave it out",
        ),
        (
            "base: builtin:tiny-llava",
            "base: b\n  vision: v",
            "x.yaml:3: model.vision: base is given too; give either base, or vision and language",
        ),
        (
            "base: builtin:tiny-llava",
            "vision: v",
            "x.yaml:2: model.vision: model.language is missing; a model is assembled from both",
        ),
        ("base: builtin:tiny-llava", "precision: fp32", "x.yaml:1: model: give either base, or vision and language"),
    ],
)
def test_an_error_has_file_line_key_and_what_was_expected(write: Any, old: str, new: str, message: str) -> None:
    lines = errors(write(changed(old, new)))
    assert [line for line in lines if line.startswith(message)], lines
    if not message.endswith(" "):
        assert message in lines
    assert len(lines) == 1, lines


def test_long_choices_end_in_the_nearest(write: Any) -> None:
    (line,) = errors(write(changed("max_steps: 200", "optim: adamw_torc")))
    assert line.endswith("names, got 'adamw_torc'; did you mean 'adamw_torch'?")


def test_all_errors_are_reported_at_once_in_the_order_of_the_file(write: Any) -> None:
    text = changed("r: 8", "lora_alhpa: 8").replace("max_steps: 200", "max_stpes: 200").replace("output_dir: ", "outdir: ")
    text = text.replace("base: builtin:tiny-llava", "base: 5\n  vision: v").replace("  vision: frozen", "  vision: prefix_tuning")
    lines = errors(write(text), "data.check_rows=many", "tune.language.r=0", "no_equals")
    assert [line.partition(": ")[0] for line in lines] == [
        "x.yaml:2", "x.yaml:3", "x.yaml:5", "x.yaml:9", "x.yaml:21", "x.yaml:23", "command line",
        "command line", "command line",
    ]  # fmt: skip
    assert lines[0] == "x.yaml:2: model.base: expected a string, got 5"


def test_a_recipe_with_all_components_frozen_is_an_error(write: Any) -> None:
    overrides = ["tune.projector=frozen", "tune.language=frozen"]
    message = "x.yaml:3: tune: vision, projector and language are all frozen, so nothing would train"
    assert errors(write(), *overrides) == [message]
    assert load_recipe("x.yaml", [*overrides, "tune.vision=full"]).tune.vision.method == "full"


def test_duplicate_keys_name_both_lines(write: Any) -> None:
    text = changed("  max_steps: 200\n", "  max_steps: 200\n  learning_rate: 2e-3\n  warmup: 3\n")
    assert errors(write(text + "model: {base: b}\n")) == [
        "x.yaml:21: train.learning_rate: key given twice; first on line 19",
        "x.yaml:22: train.warmup: unknown key; did you mean 'warmup_steps'?",
        "x.yaml:25: model: key given twice; first on line 1",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml:1: the recipe is empty; expected a mapping with model, data, output_dir"),
        ("# only a comment\n", "x.yaml:1: the recipe is empty; expected a mapping with model, data, output_dir"),
        ("\n- a\n- b\n", "x.yaml:2: expected a mapping with model, data, output_dir, got a list"),
        ("hello\n", "x.yaml:1: expected a mapping with model, data, output_dir, got a single value"),
        ("model: {base: b}\ndata: [1, 2\noutput_dir: o\n", "x.yaml:3: not valid YAML: "),
        ("model:\n\tbase: b\n", "x.yaml:2: not valid YAML: "),
        ("model: {base: b}\n---\nmodel: {}\n", "x.yaml:2: not valid YAML: "),
        ("model: *nowhere\n", "x.yaml:1: not valid YAML: found undefined alias 'nowhere'"),
        ("a: 1\nb: \x07\n", "x.yaml:2: not valid YAML: the character "),
        ("3: x\n", "x.yaml:1: recipe: a key must be text, got 3; quote it"),
        ("model: &m\n  base: *m\n", "x.yaml:1: model.base: the value contains itself"),
        ("model: !!python/object:os.system {}\n", "x.yaml:1: model: the YAML tag "),
        ("model: {base: !!python/name:os.system x}\n", "x.yaml:1: model.base: the YAML tag "),
        ("a: 1\nmodel: " + "[" * 100_000, "x.yaml:2: not valid YAML: nested more than 50 levels deep"),
        ("a: 1\nmodel: " + "{a: " * 100_000, "x.yaml:2: not valid YAML: nested more than 50 levels deep"),
        (
            "model: {base: " + "9" * 100_000 + "}\n",
            "x.yaml:1: model.base: expected a number of at most 1,000 characters, got 100,000",
        ),
        (
            "model: {base: 0x" + "f" * 100_000 + "}\n",
            "x.yaml:1: model.base: expected a number of at most 1,000 characters, got 100,002",
        ),
        ("model: " + "x" * 2**20, "x.yaml: expected at most 1,048,576 bytes for a recipe, got 1,048,583"),
    ],
    ids=lambda text: text[:40],
)
def test_files_that_are_not_recipes(write: Any, text: str, message: str) -> None:
    assert errors(write(text))[0].startswith(message)


@pytest.mark.parametrize(
    ("first", "level"), [("[x]", "[{}]"), ("{base: x}", "{{<<: [{}]}}"), ("x" * 100_000, "[{}]")], ids=["lists", "merges", "text"]
)
def test_the_size_of_expanded_aliases_is_bounded(write: Any, first: str, level: str) -> None:
    (message,) = errors(write(f"model: &a0 {first}\n{bomb(level)}"))
    assert message.startswith("x.yaml:1: data") and "expected at most 100,000 values; aliases count each time" in message


def test_a_file_that_cannot_be_read(write: Any, tmp_path: Path) -> None:
    write(name="quickstart.yaml")
    Path("folder").mkdir()
    Path("latin.yaml").write_bytes(b"model: {base: caf\xe9}\n")
    assert errors("folder") == ["folder: is a directory; give a recipe file"]
    assert errors("quikstart.yaml") == ["quikstart.yaml: no such recipe file; did you mean 'quickstart.yaml'?"]
    assert errors("latin.yaml") == ["latin.yaml: not UTF-8 text (byte 17)"]


# Overrides.


def test_a_text_that_ends_with_a_colon_is_no_mapping(write: Any) -> None:
    recipe = load_recipe(write(), ["evaluate.answer_after=Answer:", "train.run_name=a b:"])
    assert recipe.evaluate is not None
    assert (recipe.evaluate.answer_after, recipe.train["run_name"]) == ("Answer:", "a b:")


def test_overrides_are_yaml_by_dotted_key_and_the_last_wins(write: Any) -> None:
    recipe = load_recipe(
        write(),
        [
            "train.learning_rate=5e-4", "train.max_steps=3", "train.max_steps=4", "data.train.0.path=other.jsonl",
            "data.train.0.limit=10", "tune.vision.method=full", "tune.language.target_modules=all-linear",
            "evaluate=null", "train.run_name=a=b", "tune.projector.learning_rate=", "model.chat_template=chatml",
        ],
    )  # fmt: skip
    assert (recipe.train["learning_rate"], recipe.train["max_steps"], recipe.train["run_name"]) == (5e-4, 4, "a=b")
    assert recipe.data.train == (Source(path="other.jsonl", template="llava", limit=10),)
    assert recipe.tune.vision.method == "full"  # the shorthand `vision: frozen` opened up
    assert recipe.tune.language.settings["target_modules"] == "all-linear"
    assert recipe.evaluate is None
    assert recipe.tune.projector.learning_rate is None
    assert recipe.model.chat_template == "chatml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=abc", "expected a number > 0, got 'abc'"),
        ("train={learning_rate: abc}", "train.learning_rate: expected a number > 0, got 'abc'"),
        ("train.lerning_rate=1", "unknown key; did you mean 'learning_rate'?"),
        ("trian.learning_rate=1", "trian: unknown key; did you mean 'train'?"),
        ("output_dir.x=1", "output_dir is 'runs/quickstart', which has no keys"),
        ("data.train.1.path=x", "data.train has no item '1'; it has 1 item, counted from 0"),
        ("data.train.path=x", "data.train has no item 'path'; it has 1 item, counted from 0"),
        ("data.train=[]", "expected a list with at least one item, got []; such as [{path: rows.json, template: llava}]"),
        ("data.train=rows.json", "expected a list, got 'rows.json'; such as [{path: rows.json, template: llava}]"),
        ("model.base = x", "expected key=value without spaces: write model.base=x"),
        ("data.train=[x]", "data.train.0: expected a mapping, got 'x'"),
        (
            "tune.language.layers_to_transform.0=x",
            "tune.language.layers_to_transform has no items; give the whole list",
        ),
        (
            "train.max_steps=[1",
            "not valid YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'",
        ),
        ("train.max_steps", "expected key=value, with dots between the parts of the key"),
        ("train..x=1", "expected key=value, with dots between the parts of the key"),
        ("train={seed: 1, seed: 2}", "train.seed: key given twice; first on line 1"),
    ],
)
def test_an_error_in_an_override(write: Any, override: str, message: str) -> None:
    assert errors(write(), override) == [f"command line: {override}: {message}"]


def test_origin_of_every_key(write: Any) -> None:
    recipe = load_recipe(write(name="r.yaml"), ["train.max_steps=3", "evaluate={data: [{path: p, template: t}]}"])
    assert recipe.origin("data.train.0.path") == "r.yaml:12"
    assert recipe.origin("tune.projector.learning_rate") == "r.yaml:5"
    assert recipe.origin("train.max_steps") == "command line: train.max_steps=3"
    assert recipe.origin("evaluate.data.0.path") == "command line: evaluate={data: [{path: p, template: t}]}"
    assert recipe.origin("evaluate.answer_after") == "default"  # the file's own went with the section


def test_check_files_names_all_missing_files(write: Any, tmp_path: Path) -> None:
    text = changed("base: builtin:tiny-llava", "base: ./my_model\n  chat_template: my.jinja")
    recipe = load_recipe(write(text), ["data.train.0.media_root=images", "evaluate.data.0.path=other.jsonl"])
    with pytest.raises(UserError) as raised:
        check_files(recipe)
    assert [line.partition("; ")[0] for line in str(raised.value).splitlines()] == [
        "x.yaml:2: model.base: no such directory: ./my_model",
        "x.yaml:3: model.chat_template: no such file: my.jinja",
        "x.yaml:13: data.train.0.path: no such file: rows.jsonl",
        "command line: data.train.0.media_root=images: no such directory: images",
        "command line: evaluate.data.0.path=other.jsonl: no such file: other.jsonl",
    ]
    for file in ("my.jinja", "rows.jsonl", "other.jsonl"):
        Path(file).touch()
    Path("images").mkdir()
    Path("my_model").mkdir()
    check_files(recipe)


# Frozen, and the same when read back.


def test_a_recipe_is_frozen_all_the_way_down(write: Any) -> None:
    recipe = load_recipe(write(), ["train.lr_scheduler_type=cosine", "train.lr_scheduler_kwargs={num_cycles: 2}"])
    before = recipe.to_yaml()
    with pytest.raises(ValidationError):
        recipe.output_dir = "elsewhere"
    with pytest.raises(ValidationError):
        recipe.data.train[0].path = "elsewhere"
    with pytest.raises(TypeError):
        recipe.train["seed"] = 3  # type: ignore[index]
    with pytest.raises(AttributeError):
        recipe.train._values = {}
    recipe.train["lr_scheduler_kwargs"]["num_cycles"] = 5
    recipe.tune.language.settings["target_modules"].append("k_proj")
    dict(recipe.tune.language.settings)["target_modules"].append("k_proj")
    assert recipe.to_yaml() == before
    assert isinstance(recipe.data.train, tuple)
    assert isinstance(hash(recipe), int)
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301 (its own bytes)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (RECIPE, []),
        (RECIPE, ["tune.language=full", "evaluate=null", "data.max_tokens=512", "train.run_name='2e-5'"]),
        (RECIPE, ["train.run_name='no'", "tune.vision=full", "train.weight_decay=1e-7", "evaluate.answer_after='é: '"]),
        (RECIPE.replace("base: builtin:tiny-llava", "vision: a\n  language: b"), ["model.projector.weights=p"]),
        (RECIPE.replace("base: builtin:tiny-llava", "vision: a\n  language: b"), ["model.vision_feature_layer=-1"]),
    ],
)
def test_the_resolved_recipe_reads_back_equal(write: Any, text: str, overrides: list[str]) -> None:
    recipe = load_recipe(write(text), overrides)
    written = recipe.to_yaml()
    again = load_recipe(write(written, "resolved.yaml"))
    assert again == recipe
    assert again.to_yaml() == written
    assert again != load_recipe(write(text), [*overrides, "train.seed=7"])
    # Other YAML readers see the same text as text.
    run_name = yaml.safe_load(written)["train"].get("run_name")
    assert run_name == recipe.train.get("run_name")


def test_the_resolved_recipe_is_in_the_order_of_the_schema(write: Any) -> None:
    text = "output_dir: o\ntrain: {seed: 1, learning_rate: 1, max_steps: 2}\ndata: {train: [{template: t, path: p}]}\n"
    text += "tune: {language: {target_modules: [a], r: 3, method: lora}}\nmodel: {base: b}\n"
    written = yaml.safe_load(load_recipe(write(text)).to_yaml())
    assert list(written) == ["model", "tune", "objective", "data", "evaluate", "train", "output_dir"]
    assert list(written["tune"]["language"]) == ["method", "r", "target_modules", "lora_alpha", "lora_dropout"]
    assert list(written["train"]) == ["max_steps", "learning_rate", "report_to", "seed"]
    assert list(written["data"]["train"][0]) == list(Source.model_fields)


# The schema.


def test_every_key_of_the_schema_has_a_description_and_no_external_reference() -> None:
    schema = recipe_schema()
    described = 0

    def walk(node: Any, path: str) -> None:
        nonlocal described
        if isinstance(node, dict):
            for name, prop in node.get("properties", {}).items():
                assert prop.get("description"), f"{path}.{name}"
                described += 1
                walk(prop, f"{path}.{name}")
            for name, value in node.items():
                if name != "properties":
                    walk(value, path if name in ("anyOf", "items") else f"{path}.{name}")
        elif isinstance(node, list):
            for value in node:
                walk(value, path)
        if isinstance(node, dict) and isinstance(node.get("$ref"), str):
            assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]

    walk(schema, "")
    assert described > 100
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(schema)) == schema
    assert schema["properties"]["train"]["properties"]["learning_rate"]["type"] == "number"
    assert set(schema["properties"]["train"]["properties"]) == set(train_arguments().arguments)
    for method in METHODS:
        own = {"loraplus_lr_ratio"} if method == "lora" else set()
        properties = set(schema["$defs"][f"tune_{method}"]["properties"])
        assert properties == {"method", "learning_rate", *own, *method_arguments(method).arguments}
    language = schema["$defs"]["tune_lora"]["properties"]
    assert (language["r"]["default"], language["r"]["minimum"]) == (16, 1)


def test_the_schema_agrees_with_the_loader(write: Any) -> None:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    plain = yaml.safe_load(RECIPE.replace("2e-5", "2.0e-5").replace("1e-3", "1.0e-3").replace(": no", ": 'no'"))
    parts = load_recipe(write(changed("base: builtin:tiny-llava", "vision: a\n  language: b\n  projector: mlp")))
    for accepted in (plain, yaml.safe_load(load_recipe(write()).to_yaml()), yaml.safe_load(parts.to_yaml())):
        assert not list(validator.iter_errors(accepted))
    for path in shipped_recipes().values():
        assert not list(validator.iter_errors(yaml.safe_load(load_recipe(path).to_yaml()))), path
    for section, name, value in [
        ("train", "lerning_rate", 1), ("train", "learning_rate", "x"), ("train", "bf16", True), ("data", "trian", []),
        ("tune", "language", {"method": "lora", "lora_alhpa": 3}), ("tune", "language", "lorra"),
        ("tune", "vision", "prefix_tuning"), ("model", "precision", "nf3"), ("model", "vision", "v"),
        ("tune", "vision", {"method": "gated_prefix"}),
    ]:  # fmt: skip
        invalid = json.loads(json.dumps(plain))
        invalid[section][name] = value
        assert list(validator.iter_errors(invalid)), (section, name)


def test_managed_arguments_are_not_keys_of_the_recipe_and_the_rest_are_all_there() -> None:
    import dataclasses

    tables = [(method_arguments(name), method.config_class(), method.extra_settings) for name, method in METHODS.items()]
    for table, source, extra in (*tables, (train_arguments(), TrainingArguments, EARLY_STOPPING)):
        names = {field.name for field in dataclasses.fields(source) if field.init} | set(extra)
        assert set(table.arguments) | (set(table.managed) & names) == names
        assert not set(table.arguments) & set(table.managed)
        for name, argument in table.arguments.items():
            default = argument.default
            if default is None or isinstance(default, (bool, int, float, str)):
                assert argument.error_message(name, default) is None or name in (
                    "target_modules",
                    "feedforward_modules",
                    "num_virtual_tokens",
                    "encoder_hidden_size",
                    "r",
                ), name


# Shipped files.


def test_shipped_files_are_the_checkout_s_or_the_wheel_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = importlib.import_module("mmtune.utils.shipped")
    root = Path(shipped.__file__).parents[2]
    assert shipped_dir("data_templates") in (root / "data_templates", root / "mmtune" / "_shipped" / "data_templates")
    assert (shipped_dir("data_templates") / "llava.yaml").is_file()
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "mmtune")
    (tmp_path / "recipes").mkdir()
    assert shipped_dir("recipes") == tmp_path / "recipes"
    (tmp_path / "mmtune" / "_shipped" / "recipes").mkdir(parents=True)
    assert shipped_dir("recipes") == tmp_path / "mmtune" / "_shipped" / "recipes"


def test_copy_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = tmp_path / "_shipped" / "recipes"
    recipes.mkdir(parents=True)
    (recipes / "quickstart.yaml").write_text(RECIPE)
    monkeypatch.setattr(importlib.import_module("mmtune.utils.shipped"), "_PACKAGE", tmp_path)
    assert shipped_recipes() == {"quickstart": recipes / "quickstart.yaml"}
    assert copy_recipe("quickstart", tmp_path) == tmp_path / "quickstart.yaml"
    assert copy_recipe("quickstart", tmp_path / "mine.yaml").read_text() == RECIPE
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        copy_recipe("quickstart", tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        copy_recipe("quikstart", tmp_path / "new.yaml")
    with pytest.raises(UserError, match="does not exist"):
        copy_recipe("quickstart", tmp_path / "none" / "new.yaml")


def test_every_shipped_recipe_loads() -> None:
    for path in shipped_recipes().values():
        assert isinstance(load_recipe(path), Recipe)
