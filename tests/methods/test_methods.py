"""Tuning methods: trainable and frozen parameters, and saved weights equal to the trained ones."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from programs import run_program
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtune.data.batching.collate import collate
from mmtune.data.dataset import IndexedSamples
from mmtune.data.encoding.encode import encode_sample
from mmtune.evaluation.predictions.answering import generate_answers
from mmtune.families.structure import find_components
from mmtune.methods.method_table import METHODS
from mmtune.models.load import load_trained
from mmtune.recipe.recipe import Recipe, load_recipe
from mmtune.release.merge import parity_samples
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.tuning.apply import apply_tuning, learning_rates
from mmtune.utils.errors import UserError

# The built-in architecture: 5 layers, each with q, k, v, o (128 x 128), gate, up (128 -> 352) and down (352 -> 128).
LAYERS, WIDTH, INNER = 5, 128, 352
SHAPES = [(WIDTH, WIDTH)] * 4 + [(WIDTH, INNER)] * 2 + [(INNER, WIDTH)]  # (in, out)


def total(count: Callable[[int, int], int]) -> int:
    return LAYERS * sum(count(i, o) for i, o in SHAPES)


CASES: Mapping[str, tuple[str, int]] = {
    "lora": ("{method: lora, r: 4}", total(lambda i, o: 4 * (i + o))),
    "rslora": ("{method: lora, r: 4, use_rslora: true}", total(lambda i, o: 4 * (i + o))),
    "dora": ("{method: lora, r: 4, use_dora: true}", total(lambda i, o: 4 * (i + o) + o)),
    "pissa": ("{method: lora, r: 4, init_lora_weights: pissa}", total(lambda i, o: 4 * (i + o))),
    "olora": ("{method: lora, r: 4, init_lora_weights: olora}", total(lambda i, o: 4 * (i + o))),
    "lora_ga": ("{method: lora, r: 4, init_lora_weights: lora_ga}", total(lambda i, o: 4 * (i + o))),
    "eva": ("{method: lora, r: 4, init_lora_weights: eva, eva_config: {rho: 1.0}}", total(lambda i, o: 4 * (i + o))),
    "loraplus": ("{method: lora, r: 4, loraplus_lr_ratio: 8.0}", total(lambda i, o: 4 * (i + o))),
    "adalora": ("{method: adalora, init_r: 4, target_r: 3}", total(lambda i, o: 4 * (i + o) + 4)),
    "ia3": ("{method: ia3}", LAYERS * (2 * WIDTH + INNER)),
    "oft": ("{method: oft, oft_block_size: 32}", total(lambda i, o: (i // 32) * (32 * 31 // 2))),
    "boft": ("{method: boft, boft_block_size: 4}", total(lambda i, o: (i // 4) * 4 * 4 + o)),
    "vera": ("{method: vera, r: 16}", total(lambda i, o: 16 + o)),
    "loha": ("{method: loha, r: 4}", total(lambda i, o: 2 * 4 * (i + o))),
    "miss": ("{method: miss, r: 16}", total(lambda i, o: 16 * o)),
    "shira": ("{method: shira, r: 4}", total(lambda i, o: 4 * (i + o))),
    "ln_tuning": ("{method: ln_tuning}", (2 * LAYERS + 1) * WIDTH),
    "prompt_tuning": ("{method: prompt_tuning, num_virtual_tokens: 6}", 6 * WIDTH),
    "p_tuning": (
        "{method: p_tuning, num_virtual_tokens: 6, encoder_hidden_size: 16}",
        6 * WIDTH + (WIDTH * 16 + 16) + (16 * 16 + 16) + (16 * WIDTH + WIDTH),
    ),
    "prefix_tuning": ("{method: prefix_tuning, num_virtual_tokens: 6}", 6 * LAYERS * 2 * WIDTH),
    "bottleneck": ("{method: bottleneck, bottleneck_size: 8}", 2 * LAYERS * (2 * 8 * WIDTH + 8 + WIDTH)),
    "gated_prefix": ("{method: gated_prefix, adapter_len: 6, adapter_layers: 3}", 3 * (6 * WIDTH + 4)),
    "lokr": ("{method: lokr, r: 4}", 0),  # its factors are chosen to be as square as they can be: no short closed form
}
"""Settings, and the trainable parameters of the language model by the method's own arithmetic."""

