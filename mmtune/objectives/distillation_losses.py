"""Losses of distillation, by token: divergence of distributions, errors of hidden states, divergence of attention maps."""

from __future__ import annotations

import math

import torch

from mmtune.objectives.token_losses import widen


def divergences(student: torch.Tensor, teacher: torch.Tensor, beta: float, temperature: float) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence of every token: beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S.

    For beta 0 and 1 it is its limit divided by the vanishing factor: KL(T || S) and KL(S || T). GKD, equation 1.

    Args:
        student, teacher: logits of shape (tokens, vocabulary). Where one has more entries, these are padding and do not count.
        temperature: divides both; the result is not multiplied by its square.

    Returns:
        Shape (tokens,), in nats, in fp32 or the wider dtype of the logits.
    """
    size = min(student.shape[-1], teacher.shape[-1])
    log_s, log_t = (widen(logits[:, :size]).div(temperature).log_softmax(-1) for logits in (student, teacher))
    if beta == 0:
        return _kl(log_t, log_s)
    if beta == 1:
        return _kl(log_s, log_t)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def hidden_state_errors(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error of every token over the hidden size: shapes (tokens, size) to (tokens,)."""
    return (widen(student) - widen(teacher)).square().mean(-1)


def attention_divergences(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of every query's attention, the mean over heads: shapes (queries, heads, keys) to (queries,)."""
    smallest = torch.finfo(torch.float32).tiny  # masked keys have probability 0 in both
    log_s, log_t = (widen(maps).clamp_min(smallest).log() for maps in (student, teacher))
    return (widen(teacher) * (log_t - log_s)).sum(-1).mean(-1)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)
