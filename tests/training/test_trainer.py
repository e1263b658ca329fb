"""The trainer: equal to plain transformers + PEFT, losses weighted by tokens, and reports of rows that could not train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtune.data.batching.batch_sampler import Mixture, MixtureBatchSampler
from mmtune.data.batching.collate import Collator, collate
from mmtune.data.data_report import DataReport
from mmtune.data.dataset import IndexedSamples, SampleEncoder, TrainingSet, dummy_sample
from mmtune.data.encoding.encode import encode_sample
from mmtune.evaluation.answers_file import read_answers
from mmtune.evaluation.evaluate import evaluate
from mmtune.families.structure import find_components
from mmtune.models.load import load_trained
from mmtune.objectives.sft import SupervisedTuning
from mmtune.recipe.recipe import Recipe
from mmtune.release.merge import merge
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.training.callbacks import DisableInputRequireGrads
from mmtune.training.trainer import TuningTrainer
from mmtune.training.training_arguments import build_training_arguments
from mmtune.tuning.apply import apply_tuning, learning_rates
from mmtune.utils.errors import CheckFailed, UserError


def make_trainer(recipe: Recipe, base: Path, **settings: object) -> TuningTrainer:
    processor = AutoProcessor.from_pretrained(str(base))
    samples = IndexedSamples(recipe.data.train)
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(str(base))
    components = find_components(model)
    model = apply_tuning(model, components, recipe.tune)
    with torch.no_grad():  # LoRA's B starts at zero and would leave A without a gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return TuningTrainer(
        model=model,
        args=build_training_arguments(recipe),
        train_dataset=TrainingSet(samples, SampleEncoder(processor, recipe.data)),
        data_collator=Collator(processor.tokenizer.pad_token_id),
        batches=MixtureBatchSampler(
            Mixture.by_repeats([len(samples)], [1.0]), seed=0, size=recipe.train["per_device_train_batch_size"]
        ),
        dummy_batch=collate([dummy_sample(processor)], 0),
        processing_class=processor,
        callbacks=[DisableInputRequireGrads()],
        data_report=DataReport(rows=len(samples)),
        objective=SupervisedTuning(recipe.objective),
        max_bad_fraction=recipe.data.max_bad_fraction,
        learning_rates=learning_rates(model, find_components(model), recipe.tune, recipe.train["learning_rate"]),
        **settings,
    )


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def test_loss_and_gradients_equal_plain_transformers_and_peft(make_recipe: Callable[..., Recipe], base: Path) -> None:
    recipe = make_recipe()
    trainer = make_trainer(recipe, base)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
    del batch["rows"], batch["sizes"], batch["faults"]

    plain = AutoModelForImageTextToText.from_pretrained(str(base))
    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    plain = get_peft_model(
        plain, LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=["multi_modal_projector"])
    )
    ours = dict(trainer.model.named_parameters())
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == {n for n, p in ours.items() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(ours[name])

    plain.train()
    reference = plain(**batch).loss
    reference.backward()
    supervised = (batch["labels"][:, 1:] != -100).sum()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=supervised)
    loss.backward()

    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=0)
    expected, actual = gradients(plain), gradients(trainer.model)
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=0)


def test_accumulated_batches_give_the_gradient_of_one_large_batch(make_recipe: Callable[..., Recipe], base: Path) -> None:
    def after_one_step(*overrides: str) -> dict[str, torch.Tensor]:
        # The sum of gradients is what must agree: no clipping, and plain SGD, whose step is the gradient itself.
        recipe = make_recipe("train.max_steps=1", "train.optim=sgd", "train.max_grad_norm=0", *overrides)
        trainer = make_trainer(recipe, base)
        trainer.train()
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    large = after_one_step("train.per_device_train_batch_size=12")
    small = after_one_step("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=12")
    for name in large:
        torch.testing.assert_close(small[name], large[name], atol=1e-6, rtol=0)


def test_optimizer_groups_follow_the_components(make_recipe: Callable[..., Recipe], base: Path) -> None:
    trainer = make_trainer(make_recipe("tune.projector.learning_rate=0.125", "train.learning_rate=0.5"), base)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {
        name: 0.125 if "multi_modal_projector" in name else 0.5
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_frozen_tower_takes_no_part_in_the_backward_pass(
    make_recipe: Callable[..., Recipe], base: Path, checkpointing: str
) -> None:
    trainer = make_trainer(make_recipe("train.max_steps=1", f"train.activation_checkpointing={checkpointing}"), base)
    tower = trainer.model.get_submodule("base_model.model.model.vision_tower")
    needs_gradient = []
    for module in tower.modules():
        module.register_forward_hook(lambda _m, _i, out: needs_gradient.append(getattr(out, "requires_grad", False)))
    trainer.train()
    assert needs_gradient
    assert not any(needs_gradient)


def test_checkpointing_changes_no_gradient(make_recipe: Callable[..., Recipe], base: Path) -> None:
    def after(checkpointing: str) -> dict[str, torch.Tensor]:
        overrides = ("train.max_steps=1", "train.optim=sgd", f"train.activation_checkpointing={checkpointing}")
        trainer = make_trainer(make_recipe(*overrides), base)
        trainer.train()
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    plain, checkpointed = after("false"), after("true")
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], atol=1e-6, rtol=0)


def test_two_runs_of_a_seed_give_the_same_losses(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    def losses(name: str, seed: int) -> list[float]:
        run = tmp_path / name
        train(make_recipe(f"output_dir={run}", f"train.seed={seed}"), ["test"])
        return [json.loads(line)["loss"] for line in RunDirectory(run).metrics.read_text().splitlines()]

    first = losses("first", 0)
    assert len(first) == 3
    assert losses("second", 0) == first
    assert losses("third", 1) != first


def bad_rows(rows: Path, tmp_path: Path, *bad: int) -> Path:
    """`rows` with some images damaged inside, where no header and no end shows it."""
    row_list = json.loads(rows.read_text())
    for number in bad:
        whole = (rows.parent / row_list[number]["image"]).read_bytes()
        middle = len(whole) // 2
        (tmp_path / f"cut{number}.png").write_bytes(whole[:middle] + bytes(40) + whole[middle + 40 :])
    for number, row in enumerate(row_list):
        row["image"] = str(tmp_path / f"cut{number}.png") if number in bad else str(rows.parent / row["image"])
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(row_list))
    return path


def test_a_damaged_image_stops_the_run_and_is_named(make_recipe: Callable[..., Recipe], rows: Path, tmp_path: Path) -> None:
    path = bad_rows(rows, tmp_path, 5)
    recipe = make_recipe(f"data.train.0.path={path}", "data.train.0.media_root=/")
    with pytest.raises(UserError, match=r"1 of 12 rows cannot train.*\n.*bad\.json\[5\]: image: cannot decode"):
        train(recipe, ["test"])
    assert not Path(recipe.output_dir).exists()  # it was in the first step's batch: the run never trained


def test_damaged_images_are_counted_where_the_recipe_allows_them(
    make_recipe: Callable[..., Recipe], rows: Path, tmp_path: Path
) -> None:
    path = bad_rows(rows, tmp_path, 2, 7)
    recipe = make_recipe(
        f"data.train.0.path={path}",
        "data.train.0.media_root=/",
        "data.max_bad_fraction=0.2",
        "train.max_steps=24",
        "train.per_device_train_batch_size=1",  # some batches hold nothing else: the steps still add up
    )
    summary = train(recipe, ["test"])
    assert summary["quarantined"] == 2
    assert (summary["skipped_steps"], summary["steps_without_samples"]) == (4, 4)  # two rows, two epochs
    records = [json.loads(line) for line in RunDirectory(Path(recipe.output_dir)).metrics.read_text().splitlines()]
    assert len(records) == 20 and min(record["loss"] for record in records) > 0


def test_a_loss_that_is_not_a_number_stops_the_run(make_recipe: Callable[..., Recipe], base: Path) -> None:
    with pytest.raises(CheckFailed, match=r"the gradients of step [2-6] are not finite; .*rows\.json\[\d+\], rows\.json\[\d+\]"):
        train(make_recipe("train.learning_rate=1e30", "train.max_grad_norm=0", "train.max_steps=6"), ["test"])


def test_the_longest_allowed_sample_trains_and_one_more_token_does_not(make_recipe: Callable[..., Recipe], base: Path) -> None:
    processor = AutoProcessor.from_pretrained(str(base))
    recipe = make_recipe()
    lengths = [encode_sample(sample, processor)["input_ids"].shape[1] for sample in IndexedSamples(recipe.data.train)]
    longest = max(lengths)
    assert train(make_recipe(f"data.max_tokens={longest}", "train.num_train_epochs=1"), ["test"])["dropped_over_length"] == 0
    with pytest.raises(UserError, match=f"{longest} tokens, more than data.max_tokens: {longest - 1}"):
        train(make_recipe(f"data.max_tokens={longest - 1}", f"output_dir={recipe.output_dir}2"), ["test"])
    dropped = make_recipe(f"data.max_tokens={longest - 1}", "data.over_length=drop_sample", f"output_dir={recipe.output_dir}3")
    assert train(dropped, ["test"])["dropped_over_length"] == lengths.count(longest)


def test_a_first_batch_of_bad_rows_and_accumulated_ones_are_survived(
    make_recipe: Callable[..., Recipe], rows: Path, tmp_path: Path
) -> None:
    path = bad_rows(rows, tmp_path, *range(6))
    recipe = make_recipe(
        f"data.train.0.path={path}",
        "data.train.0.media_root=/",
        "data.max_bad_fraction=0.5",
        "train.max_steps=6",
        "train.per_device_train_batch_size=1",
        "train.gradient_accumulation_steps=2",
        "train.train_sampling_strategy=sequential",  # the first three steps hold bad rows only
    )
    assert train(recipe, ["test"])["quarantined"] == 6
    lines = RunDirectory(Path(recipe.output_dir)).metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 5, 6]


def test_a_run_shorter_than_its_logging_keeps_the_last_loss(make_recipe: Callable[..., Recipe]) -> None:
    for number, setting in enumerate(("train.logging_steps=100", "train.logging_strategy='no'")):
        recipe = make_recipe(setting, f"output_dir={{}}{number}".format(make_recipe().output_dir))
        train(recipe, ["test"])
        run = RunDirectory(Path(recipe.output_dir))
        assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [3]


def test_the_logged_rate_is_the_runs_own(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe("train.lr_scheduler_type=constant", "tune.projector.learning_rate=0.125", "train.learning_rate=0.03125")
    train(recipe, ["test"])
    lines = RunDirectory(Path(recipe.output_dir)).metrics.read_text().splitlines()
    assert {json.loads(line)["learning_rate"] for line in lines} == {0.03125}
    assert {json.loads(line)["learning_rate/projector"] for line in lines} == {0.125}


@pytest.mark.slow
def test_adaloras_loss_does_not_depend_on_how_a_step_is_divided(make_recipe: Callable[..., Recipe]) -> None:
    """PEFT adds the regularization in every forward pass; a step of two passes has it once all the same."""
    losses = []
    for size, passes in ((4, 1), (2, 2)):
        recipe = make_recipe(
            "tune.language={method: adalora, orth_reg_weight: 5.0}",
            f"train.per_device_train_batch_size={size}",
            f"train.gradient_accumulation_steps={passes}",
        )
        train(recipe, ["test"], overwrite=True)
        lines = RunDirectory(Path(recipe.output_dir)).metrics.read_text(encoding="utf-8").splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert all(abs(one - two) < 1e-4 for one, two in zip(*losses, strict=True)), losses


@pytest.mark.slow
def test_a_compiled_model_keeps_its_method(make_recipe: Callable[..., Recipe]) -> None:
    """Losses with `torch_compile` are those without, for a method that shifts the logits by its virtual tokens."""
    losses = []
    for compiled in ("false", "true"):
        recipe = make_recipe(
            "tune={projector: frozen, language: {method: prompt_tuning, num_virtual_tokens: 3}}",
            f"train={{max_steps: 1, logging_steps: 1, use_cpu: true, torch_compile: {compiled}}}",
            *(["train.torch_compile_backend=eager"] if compiled == "true" else []),
        )
        train(recipe, ["test"], overwrite=True)
        losses.append(json.loads(RunDirectory(Path(recipe.output_dir)).metrics.read_text().splitlines()[0])["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_run_has_its_data_report_while_it_trains(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mmtune.train.fit", killed)
    with pytest.raises(ZeroDivisionError):
        train(recipe := make_recipe(), ["test"])
    assert json.loads(RunDirectory(Path(recipe.output_dir)).data_report.read_text())["rows"] == 12


def test_an_earlier_run_outlives_a_failed_start(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe("train.max_steps=1")
    train(recipe, ["first"])
    before = {path: path.read_bytes() for path in Path(recipe.output_dir).rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="matches no module"):
        train(make_recipe("tune.language.target_modules=[nonsense]"), ["second"], overwrite=True)
    assert {path: path.read_bytes() for path in Path(recipe.output_dir).rglob("*") if path.is_file()} == before
    elsewhere = f"output_dir={tmp_path / 'new'}"
    with pytest.raises(UserError, match="matches no module"):
        train(make_recipe("tune.language.target_modules=[nonsense]", elsewhere), ["third"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "run"]


def test_a_run_does_not_replace_what_it_starts_from(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe("train.max_steps=1", "tune.language=full", "tune.vision=full")
    train(recipe, ["test"])
    run = RunDirectory(Path(recipe.output_dir))
    with pytest.raises(UserError, match=r"output_dir: .* contains .*model, which is still needed"):
        train(make_recipe(f"model.base={run.model}"), ["test"], overwrite=True)
    assert run.model.is_dir()


@pytest.mark.slow
def test_half_precision_trains_answers_and_loads(make_recipe: Callable[..., Recipe], rows: Path) -> None:
    recipe = make_recipe(
        "model.precision=bf16",
        f"evaluate={{data: [{{path: {rows}, template: llava}}], leakage: warn, max_new_tokens: 4}}",
        "train.activation_checkpointing=true",
    )
    assert train(recipe, ["test"])["questions"] == 12
    model, processor = load_trained(Path(recipe.output_dir))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    assert recipe.evaluate is not None
    answers = [answer.prediction for answer in evaluate(model, processor, recipe.evaluate)]
    assert answers == [a.prediction for a in read_answers(RunDirectory(Path(recipe.output_dir)).answers("after"))]


@pytest.mark.slow
def test_stop_tokens_are_kept_with_the_adapter(make_recipe: Callable[..., Recipe], base: Path, tmp_path: Path) -> None:
    silent = tmp_path / "base"
    shutil.copytree(base, silent)
    config = json.loads((silent / "generation_config.json").read_text())
    stop = config.pop("eos_token_id")
    (silent / "generation_config.json").write_text(json.dumps(config))
    recipe = make_recipe(f"model.base={silent}")
    train(recipe, ["test"])
    model, _ = load_trained(Path(recipe.output_dir))
    assert stop in model.generation_config.eos_token_id
    merge(Path(recipe.output_dir), tmp_path / "out", count=2)
    assert stop in json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]


def test_a_run_may_move_with_the_base_it_assembled(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe("model.base=builtin:tiny-llava-untrained", "train.max_steps=1")
    train(recipe, ["test"])
    Path(recipe.output_dir).rename(tmp_path / "moved")
    model, _ = load_trained(tmp_path / "moved")
    assert model.get_base_model().config.model_type == "llava"


def test_held_out_rows_are_read_before_weights(make_recipe: Callable[..., Recipe], rows: Path, tmp_path: Path) -> None:
    (tmp_path / "no_weights").mkdir()  # loading it would be another error
    (tmp_path / "no_weights" / "config.json").write_text('{"model_type": "llava"}')
    row_list = json.loads(rows.read_text())
    row_list[3]["image"] = "gone.png"
    spoilt = rows.parent / "held_out.json"
    spoilt.write_text(json.dumps(row_list))
    section = f"evaluate={{data: [{{path: {spoilt}, template: llava}}]}}"
    with pytest.raises(UserError, match=r"1 of 12 rows cannot be evaluated:\n  held_out\.json\[3\]: image: no such file"):
        train(make_recipe(section, f"model.base={tmp_path / 'no_weights'}"), ["test"])
