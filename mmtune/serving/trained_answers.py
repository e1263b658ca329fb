"""The trained model's prompts, greedy answers and, for each token, the gap between the two largest logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from mmtune.chat_templates.jinja_rendering import Tools
from mmtune.chat_templates.rendering import render_prompt
from mmtune.data.encoding.encode import chat_template_of, encode_prompt, to_template_messages
from mmtune.data.message import Message, Sample, prompt_messages
from mmtune.models.checkpoints.trained_weights import TrainedWeights
from mmtune.models.compute import adapter_disabled, move_batch, to_best_device
from mmtune.models.generation import answer_start, greedy_settings, run_generate
from mmtune.models.load import load_trained
from mmtune.recipe.recipe import Recipe
from mmtune.release.merge import load_untuned


@dataclass(frozen=True)
class TrainedAnswer:
    """The greedy answer of a model to one question.

    Attributes:
        text: the answer, without special tokens.
        prompt_tokens: the number of tokens of the prompt, image tokens included.
        tokens: its token ids, with the end of turn.
        log_probabilities: of each token, natural logarithm.
        largest: the two tokens with the largest logits at each position.
        gaps: by how much their logits differ.
    """

    text: str
    prompt_tokens: int
    tokens: list[int]
    log_probabilities: list[float]
    largest: list[tuple[int, int]]
    gaps: list[float]


class TrainedModel:
    """A trained model in fp32, and the untuned base beside it.

    Args:
        trained: where the weights are.
        recipe: of the run.
        max_new_tokens: at most this many new tokens per answer.
        trust_remote_code: whether code in the run, model or base may be executed.
    """

    def __init__(self, trained: TrainedWeights, recipe: Recipe, max_new_tokens: int, trust_remote_code: bool = False) -> None:
        model, self.processor = load_trained(trained, torch.float32, trust_remote_code=trust_remote_code)
        self._model: Any = to_best_device(model)
        self._recipe = recipe
        self._trust_remote_code = trust_remote_code
        self.max_new_tokens = max_new_tokens

    def prompt_tokens(self, messages: Sequence[Message], tools: Tools = ()) -> int:
        """The number of tokens of a prompt, image tokens included. Raises RowError as `encode_prompt`."""
        return int(encode_prompt("question", list(messages), self.processor, tools)["input_ids"].shape[1])

    def rendered(self, messages: Sequence[Message]) -> str:
        """The text of a prompt without images, as the chat template writes it."""
        template = chat_template_of(self.processor)
        return render_prompt(to_template_messages("question", list(messages)), template, self.processor.tokenizer)

    @property
    def penalties(self) -> dict[str, Any]:
        """Settings of the generation config that change greedy answers and that training and evaluation do not use."""
        return greedy_settings(self._model)

    def answer(self, question: Sample | Sequence[Message], settings: Mapping[str, Any] | None = None) -> TrainedAnswer:
        """The greedy answer to the last question of a sample, or to a conversation.

        Args:
            question: the conversation; the last answer of a sample is not shown to the model.
            settings: further generation settings.
        """
        return self._answer(self._model, question, settings)

    def answers_of_base(self, questions: Sequence[Sample]) -> list[TrainedAnswer]:
        """The greedy answers of the untuned base."""
        with self._base() as base:
            return [self._answer(base, question) for question in questions]

    def rounding(self, answered: Sequence[tuple[Sample, TrainedAnswer]]) -> float:
        """How far computing in bf16 moves the two largest logits of a token apart or together: the largest change of a gap.

        The model then stays in bf16: two copies of a large model may not fit.
        """
        self._model.to(torch.bfloat16)
        largest = 0.0
        for question, exact in answered:
            expected = iter(exact.tokens)
            *_, logits = self._generate(
                self._model, question, prefix_allowed_tokens_fn=lambda _, tokens, expected=expected: [next(expected)]
            )
            for position, (first, second) in enumerate(exact.largest):
                gap = float(logits[position, first] - logits[position, second])
                largest = max(largest, abs(gap - exact.gaps[position]))
        return largest

    def _answer(
        self, model: Any, question: Sample | Sequence[Message], settings: Mapping[str, Any] | None = None
    ) -> TrainedAnswer:
        prompt_tokens, tokens, logits = self._generate(model, question, settings)
        values, indices = logits.topk(2, dim=-1)
        chosen = logits.double().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        largest = [(first, second) for first, second in indices.tolist()]
        return TrainedAnswer(
            self.decode(tokens), prompt_tokens, tokens, chosen.tolist(), largest, (values[:, 0] - values[:, 1]).tolist()
        )

    def _generate(
        self, model: Any, question: Sample | Sequence[Message], settings: Mapping[str, Any] | None = None, **arguments: Any
    ) -> tuple[int, list[int], torch.Tensor]:
        """The number of tokens of the prompt, the tokens of an answer, and their logits, fp32 of shape (tokens, vocabulary)."""
        sample_id, messages, tools = (
            (question.id, prompt_messages(question), question.tools)
            if isinstance(question, Sample)
            else ("question", list(question), ())
        )
        batch = move_batch(model, encode_prompt(sample_id, messages, self.processor, tools))
        with torch.inference_mode():
            output = run_generate(
                model,
                self.processor,
                batch,
                self.max_new_tokens,
                {"return_dict_in_generate": True, "output_logits": True, **(settings or {})},
                **arguments,
            )
        tokens = output.sequences[0, answer_start(model, batch) :].tolist()
        return batch["input_ids"].shape[1], tokens, torch.cat(output.logits).float().cpu()

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, without special tokens: as engines return it."""
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True))

    @property
    def has_base(self) -> bool:
        """Whether the untuned base is in memory, as that of an adapter."""
        return isinstance(self._model, PeftModel)

    @contextmanager
    def _base(self) -> Iterator[Any]:
        if isinstance(self._model, PeftModel):
            with adapter_disabled(self._model):
                yield self._model
            return
        yield load_untuned(self._recipe, self._trust_remote_code)
