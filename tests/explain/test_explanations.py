"""Explanations of an answer against plain transformers, numerical derivatives, and every layout of pixels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import CASES
from PIL import Image

from mmtune.data.message import RowError, Sample, text_message
from mmtune.explain.explained_inputs import explained_inputs, mean_color
from mmtune.explain.explanation import CellScores, Explanation, cell_edges, cell_grid, mass_inside, top_cells
from mmtune.explain.explanation_methods import EXPLANATION_METHODS, answer_to_explain, explain
from mmtune.models.checkpoints.trained_weights import find_trained_weights
from mmtune.models.load import load_trained
from mmtune.models.tiny.tiny_bases import write_tiny_base
from mmtune.train import train
from mmtune.utils.errors import UserError

ANSWER = "3 7. Answer: 7"
LAYOUTS = ("llava", "llava_next", "qwen2_5_vl", "internvl")
"""A picture, tiles with an overview, patches in rows, tiles in the order of the picture."""


def picture(path: Path, size: tuple[int, int] = (32, 32), low: int = 0, high: int = 256) -> Path:
    pixels = np.random.default_rng(0).integers(low, high, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def asked(images: list[Path], text: str = "Which is larger?", answer: str = ANSWER) -> Sample:
    blocks = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return Sample("row", [{"role": "user", "content": blocks}, text_message("assistant", answer)])


def plain_log_probabilities(
    model: Any, processor: Any, image: Image.Image, answer: str, replaced: tuple[int, ...] = ()
) -> torch.Tensor:
    """Of the answer's tokens, by plain transformers; the embeddings at `replaced` are the mean of the embedding matrix."""
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which is larger?"}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    ids = processor(images=[image], text=[prompt], return_tensors="pt")
    tokens = processor.tokenizer(answer, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        whole = torch.cat([ids["input_ids"], tokens], dim=1)
        embeddings = model.get_input_embeddings().weight[whole]
        embeddings[0, list(replaced)] = model.get_input_embeddings().weight.mean(dim=0)
        features = torch.cat(list(model.model.get_image_features(ids["pixel_values"].to(embeddings.dtype)).pooler_output))
        embeddings[whole == processor.image_token_id] = features
        logits = model(inputs_embeds=embeddings).logits[0, -tokens.shape[1] - 1 : -1]
    return logits.log_softmax(dim=-1).gather(-1, tokens[0, :, None])[:, 0]


def test_occlusion_is_the_difference_of_two_plain_forward_passes(answering_llava: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = answering_llava
    path = picture(tmp_path / "a.png", (40, 24))
    image = Image.open(path).convert("RGB")
    explanation = explain(model, processor, asked([path]), grid=4, batch_size=3)
    before = plain_log_probabilities(model, processor, image, ANSWER)
    assert "".join(token.text for token in explanation.tokens) == ANSWER
    assert [token.log_probability for token in explanation.tokens] == pytest.approx(before.tolist(), abs=1e-4)
    [cells] = explanation.images
    assert cells.scores.shape == (len(before), 2, 4)
    for row, column in ((0, 0), (1, 2), (1, 3)):
        box = (column * 10, row * 12, column * 10 + 10, row * 12 + 12)
        assert cells.cell_box(row, column) == box
        occluded = image.copy()
        occluded.paste(tuple(np.asarray(image).reshape(-1, 3).mean(axis=0).round().astype(int)), box)
        expected = before - plain_log_probabilities(model, processor, occluded, ANSWER)
        assert cells.scores[:, row, column] == pytest.approx(expected.numpy(), abs=1e-4)
        assert np.abs(cells.scores[:, row, column]).max() > 1e-3
    prompt = processor.tokenizer.tokenize("Which is larger?")
    assert [word.text for word in explanation.words] == ["Which", "is", "larger?"]
    start = explained_inputs(asked([path]), processor).words[0].positions[0]
    words = {"Which": (start,), "is": (start + 1,), "larger?": tuple(range(start + 2, start + len(prompt)))}
    for word in explanation.words:
        expected = before - plain_log_probabilities(model, processor, image, ANSWER, words[word.text])
        assert word.scores == pytest.approx(expected.tolist(), abs=1e-4)
        assert max(map(abs, word.scores)) > 1e-3


def in_float64(model: Any) -> Any:
    """A copy that computes in fp64 throughout; transformers' RMSNorm computes in fp32."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape[0], child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double()


def test_gradient_x_input_is_the_numerical_derivative_towards_the_occluded_input(
    answering_llava: tuple[Any, Any], tmp_path: Path
) -> None:
    model, processor = answering_llava
    model = in_float64(model)
    path = picture(tmp_path / "a.png")
    image = Image.open(path).convert("RGB")
    explanation = explain(model, processor, asked([path]), "gradient_x_input", grid=4)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which is larger?"}]}]
    turns.append({"role": "assistant", "content": [{"type": "text", "text": ANSWER}]})
    inputs = processor(images=[image], text=[processor.apply_chat_template(turns)], return_tensors="pt")
    count = len(explanation.tokens)

    def log_probabilities(pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], pixel_values=pixels).logits[0]
        start = (inputs["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids("<|assistant|>")).nonzero()[-1, 0]
        chosen = inputs["input_ids"][0, start + 1 : start + 1 + count]
        return logits[start : start + count].log_softmax(dim=-1).gather(-1, chosen[:, None])[:, 0]

    whole = inputs["pixel_values"].double()
    for row, column in ((0, 1), (3, 2)):
        occluded = image.copy()
        occluded.paste(mean_color(image), (column * 8, row * 8, column * 8 + 8, row * 8 + 8))
        difference = whole - processor.image_processor([occluded], return_tensors="pt")["pixel_values"].double()
        step = 1e-5
        slope = (log_probabilities(whole + step * difference) - log_probabilities(whole - step * difference)) / (2 * step)
        assert explanation.images[0].scores[:, row, column] == pytest.approx(slope.numpy(), rel=1e-5, abs=1e-8)
        assert np.abs(slope.numpy()).max() > 1e-3


@pytest.mark.parametrize("family", LAYOUTS)
def test_both_methods_agree_on_a_small_change_in_every_layout_of_pixels(family: str, tmp_path: Path) -> None:
    """The image differs little from its mean, so that occlusion is almost linear; two images with three by two cells."""
    base = CASES[family].base
    model, processor = load_trained(
        find_trained_weights(write_tiny_base(base, tmp_path / "base")), chat_template=base.required_template
    )
    model.double()
    sample = asked(
        [picture(tmp_path / "a.png", (90, 60), 126, 131), picture(tmp_path / "b.png", (30, 60), 126, 131)], answer="red"
    )
    occluded, estimated = (explain(model, processor, sample, method, grid=3) for method in EXPLANATION_METHODS)
    assert [image.scores.shape[1:] for image in occluded.images] == [(2, 3), (3, 2)]
    for exact, estimate in zip(occluded.images, estimated.images, strict=True):
        assert np.abs(exact.scores).max() > 1e-6
        assert estimate.scores == pytest.approx(exact.scores, abs=0.15 * np.abs(exact.scores).max())
    assert {word.text for word in occluded.words} >= {"Which", "is", "larger?"}


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_a_run_with_an_adapter_is_explained_in_low_precision(
    make_recipe: Callable[..., Any], tmp_path: Path, precision: str
) -> None:
    recipe = make_recipe(f"model.precision={precision}", "train.max_steps=1")
    train(recipe, ["test"])
    model, processor = load_trained(find_trained_weights(Path(recipe.output_dir)))
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    sample = asked([picture(tmp_path / "a.png")])
    for method in EXPLANATION_METHODS:
        explanation = explain(model, processor, sample, method, grid=2)
        assert np.isfinite(explanation.images[0].scores).all()
        assert np.abs(explanation.images[0].scores).max() > 0
        assert Explanation.from_dict(explanation.to_dict()).to_dict() == explanation.to_dict()
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_question_without_an_image_has_scores_of_words(answering_llava: tuple[Any, Any]) -> None:
    for method in EXPLANATION_METHODS:
        explanation = explain(*answering_llava, asked([]), method)
        assert explanation.images == ()
        assert len(explanation.words) == 3


def test_words_leave_out_control_tokens_and_split_chinese(untrained: tuple[Any, Any], tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    written = asked([path], text="<|user|> is\n\n 红色 <image>x")
    words = [word.text for word in explained_inputs(written, untrained[1]).words]
    assert words == ["<|user|>", "is", "红", "色", "<image>x"]  # typed, so it is text and no control token


def test_a_character_of_several_tokens_is_the_text_of_the_last_one(untrained: tuple[Any, Any]) -> None:
    tokens = explain(*untrained, asked([], answer="7 红é")).tokens
    assert [token.text for token in tokens] == ["7", " ", "\ufffd", "\ufffd", "红", "\ufffd", "é"]


def test_the_models_own_answer_is_explained(answering_llava: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = answering_llava
    question = Sample("row", asked([picture(tmp_path / "a.png")]).messages[:-1])
    sample, generated = answer_to_explain(model, processor, question, 4)
    assert len(sample.messages) == 2
    [text] = sample.messages[-1]["content"]
    encoded = processor.tokenizer(text["text"], add_special_tokens=False)["input_ids"]
    for tokens, count in ((encoded, 1), ([*encoded, 1], 1), ([0, *encoded], 2)):
        lines: list[str] = []
        assert explain(model, processor, sample, grid=1, report=lines.append, generated=tokens).answer == text["text"]
        assert len(lines) == count
    assert len(generated) == 4


def test_an_image_of_one_pixel_has_one_cell_which_changes_nothing(answering_llava: tuple[Any, Any], tmp_path: Path) -> None:
    sample = asked([picture(tmp_path / "a.png", (1, 1))])
    for method in EXPLANATION_METHODS:
        [cells] = explain(*answering_llava, sample, method).images
        assert cells.scores.shape[1:] == (1, 1)
        assert np.abs(cells.scores).max() < 1e-5


@pytest.mark.parametrize(
    ("size", "grid", "answer", "message"),
    [
        ((10, 4), 11, ANSWER, "grid 11: the image has 10 x 4 pixels, fewer than cells; give at most 10"),
        ((200, 200), 65, ANSWER, "grid 65: expected 1 to 64"),
        ((10, 4), None, "", "the answer is empty"),
    ],
)
def test_what_cannot_be_explained_is_an_error(
    untrained: tuple[Any, Any], tmp_path: Path, size: tuple[int, int], grid: int | None, answer: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        explain(*untrained, asked([picture(tmp_path / "a.png", size)], answer=answer), grid=grid)


def test_a_damaged_image_is_an_error_that_names_it(untrained: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(tmp_path / "b.png").read_bytes()[:200])
    with pytest.raises(RowError, match=r"a\.png"):
        explain(*untrained, asked([tmp_path / "a.png"]))


@pytest.mark.parametrize(
    ("method", "cost"), [("occlusion", "8 forward passes"), ("gradient_x_input", r"[\d,]{3,} backward passes")]
)
def test_the_cost_of_a_long_answer_is_stated_before_it_is_paid(
    untrained: tuple[Any, Any], tmp_path: Path, method: str, cost: str
) -> None:
    def stop(cost: str) -> None:
        raise UserError(cost)

    sample = asked([picture(tmp_path / "a.png")], answer="7 " * 599 + "7")
    with pytest.raises(UserError, match=rf"^{cost} of [\d,]+ tokens; the model was made for at most 512$"):
        explain(*untrained, sample, method, grid=2, report=stop)


@pytest.mark.parametrize("method", EXPLANATION_METHODS)
def test_an_explanation_can_be_stopped_between_batches(untrained: tuple[Any, Any], tmp_path: Path, method: str) -> None:
    calls = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        explain(*untrained, asked([picture(tmp_path / "a.png")]), method, batch_size=3, check=check)
    assert len(calls) == 2
    explain(*untrained, asked([]), method)  # hooks are removed


def test_cells_cover_the_image_without_overlap() -> None:
    assert cell_edges(10, 4) == [0, 2, 5, 8, 10]
    assert cell_grid((100, 50), 8) == (4, 8)
    assert cell_grid((3, 1000), 8) == (8, 1)
    assert cell_grid((1, 1), 1) == (1, 1)


def test_mass_inside_counts_positive_scores_by_area() -> None:
    scores = np.array([[4.0, -3.0], [0.0, 1.0]])
    image = CellScores(20, 10, scores[None])
    assert mass_inside(image, scores, [(0, 0, 10, 5)]) == 0.8
    assert mass_inside(image, scores, [(0, 0, 5, 5)]) == 0.4
    assert mass_inside(image, scores, [(0, 0, 20, 10)]) == 1
    assert np.isnan(mass_inside(image, -np.abs(scores) * 0, [(0, 0, 5, 5)]))
    assert top_cells(image, scores, 3) == [((0, 0, 10, 5), 4.0, 0.8), ((10, 5, 20, 10), 1.0, 0.2)]