WITH_PROJECTOR = ("tune.projector={method: full, learning_rate: 1e-3}",)
SAVES = ("train.save_strategy=steps", "train.save_steps=1")

NOT_AT_ZERO = {"prompt_tuning", "p_tuning", "prefix_tuning"}
"""Methods whose virtual tokens change the output from the start, and say nothing else."""


@pytest.fixture(scope="module")
def one_batch(rows: Path, base: Path) -> dict[str, torch.Tensor]:
    processor = AutoProcessor.from_pretrained(str(base))
    samples = IndexedSamples(
        load_recipe_text(
            rows.parent, f"{{model: {{base: {base}}}, data: {{train: [{{path: {rows}, template: llava}}]}}, output_dir: x}}"
        ).data.train
    )
    return collate([encode_sample(samples[i], processor) for i in range(3)], processor.tokenizer.pad_token_id)


def load_recipe_text(folder: Path, text: str) -> Recipe:
    path = folder / "methods.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def recipe_of(name: str, rows: Path, base: Path, folder: Path, *overrides: str) -> Recipe:
    text = f"""
model: {{base: {base}}}
tune: {{projector: frozen, language: {CASES[name][0]}}}
data: {{train: [{{path: {rows}, template: llava}}]}}
train: {{max_steps: 2, per_device_train_batch_size: 4, logging_steps: 1, use_cpu: true, seed: 0, disable_tqdm: true}}
output_dir: {folder / name}
"""
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def logits_of(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        length = batch["input_ids"].shape[1]
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, -length:]


def fresh(name: str, rows: Path, base: Path, folder: Path, batch: Mapping[str, torch.Tensor]) -> PeftModel:
    recipe = recipe_of(name, rows, base, folder)
    model = AutoModelForImageTextToText.from_pretrained(str(base))
    tuned = apply_tuning(model, find_components(model), recipe.tune, steps=10, batches=[dict(batch)])
    assert isinstance(tuned, PeftModel)
    return tuned


