"""Choice of the next token: greedy, with the gap between the two largest logits, or sampled with random numbers of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

from mmtune.data.templates.prompts import draw

NEAR_TIE = 1e-4
"""A greedy answer is a near tie if the two largest logits of one of its tokens differ by less: rounding could change it."""


@dataclass(frozen=True)
class DecodingSettings:
    """How answers are generated.

    Attributes:
        max_new_tokens: at most this many new tokens per answer.
        temperature: 0 is greedy; otherwise tokens are sampled from softmax(logits / temperature).
        answers: answers to each question; more than 1 needs a temperature.
        seed: of the sampled tokens.
    """

    max_new_tokens: int
    temperature: float = 0.0
    answers: int = 1
    seed: int = 0


class TokenChoice(LogitsProcessor):
    """Leaves the chosen token as the largest logit of each row, and records near ties of greedy decoding.

    A sampled token is the one at which the cumulative probability exceeds a random number. The random number depends on the seed,
    the row's id, the number of the answer and that of the token, and on nothing else: not on the batch or the process.

    Args:
        decoding: the settings.
        stop_token_ids: tokens after which a row is finished.
        row_ids: the ids of the questions; a batch has `decoding.answers` adjacent rows for each.
    """

    def __init__(self, decoding: DecodingSettings, stop_token_ids: Sequence[int], row_ids: Sequence[str]) -> None:
        self._decoding = decoding
        self._stop = stop_token_ids
        self._answers = [(row_id, number) for row_id in row_ids for number in range(decoding.answers)]
        self._token = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input_ids: prompts and tokens so far, int64, shape (rows, tokens).
            scores: logits of the next token, shape (rows, vocabulary).
        """
        if self._token == 0:
            self._running = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
            self._gaps = torch.full((len(scores),), torch.inf, device=scores.device)
        else:
            self._running &= ~torch.isin(input_ids[:, -1], torch.tensor(self._stop, device=scores.device))
        self._token += 1
        return self._sampled(scores) if self._decoding.temperature else self._greedy(scores)

    def near_ties_of_rows(self) -> list[bool]:
        """For each row, whether a token of its answer is a near tie; False for sampled answers."""
        return (self._gaps < NEAR_TIE).tolist()

    def _greedy(self, scores: torch.Tensor) -> torch.Tensor:
        first, second = scores.topk(2, dim=-1).values.unbind(-1)
        self._gaps = torch.where(self._running, torch.minimum(self._gaps, first - second), self._gaps)
        return scores

    def _sampled(self, scores: torch.Tensor) -> torch.Tensor:
        probabilities = (scores.double() / self._decoding.temperature).softmax(-1)
        draws = [draw(self._decoding.seed, row, "answer", number, self._token) for row, number in self._answers]
        cumulative = probabilities.cumsum(-1)
        thresholds = torch.tensor(draws, dtype=torch.float64, device=scores.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, thresholds, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)
