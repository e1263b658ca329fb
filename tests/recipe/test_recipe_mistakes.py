"""Common mistakes in a recipe: each gives one message with its line and what to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments, trainer_optimizer
from transformers.training_args import OptimizerNames

from mmtune.cli.main import entry_point
from mmtune.methods.selectors import compile_selector, is_match
from mmtune.recipe.other_toolkits import OTHER_NAMES
from mmtune.recipe.pass_through.arguments import EARLY_STOPPING, train_arguments
from mmtune.recipe.pass_through.library_facts import library_fact
from mmtune.recipe.recipe import load_recipe
from mmtune.recipe.train_rules import LIBRARY_KEYS, training_errors
from mmtune.utils.errors import UserError

RECIPE = """\
model:
  base: builtin:tiny-llava
tune:
  language:
    method: lora
data:
  train:
    - path: rows.jsonl
      template: llava
train:
  max_steps: 200
output_dir: runs/first
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(RECIPE, encoding="utf-8")
    Path("rows.jsonl").write_text("{}\n", encoding="utf-8")
    Path("folder").mkdir()
    Path("folder/row.jsonl").touch()
    return Path("x.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # values that cannot train
        ("train.max_steps=0", "expected an integer >= 1 or -1, got 0"),
        ("train.learning_rate=0", "expected a number > 0, got 0"),
        ("train.learning_rate=.nan", "expected a finite number, got .nan"),
        ("train.learning_rate=-.inf", "expected a finite number, got -.inf"),
        ("tune.language.learning_rate=.inf", "expected a finite number, got .inf"),
        ("train.per_device_train_batch_size=0", "expected an integer >= 1, got 0"),
        ("train.gradient_accumulation_steps=0", "expected an integer >= 1, got 0"),
        ("train.num_train_epochs=0", "expected a number > 0, got 0"),
        ("train.num_train_epochs=-1", "expected a number > 0, got -1"),
        ("train.seed=-1", "expected an integer >= 0 and < 4294967296, got -1"),
        ("train.logging_steps=1.5", "expected an integer, or a fraction of the run below 1, got 1.5"),
        ("train.dataloader_prefetch_factor=2", "needs worker processes: give dataloader_num_workers, or leave it out"),
        (
            "train.dataloader_multiprocessing_context=spawn",
            "needs worker processes: give dataloader_num_workers, or leave it out",
        ),
        ("tune.vision.learning_rate=0", "a frozen component has no learning rate"),
        (
            "tune.language.init_lora_weights=other",
            "expected true or false or 'gaussian', 'eva', 'olora', 'pissa', 'lora_ga' or 'pissa_niter_' and a number",
        ),
        ("tune.language.r=null", "expected an integer >= 1, got null"),
        # learning rate schedulers and what they need
        (
            "train.lr_scheduler_type=cosine_with_min_lr",
            "cosine_with_min_lr needs one of min_lr and min_lr_rate, got neither: give lr_scheduler_kwargs: {min_lr_rate: 0.1}",
        ),
        (
            "train={lr_scheduler_type: cosine_warmup_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-6, min_lr_rate: 0.1}}",
            "cosine_warmup_with_min_lr needs one of min_lr and min_lr_rate, got both: give lr_scheduler_kwargs: "
            "{min_lr_rate: 0.1}",
        ),
        (
            "train.lr_scheduler_type=warmup_stable_decay",
            "warmup_stable_decay needs num_decay_steps: give lr_scheduler_kwargs: {num_decay_steps: 100}",
        ),
        (
            "train.lr_scheduler_type=reduce_lr_on_plateau",
            "reduce_lr_on_plateau is not supported: its rates depend on a metric; use cosine or linear",
        ),
        ("train.lr_scheduler_kwargs={min_lr: 1}", "linear has no arguments; leave lr_scheduler_kwargs out"),
        (
            "train={lr_scheduler_type: polynomial, lr_scheduler_kwargs: {lr_ent: 1}}",
            "unknown key for polynomial; did you mean 'lr_end'?",
        ),
        (
            "train={learning_rate: 1e-4, lr_scheduler_type: polynomial, lr_scheduler_kwargs: {lr_end: 1}}",
            "expected less than train.learning_rate (0.0001), got 1; 0 is always valid",
        ),
        (
            "train={lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-6}}",
            "needs train.learning_rate, which it is relative to: give it too; min_lr_rate: 0.1 is a tenth of each",
        ),
        (
            "train={learning_rate: 1e-8, lr_scheduler_type: polynomial}",
            "expected more than 1e-07, the last learning rate of polynomial, got 1e-08; give a higher rate, or "
            "lr_scheduler_kwargs: {lr_end: 0}",
        ),
        (
            "train={max_steps: 20, lr_scheduler_type: warmup_stable_decay, lr_scheduler_kwargs: {num_decay_steps: 21}}",
            "expected at most 20 with train.max_steps 20, got 21",
        ),
        (
            "train={max_steps: 20, warmup_steps: 0.1, lr_scheduler_type: warmup_stable_decay, lr_scheduler_kwargs: "
            "{num_decay_steps: 19}}",
            "expected at most 18 with warmup_steps 2 and train.max_steps 20, got 19",
        ),
        # settings that nothing reads
        ("train.optim_args='momentum=0.9'", "adamw_torch_fused has no arguments; leave optim_args out"),
        ("train={optim: rmsprop_bnb, optim_args: 'alpha=0.9'}", "rmsprop_bnb has no arguments; leave optim_args out"),
        (
            "train={optim: sgd, optim_args: 'momentun=0.9'}",
            "unknown name 'momentun' for sgd; did you mean 'momentum'?",
        ),
        (
            "train={torch_compile: false, torch_compile_mode: max-autotune}",
            "not supported with torch_compile: false; leave it out, or give torch_compile: true",
        ),
        (
            "train={torch_compile: false, torch_compile_backend: inductor}",
            "not supported with torch_compile: false; leave it out, or give torch_compile: true",
        ),
        (
            "train={lr_scheduler_type: constant, warmup_steps: 10}",
            "constant does not support warmup_steps; use constant_with_warmup, or leave warmup_steps out",
        ),
        ("model.attn_implementation=flash_attention", "expected one of eager, flash_attention_2, flash_attention_3, "),
        ("model.attn_implementation=sdap", "expected one of eager, flash_attention_2, flash_attention_3, "),
        (
            "model.attn_implementation=flash_attention_3",
            "flash_attention_3 needs a library that is not installed: pip install flash-attn-3; or give sdpa",
        ),
        ("model.attn_implementation=a/b", "a/b needs a library that is not installed: pip install kernels; or give sdpa"),
        # values under other names
        ("model.precision=4bit", "expected 'fp32', 'bf16', 'int8' or 'nf4', got '4bit'; write nf4"),
        ("train.optim=adam", "expected one of 41 names, got 'adam'; write adamw_torch"),
        ("train.optim=ADAMW_TORCH", "expected one of 41 names, got 'ADAMW_TORCH'; did you mean 'adamw_torch'?"),
        ("train.gradient_checkpointing='yes'", "expected true or false or null, got 'yes'; write true"),
        (
            "tune.language.method=qlora",
            "expected frozen, full or a method of `mmtune methods`, got 'qlora'; QLoRA is method: lora with model.precision: nf4",
        ),
        ("tune.language.target_modules=all", "'all' is not the name of a module; write all-linear"),
        ("tune.language.target_modules=all-liner", "'all-liner' is not the name of a module; did you mean 'all-linear'?"),
        ("tune.language.target_modules=[all-linear]", "a list holds names of modules; write target_modules: all-linear"),
        ("tune.language.target_modules=(a", "'(a' is not a regular expression: missing ) at position 2"),
        ("tune.vision={method: full, target_modules: (a}", "'(a' is not a regular expression: missing ) at position 2"),
        # keys under other names
        ("data.max_length=4", "unknown key; its name here is max_tokens"),
        ("tune.language.rank=4", "unknown key; its name here is r"),
        ("tune.language.lora_target=all", "unknown key; its name here is target_modules"),
        ("model.load_in_4bit=true", "unknown key; write precision: nf4"),
        ("train.load_in_4bit=true", "unknown key; write model.precision: nf4"),
        ("train.bf16=true", "not supported in a recipe: give model.precision"),
        ("lora_r=8", "unknown key; write tune.language.r"),
        ("overwrite_output_dir=true", "unknown key; give --overwrite on the command line"),
        ("warmup_ratio=0.1", "unknown key; in the train section: a float warmup_steps below 1 is the ratio"),
        ("remove_unused_columns=false", "unknown key; in the train section: mmtune's collator decides what"),
        (
            "train={lr_scheduler_type: cosine, lr_scheduler_kwargs: {eta_min: 1e-6}}",
            "unknown key for cosine; use min_lr with lr_scheduler_type: cosine_with_min_lr",
        ),
        (
            "tune.language.target_modules=['.*[.]1.*query']",
            "expected module names in the list, got '.*[.]1.*query'; give a regular expression as one string",
        ),
        ("finetuning_type=lora", "unknown key; write tune.language.method"),
        ("cutoff_len=4096", "unknown key; write data.max_tokens"),
        ("micro_batch_size=4", "unknown key; write train.per_device_train_batch_size"),
        ("learning_rate=1e-4", "unknown key; write train.learning_rate"),
        ("data.learning_rate=1e-4", "unknown key; write train.learning_rate"),
        ("data.train[0].limit=4", "the index of a list item follows a dot: write data.train.0.limit=4"),
        # what is not here
        (
            "train.optim=grokadamw",
            "grokadamw needs a library that is not installed: pip install grokadamw; or give adamw_torch",
        ),
        ("train.use_liger_kernel=true", "true needs a library that is not installed: pip install liger-kernel; or give false"),
        (
            "data.train.0.template=lava",
            "unknown data template 'lava'; expected a shipped one or a .yaml file; did you mean 'llava'",
        ),
        ("data.train.0.join=rows.jsonl", "the template llava does not join a second file; remove the line"),
        ("model.base=./gone", "no such directory: ./gone"),
        ("data.train.0.path=folder/rows.jsonl", "no such file: folder/rows.jsonl; did you mean 'folder/row.jsonl'?"),
    ],
)
def test_a_mistake_gives_one_message_with_what_to_write(
    recipe: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert entry_point(["recipe", "check", str(recipe), override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: command line: {override}: ")
    assert f": {message}" in line


@pytest.mark.parametrize(
    "train",
    [
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_stable_steps": 0, "num_decay_steps": 10}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0, "power": 2}},
        {
            "max_steps": 12,
            "warmup_steps": 2,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 10},
        },
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"torch_compile": True, "torch_compile_mode": "default"},
        {"lr_scheduler_type": "constant", "warmup_steps": 0},
        {"dataloader_multiprocessing_context": "spawn", "dataloader_num_workers": 1},
    ],
)
def test_settings_at_their_bounds_are_valid(train: dict[str, Any]) -> None:
    assert training_errors(train) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("data:", "datas:", "x.yaml:6: datas: unknown key; did you mean 'data'?"),
        ("data:", "dataset:", "x.yaml:6: dataset: unknown key; write data.train"),
        ("output_dir: runs/first\n", "", "x.yaml:1: output_dir: required, and not given; such as output_dir: runs/first"),
    ],
)
def test_a_section_under_another_name_is_not_missing_too(recipe: Path, old: str, new: str, message: str) -> None:
    recipe.write_text(RECIPE.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load_recipe(recipe)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "divided",
    [["train.max_steps", "=", "3"], ["train.max_steps=", "3"], ["train.max_steps", "3"], ["seed=1", "train.max_steps", "=3"]],
)
def test_an_override_in_several_arguments_is_one_message(
    recipe: Path, capsys: pytest.CaptureFixture[str], divided: list[str]
) -> None:
    assert entry_point(["recipe", "check", str(recipe), *divided]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: command line: train.max_steps")
    assert line.endswith(": expected key=value without spaces: write train.max_steps=3")


@pytest.mark.parametrize("settings", ["report_to: swanlab", "use_liger_kernel: true"])
def test_a_plan_needs_no_library_of_the_run(recipe: Path, capsys: pytest.CaptureFixture[str], settings: str) -> None:
    more = ["--no-data", "--tokens", "64", f"train={{{settings}}}"]
    assert entry_point(["recipe", "check", str(recipe), more[-1]]) == 2
    assert "not installed" in capsys.readouterr().err
    assert entry_point(["plan", str(recipe), *more]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.max_steps=3"], "give keys of the recipe without dashes: train.max_steps=3"),
        (["--tune.language.r", "4"], "give keys of the recipe without dashes: tune.language.r=4"),
        (["--learning_rate", "1e-4"], "give keys of the recipe without dashes: train.learning_rate=1e-4"),
        (["--lora_r=8"], "give keys of the recipe without dashes: tune.language.r=8"),
        (["--overwrite"], "unrecognized arguments: --overwrite\n"),
    ],
)
def test_an_override_with_dashes_is_corrected_in_the_message(
    recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        entry_point(["recipe", "check", str(recipe), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_selector_with_catastrophic_backtracking_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtune.methods.selectors.SECONDS", 0.05)
    endless = compile_selector(r"((.|\w)+)+(?<!j)")
    with pytest.raises(UserError, match=r"takes more than 0\.05 s to match .*; write it without repeats inside repeats"):
        is_match(endless, "model.language_model.layers.31.self_attn.out_proj")
    assert is_match(compile_selector(r".*\.(q|v)_proj"), "layers.0.self_attn.q_proj")


def test_an_error_found_with_the_model_has_the_line_of_its_key(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.jinja").write_text("{{ messages }}", encoding="utf-8")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Nothing."}]
    Path("rows.jsonl").write_text(json.dumps({"conversations": turns}), encoding="utf-8")
    assert entry_point(["data", "show", str(recipe), "model.chat_template=t.jinja"]) == 2
    assert "error: command line: model.chat_template=t.jinja: " in capsys.readouterr().err


def test_valid_values_are_accepted_by_training_arguments(tmp_path: Path) -> None:
    """Every choice of every setting: the rules of TrainingArguments are found by those of the recipe."""
    arguments = train_arguments().arguments
    schedulers = library_fact("schedulers")
    choices: dict[str, list[Any]] = {
        name: [*schema.get("enum", ()), *(each for part in schema.get("anyOf", ()) for each in part.get("enum", ()))]
        for name, schema in train_arguments().json_schema().items()
        if name not in EARLY_STOPPING
    }
    choices["report_to"] = ["none"]  # the others ask whether they are installed, and mlflow and others change the environment
    choices["deepspeed"] = []
    tried = 0
    for name, values in choices.items():
        for value in [*values, arguments[name].default]:
            plain = value is None or isinstance(value, (bool, int, float, str))
            if not plain or arguments[name].error_message(name, value) or training_errors({name: value}):
                continue
            if name in ("torch_compile_backend", "torch_compile_mode", "ddp_backend") and value is not None:
                continue  # these set up this process
            TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **({name: value} if name != "use_cpu" else {}))
            tried += 1
    assert tried > 100
    assert set(schedulers) <= set(choices["lr_scheduler_type"])
    prefixes = LIBRARY_KEYS["train.optim"].libraries
    assert all(any(name.startswith(prefix) for name in choices["optim"]) for prefix in prefixes)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_the_names_of_optim_args_are_those_that_the_trainer_reads(tmp_path: Path, optimizer: str) -> None:
    asked = set()

    class Asked(dict[str, str]):
        def __contains__(self, name: object) -> bool:
            asked.add(name)
            return super().__contains__(name)

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim=optimizer)
    make = trainer_optimizer._OPTIMIZER_HANDLERS[OptimizerNames(optimizer)]
    make(trainer_optimizer.OptimizerContext(arguments, None, {}, {}, Asked(unknown="1")))
    assert asked == set(library_fact("optimizer_arguments")[optimizer])


