"""Soft verbalizers: label vectors that train alone, and scores equal to the closed form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from mmtune.data.dataset import IndexedSamples, iterate_rows
from mmtune.data.encoding.encode import IGNORE_INDEX, encode_choices
from mmtune.data.encoding.encoding_checks import label_tokens
from mmtune.data.message import Sample
from mmtune.evaluation.predictions.choices import score_choices
from mmtune.families.structure import find_components
from mmtune.models.checkpoints.checkpoint_files import save_checkpoint
from mmtune.models.load import load_trained
from mmtune.planning.memory import estimate_memory
from mmtune.recipe.recipe import Recipe, Source, load_recipe
from mmtune.release.merge import merge
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.tuning.apply import apply_tuning
from mmtune.utils.errors import UserError

LABELS = ("yes", "no", "7")
LABELS_ONLY = "{method: lora, target_modules: [], soft_verbalizer: ['yes', 'no', '7']}"
WITH_PREFIX = "{method: gated_prefix, adapter_len: 4, soft_verbalizer: ['yes', 'no', '7']}"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in architecture with random weights and a head of its own."""
    from mmtune.builtin.tiny_checkpoint import build_untrained

    model, processor = build_untrained(seed=0)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)))
    out = tmp_path_factory.mktemp("untied") / "model"
    save_checkpoint(model, processor, out)
    return out


@pytest.fixture(scope="module")
def labelled(rows: Path) -> Path:
    """Rows with an image and a label."""
    path = rows.parent / "labels.json"
    images = [row["image"] for row in json.loads(rows.read_text(encoding="utf-8"))]
    table = [{"image": image, "label": LABELS[number % 3]} for number, image in enumerate(images)]
    path.write_text(json.dumps(table), encoding="utf-8")
    return path


def _recipe(language: str, labelled: Path, base: Path, out: Path, *overrides: str) -> Recipe:
    path = out.with_suffix(".yaml")
    path.write_text(
        f"model: {{base: {base}}}\ntune: {{vision: frozen, projector: frozen, language: {language}}}\n"
        f"data: {{train: [{{path: {labelled}, template: classification, verbalizer: {{'yes': 'yes', 'no': 'no', '7': '7'}}}}]}}\n"
        f"train: {{max_steps: 2, learning_rate: 0.5, per_device_train_batch_size: 6}}\noutput_dir: {out}\n",
        encoding="utf-8",
    )
    return load_recipe(path, overrides)


def _samples(labelled: Path) -> list[Sample]:
    verbalizer = {label: label for label in LABELS}
    return list(iterate_rows(IndexedSamples([Source(path=str(labelled), template="classification", verbalizer=verbalizer)])))[:4]


def _closed_form(base: Any, head: torch.Tensor, embeddings: torch.Tensor, sample: Sample, processor: Any) -> list[float]:
    """Log-likelihoods of the choices of plain transformers: hidden states of the base, times a head with the labels' vectors."""
    scores = []
    base.get_input_embeddings().weight.data = embeddings
    for encoded in encode_choices(sample, processor):
        labels = encoded.pop("labels")[0]
        answer = (labels != IGNORE_INDEX).nonzero()[:, 0]  # the label and the end of turn
        assert len(answer) == 2
        with torch.no_grad():
            hidden = base.model(**encoded).last_hidden_state[0]
        log_probabilities = (hidden[answer - 1] @ head.T).log_softmax(-1)
        scores.append(float(log_probabilities[[0, 1], labels[answer]].sum()))
    return scores


@pytest.mark.parametrize("tied", [False, True])
def test_scores_are_hidden_states_times_label_vectors(
    labelled: Path, base: Path, untied: Path, tmp_path: Path, tied: bool
) -> None:
    """The expected scores: the hidden state of the plain base at each position, times a head with the labels' vectors."""
    path = base if tied else untied
    recipe = _recipe(LABELS_ONLY, labelled, path, tmp_path / "run")
    processor = _processor(path)
    tokens = label_tokens(processor, LABELS)
    model = AutoModelForImageTextToText.from_pretrained(str(path))
    tuned = apply_tuning(model, find_components(model), recipe.tune, label_tokens=tokens)
    [vectors] = [p for p in tuned.parameters() if p.requires_grad]
    assert vectors.shape == (3, 128)
    generator = torch.Generator().manual_seed(3)
    vectors.data = torch.randn(vectors.shape, generator=generator)

    plain = AutoModelForImageTextToText.from_pretrained(str(path)).eval()
    head = plain.lm_head.weight.detach().clone()
    assert not torch.allclose(head[tokens], vectors)
    head[tokens] = vectors.detach()
    embeddings = head if tied else plain.get_input_embeddings().weight.detach().clone()
    samples = _samples(labelled)
    expected = [_closed_form(plain, head, embeddings, sample, processor) for sample in samples]
    scores = score_choices(tuned.eval(), processor, samples, batch_size=8)
    for own, reference in zip(scores, expected, strict=True):
        assert own == pytest.approx(reference, abs=1e-4)