@pytest.mark.parametrize("name", CASES)
def test_trainable_parameters_are_the_closed_form_and_step_0_equals_the_base(
    name: str, rows: Path, base: Path, tmp_path: Path, one_batch: dict[str, torch.Tensor]
) -> None:
    torch.manual_seed(0)
    tuned = fresh(name, rows, base, tmp_path, one_batch)
    trainable = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in trainable.values())
    if name != "lokr":
        assert count == CASES[name][1]
    assert 0 < count < 600_000
    assert not [n for n in trainable if "vision_tower" in n or "multi_modal_projector" in n or "lm_head" in n]
    plain = logits_of(AutoModelForImageTextToText.from_pretrained(str(base)), one_batch)
    start = logits_of(tuned, one_batch)
    if name in NOT_AT_ZERO:
        assert (start - plain).abs().max() > 1e-4
    else:
        torch.testing.assert_close(start, plain, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_steps_change_what_should_change_and_disabling_gives_the_base(
    name: str, rows: Path, base: Path, tmp_path: Path, one_batch: dict[str, torch.Tensor]
) -> None:
    torch.manual_seed(0)
    tuned = fresh(name, rows, base, tmp_path, one_batch)
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    tuned.train()
    for _ in range(3):  # where one factor of a product starts at zero, the other learns from the second step on
        optimizer.zero_grad()
        tuned(**one_batch).loss.backward()
        optimizer.step()
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
    trainable = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert changed <= trainable
    assert len(changed) > 0.8 * len(trainable), sorted(trainable - changed)
    if name not in ("pissa", "olora", "lora_ga"):  # what these take out of the base comes back when they are saved
        with tuned.disable_adapter():
            off = logits_of(tuned, one_batch)
        plain = logits_of(AutoModelForImageTextToText.from_pretrained(str(base)), one_batch)
        torch.testing.assert_close(off, plain, atol=0, rtol=0)
        assert (logits_of(tuned, one_batch) - plain).abs().max() > 1e-6


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> list[str]:
    """The cases of the selected tests: `-k NAME` trains one."""
    of_this_file = [item for item in request.session.items if item.path == request.path]
    needed = {item.callspec.params["name"] for item in of_this_file if "runs" in getattr(item, "fixturenames", ())}
    return [name for name in CASES if name in needed]


@pytest.fixture(scope="module")
def runs(
    selected: list[str], rows: Path, base: Path, one_batch: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Each selected case trained for two steps with the projector in full, and its logits as it was trained, in memory."""
    folder = tmp_path_factory.mktemp("methods")
    seen: dict[str, torch.Tensor] = {}
    module = sys.modules["mmtune.train"]
    real = module.save_tuned

    def look(model: Any, out: Path, initial: Any, first: bool) -> None:
        seen[out.parents[1].name] = logits_of(model, one_batch).contiguous()
        real(model, out, initial, first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save_tuned", look)
        for name in selected:
            train(recipe_of(name, rows, base, folder, *WITH_PROJECTOR, *SAVES), ["test"])
    save_file(seen, folder / "trained.safetensors")
    return folder


@pytest.fixture(scope="module")
def reloaded(selected: list[str], runs: Path, one_batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits of every run's adapter as plain PEFT gives them in a process of its own."""
    torch.save(one_batch, runs / "batch.pt")
    script = f"""
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
import mmtune.methods.tuners
from peft import PeftModel
from transformers import AutoModelForImageTextToText
import json
batch = torch.load("batch.pt")
length = batch["input_ids"].shape[1]
out = {{}}
for name in {selected!r}:
    config = json.load(open(f"{{name}}/adapter/adapter_config.json"))
    model = AutoModelForImageTextToText.from_pretrained(config["base_model_name_or_path"])
    model = PeftModel.from_pretrained(model, f"{{name}}/adapter").eval()
    with torch.no_grad():
        out[name] = model(**{{k: v for k, v in batch.items() if k != "labels"}}).logits[:, -length:].contiguous()
save_file(out, "logits.safetensors")
"""
    run_program(script, cwd=runs)
    return load_file(runs / "logits.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_a_saved_adapter_is_the_same_in_a_new_process(
    name: str, runs: Path, reloaded: dict[str, torch.Tensor], one_batch: dict[str, torch.Tensor], base: Path
) -> None:
    trained = load_file(runs / "trained.safetensors")[name]
    # The first three were trained beside a base with a product taken out of it, and are saved beside the base as it was.
    torch.testing.assert_close(reloaded[name], trained, atol=2e-5 if name in ("pissa", "olora", "lora_ga") else 1e-6, rtol=0)
    model, _ = load_trained(runs / name)
    torch.testing.assert_close(logits_of(model, one_batch), reloaded[name], atol=1e-6, rtol=0)
    if name in NOT_AT_ZERO:  # PEFT switches their virtual tokens off, and not the projector that trained beside them
        return
    with model.disable_adapter():
        off = logits_of(model, one_batch)
    torch.testing.assert_close(off, logits_of(AutoModelForImageTextToText.from_pretrained(str(base)), one_batch), atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_gives_the_adapter_of_the_uninterrupted_run(
    name: str, runs: Path, rows: Path, base: Path, tmp_path: Path
) -> None:
    run = RunDirectory(runs / name)
    expected = (run.adapter / "adapter_model.safetensors").read_bytes()
    shutil.copytree(run.path, tmp_path / "finished")
    run.summary.unlink()
    shutil.rmtree(run.adapter)
    try:
        train(recipe_of(name, rows, base, runs, *WITH_PROJECTOR, *SAVES), ["test"], resume=run.checkpoints / "checkpoint-1")
        assert (run.adapter / "adapter_model.safetensors").read_bytes() == expected
    finally:  # for the other tests
        shutil.rmtree(run.path)
        shutil.copytree(tmp_path / "finished", run.path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "prompt_tuning", "p_tuning", "prefix_tuning", "bottleneck", "gated_prefix"])
def test_answers_step_by_step_are_those_of_one_forward_pass(name: str, runs: Path, one_batch: dict[str, torch.Tensor]) -> None:
    model, _ = load_trained(runs / name)
    prompt = {k: v[:, :40] if v.dim() == 2 else v for k, v in one_batch.items() if k != "labels"}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    with torch.no_grad():
        cached = model.generate(**prompt, **settings, return_dict_in_generate=True)
        new = cached.sequences[:, -6:]
        whole = {
            **prompt,
            "input_ids": torch.cat([prompt["input_ids"], new], dim=1),
            "attention_mask": torch.cat([prompt["attention_mask"], torch.ones_like(new)], dim=1),
        }
        at_once = model(**whole).logits[:, -7:-1]
    torch.testing.assert_close(torch.stack(cached.logits, dim=1), at_once, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning", "prefix_tuning", "gated_prefix"])
def test_batched_answers_are_those_of_one_by_one(
    name: str, runs: Path, rows: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_trained(runs / name)
    asked: list[torch.Tensor] = []
    real = model.generate

    def generate(**inputs: Any) -> torch.Tensor:
        result = real(**inputs, output_logits=True, return_dict_in_generate=True, min_new_tokens=2)
        asked.append(result.logits[0])
        return result.sequences

    monkeypatch.setattr(model, "generate", generate)
    samples = parity_samples(recipe_of(name, rows, base, runs), 8)
    seen = []
    for size in (8, 1):
        asked.clear()
        generate_answers(model, processor, samples, max_new_tokens=2, batch_size=size)
        seen.append(torch.cat(asked).sort(dim=0).values)
    torch.testing.assert_close(*seen, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pissa", "olora", "lora_ga"])
def test_an_initialization_that_changes_the_base_is_saved_as_plain_lora(
    name: str, rows: Path, base: Path, tmp_path: Path, one_batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on disk gives the logits of the model that was trained, on the base as it was."""
    seen: dict[str, torch.Tensor] = {}
    module = sys.modules["mmtune.train"]
    real = module.save_tuned

    def look(model: Any, out: Path, initial: Any, first: bool) -> None:
        seen["logits"] = logits_of(model, one_batch)
        real(model, out, initial, first)

    monkeypatch.setattr(module, "save_tuned", look)
    recipe = recipe_of(name, rows, base, tmp_path, "tune.projector={method: full, learning_rate: 1e-3}")
    train(recipe, ["test"])
    config = json.loads((tmp_path / name / "adapter" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 8)
    model, _ = load_trained(tmp_path / name)
    torch.testing.assert_close(logits_of(model, one_batch), seen["logits"], atol=2e-5, rtol=0)


def test_components_can_have_different_ranks(rows: Path, base: Path, tmp_path: Path, one_batch: dict[str, torch.Tensor]) -> None:
    vision = "tune.vision={method: lora, r: 2, lora_alpha: 4, learning_rate: 1e-4, target_modules: '.*layers.3[.].*(q|v)_proj'}"
    recipe = recipe_of("lora", rows, base, tmp_path, vision, "tune.projector=full", "tune.language.lora_alpha=12")
    model = AutoModelForImageTextToText.from_pretrained(str(base))
    tuned = apply_tuning(model, find_components(model), recipe.tune)
    ranks: dict[str, set[tuple[int, float]]] = {}
    for name, module in tuned.named_modules():
        if hasattr(module, "lora_A"):
            part = "vision" if "vision_tower" in name else "language"
            ranks.setdefault(part, set()).add((module.r["default"], module.scaling["default"]))
            assert part == "language" or "layers.3." in name
    assert ranks == {"vision": {(2, 2.0)}, "language": {(4, 3.0)}}
    rates = learning_rates(tuned, find_components(tuned), recipe.tune, 5e-3)
    assert {rate for name, rate in rates.items() if "vision_tower" in name} == {1e-4}
    tuned.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(str(base)), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(plain, one_batch), logits_of(tuned, one_batch), atol=1e-6, rtol=0)


def test_lora_plus_learns_b_faster(rows: Path, base: Path, tmp_path: Path) -> None:
    recipe = recipe_of("loraplus", rows, base, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(str(base))
    tuned = apply_tuning(model, find_components(model), recipe.tune)
    rates = learning_rates(tuned, find_components(tuned), recipe.tune, 1e-3)
    own = METHODS["lora"].learning_rate  # the recipe names none, so it is the method's
    assert {rates[name] for name, p in tuned.named_parameters() if p.requires_grad and "lora_A" in name} == {own}
    assert {rates[name] for name, p in tuned.named_parameters() if p.requires_grad and "lora_B" in name} == {8 * own}


@pytest.mark.slow
def test_new_tokens_train_alone(rows: Path, base: Path, tmp_path: Path, one_batch: dict[str, torch.Tensor]) -> None:
    recipe = recipe_of("lora", rows, base, tmp_path, "tune.language.trainable_token_indices=[5, 9]", "train.learning_rate=1e-2")
    train(recipe, ["test"])
    model, _ = load_trained(tmp_path / "lora")
    trained = [name for name, p in model.named_parameters() if "trainable_tokens" in name]
    assert trained
    merged = model.merge_and_unload()
    before = AutoModelForImageTextToText.from_pretrained(str(base)).get_input_embeddings().weight
    after = merged.get_input_embeddings().weight
    assert set((before != after).any(dim=1).nonzero().flatten().tolist()) <= {5, 9}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tune.language.r=0"], "tune.language.r=0: expected an integer >= 1, got 0"),
        (
            ["tune.language.target_parameters=all-experts", "tune.language.lora_dropout=0.05"],
            "tune.language.lora_dropout=0.05: not supported with target_parameters: the update is added to the weight",
        ),
        (
            ["tune.language.target_parameters=all-experts", "tune.language.use_dora=true"],
            "tune.language.use_dora=true: not supported with target_parameters: PEFT has DoRA for layers only",
        ),
        (["tune.language={method: oft, target_parameters: [x]}"], "only lora adapts parameters outside of linear layers"),
        (["tune.language.target_modules=[q_prj]"], "'q_prj' matches no module of the language component; did you mean 'q_proj'"),
        (
            ["model.precision=nf4", "tune.language.init_lora_weights=pissa"],
            "decomposes full weights, and model.precision: nf4 has",
        ),
        (
            ["tune.language.use_dora=true", "tune.language.init_lora_weights=olora"],
            "cannot be saved as an adapter",
        ),
        (
            ["tune.language={method: prefix_tuning}", "train.activation_checkpointing=true"],
            "does not train with train.activation",
        ),
        (
            ["tune.language={method: loha}", "model.precision=nf4"],
            "loha does not train with model.precision: nf4; use bf16, or lora",
        ),
        (
            ["tune.language={method: lora, use_dora: true}", "model.precision=int8"],
            "dora does not train with model.precision: int8",
        ),
        (["tune.language=full", "model.precision=nf4"], "quantized weights cannot be trained"),
        (
            ["tune.language={method: oft, oft_block_size: 24}"],
            "oft_block_size: 24 does not divide the 128 inputs of model.language_model",
        ),
        (
            ["tune.language={method: lora, r: 200, init_lora_weights: pissa}"],
            "expected at most 128, the rank of model.l",
        ),
        (
            ["tune.language={method: lora, init_lora_weights: pissa, target_modules: [embed_tokens, q_proj]}"],
            "init_lora_weights: pissa works on linear layers, and model.language_model.embed_tokens is a Embedding",
        ),
        (["tune.language={method: lora, target_modules: [embed_tokens]}"], "is tied to the head"),
        (["tune.language={method: vera, target_modules: [embed_tokens]}"], "vera works on linear layers"),
        (["tune.language.trainable_token_indices=[99999]"], "expected token ids from 0 to 371, got 99999"),
        (
            ["tune.vision={method: lora, init_lora_weights: eva}", "tune.language=frozen"],
            "init_lora_weights: eva is supported in tune.language only",
        ),
        (["train.activation_checkpointing_kwargs={use_reentrant: true}"], "gives no gradients below frozen inputs"),
        (
            ["tune.vision=lora", "tune.language={method: full, target_modules: [q_proj]}", "model.precision=int8"],
            "quantized weights cannot be trained",
        ),
        (
            ["tune.vision=full", "tune.projector=full", "tune.language=frozen", "model.precision=nf4"],
            "full without an adapter saves the whole model",
        ),
        (["tune.language={method: adalora, init_r: 4, target_r: 4}"], "target_r: expected less than init_r: 4, got 4"),
        (["tune.language={method: bottleneck, placement: hoolsby}"], "did you mean 'houlsby'"),
        (["tune.language={method: gated_prefix, adapter_layers: 6}"], "adapter_layers"),
        (["tune.language={method: prompt_tuning, num_virtual_tokens: 0}"], "expected an integer >= 1, got 0"),
    ],
)
def test_mistakes_are_reported_before_training(
    overrides: list[str], message: str, rows: Path, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        train(recipe_of("lora", rows, base, tmp_path, *overrides), ["test"])
    assert message in str(caught.value)
    assert not (tmp_path / "lora").exists()