def test_names_of_other_toolkits_map_to_keys_of_a_recipe(recipe: Path) -> None:
    for name, target in OTHER_NAMES.items():
        with pytest.raises(UserError) as raised:
            load_recipe(recipe, [f"{name}=1"])
        assert f"command line: {name}=1: unknown key; {'give' if target.startswith('--') else 'write'} {target}" in str(
            raised.value
        )
        if not target.startswith("--"):
            try:
                load_recipe(recipe, [f"{target.partition(':')[0]}=1"])
            except UserError as error:  # the value is wrong, and the key is not
                assert "unknown key" not in str(error), target


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps=!!int many", "'many' is not a YAML int"),
        (f"train.max_steps={'9' * 1001}", "expected a number of at most 1,000 characters, got 1,001"),
        ("model.base=!name x", "the YAML tag '!name' is not supported"),
        ("tune.language=!name {method: lora}", "the YAML tag '!name' is not supported"),
    ],
)
def test_an_invalid_yaml_value_gives_one_line(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as failed:
        load_recipe(recipe, [override, "train.weight_decay=high"])
    lines = str(failed.value).splitlines()
    assert lines[0] == f"command line: {override}: {message}"
    assert len(lines) == 2 and lines[1].startswith("command line: train.weight_decay=high: expected a number")