def test_gradients_are_probabilities_times_hidden_states(labelled: Path, untied: Path, tmp_path: Path) -> None:
    """Of the cross-entropy at the answer: (p - 1) h for the row's label and p h for the others."""
    recipe, processor = _recipe(LABELS_ONLY, labelled, untied, tmp_path / "run"), _processor(untied)
    model = AutoModelForImageTextToText.from_pretrained(str(untied))
    tokens = label_tokens(processor, LABELS)
    tuned = apply_tuning(model, find_components(model), recipe.tune, label_tokens=tokens).eval()
    encoded = encode_choices(_samples(labelled)[0], processor)[1]
    labels = encoded.pop("labels")[0]
    position = int((labels != IGNORE_INDEX).nonzero()[0])
    logits = tuned(**encoded).logits[0, position - 1]
    torch.nn.functional.cross_entropy(logits[None], labels[position][None]).backward()
    plain = AutoModelForImageTextToText.from_pretrained(str(untied)).eval()
    with torch.no_grad():
        hidden = plain.model(**encoded).last_hidden_state[0, position - 1]
        probabilities = (hidden @ plain.lm_head.weight.T).softmax(-1)[tokens]
    expected = (probabilities - torch.tensor([0.0, 1.0, 0.0]))[:, None] * hidden
    [vectors] = [p for p in tuned.parameters() if p.requires_grad]
    assert vectors.grad is not None
    torch.testing.assert_close(vectors.grad, expected, atol=1e-6, rtol=1e-4)


def test_only_the_rows_of_the_labels_change_in_a_merge(labelled: Path, untied: Path, tmp_path: Path) -> None:
    train(_recipe(LABELS_ONLY, labelled, untied, tmp_path / "run"), ["test"])
    adapter = tmp_path / "run" / "adapter"
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(str(untied)), str(adapter))
    assert json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["trainable_token_indices"] == {
        "lm_head": label_tokens(_processor(untied), LABELS)
    }
    merge(tmp_path / "run", tmp_path / "merged", count=2)
    merged = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "merged")).state_dict()
    before = AutoModelForImageTextToText.from_pretrained(str(untied)).state_dict()
    assert merged.keys() == before.keys()
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert changed == {"lm_head.weight"}
    rows = (merged["lm_head.weight"] != before["lm_head.weight"]).any(dim=1).nonzero().flatten().tolist()
    assert rows == sorted(label_tokens(_processor(untied), LABELS))
    torch.testing.assert_close(merged["lm_head.weight"], plain.merge_and_unload().state_dict()["lm_head.weight"], atol=0, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_labels_train_beside_a_prefix_and_resume(labelled: Path, base: Path, untied: Path, tmp_path: Path, tied: bool) -> None:
    path, processor = (base if tied else untied), _processor(untied)
    recipe = _recipe(
        WITH_PREFIX,
        labelled,
        path,
        tmp_path / "run",
        "train.save_strategy=steps",
        "train.save_steps=1",
        "train.save_total_limit=2",
    )
    train(recipe, ["test"])
    run = RunDirectory(tmp_path / "run")
    whole = load_trained(run.path)[0].eval()
    run.summary.unlink()
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.path / "checkpoints" / "checkpoint-2")
    train(recipe, ["test"], resume=True)
    resumed = load_trained(run.path)[0].eval()
    scores, again = (score_choices(model, processor, _samples(labelled), batch_size=8) for model in (whole, resumed))
    assert scores == again
    vectors = whole.get_output_embeddings().token_adapter.get_merged_weights(["default"])
    before = AutoModelForImageTextToText.from_pretrained(str(path)).lm_head.weight
    changed = (vectors != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == sorted(label_tokens(processor, LABELS))


def test_the_memory_of_labels_is_predicted(labelled: Path, untied: Path, tmp_path: Path) -> None:
    estimate = estimate_memory(_recipe(LABELS_ONLY, labelled, untied, tmp_path / "run"), tokens=64)
    assert estimate.trainable == 3 * 128 * 4


@pytest.mark.parametrize(
    ("language", "message"),
    [
        (LABELS_ONLY.replace("'7'", "'larger picture'"), "'larger picture' is 5 tokens ('l', 'ar', 'g', 'er', ' picture')"),
        (LABELS_ONLY.replace("'7'", "yes"), "expected two or more different labels, got ['yes', 'no', 'yes']"),
        ("{method: lora, soft_verbalizer: [yes]}", "expected two or more different labels"),
        (
            "{method: lora, soft_verbalizer: ['yes', 'no'], trainable_token_indices: [3]}",
            "not supported with trainable_token_indices",
        ),
        ("{method: prompt_tuning, soft_verbalizer: ['yes', 'no']}", "unknown key"),
        ("{method: gated_prefix, trainable_token_indices: [3]}", "write soft_verbalizer"),
    ],
)
def test_wrong_labels_are_errors_before_weights_load(
    labelled: Path, untied: Path, tmp_path: Path, language: str, message: str
) -> None:
    with pytest.raises(UserError) as error:
        train(_recipe(language, labelled, untied, tmp_path / "run"), ["test"])
    assert message in str(error.value)


def _processor(path: Path) -> Any:
    from mmtune.models.load import resolve_model
    from mmtune.recipe.recipe import ModelSection

    return resolve_model(ModelSection(base=str(path))).processor
