"""How well logits answer a prompt. Everything but `is_correct` is differentiable.

Shape legend: N prompts, C options, A scored positions, K accepted tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hagd.tasks.records import PADDING, AccuracyRule, Prompts


def logit_difference(logits: Tensor, prompts: Prompts, length_normalised: bool = False) -> Tensor:
    """Lead of the right answer, `[N]`, in nats.

    One option: mean over scored positions of `logsumexp(answers) − logsumexp(distractors)`. Multiple choice:
    score of the correct option minus the best score of the others (`option_scores`).

    Args:
        logits: `[N, C, A, V]` at the scored positions.
        prompts: the N prompts.
        length_normalised: multiple choice: mean instead of sum over an option's tokens.
    """
    leads, used = leads_by_answer(logits, prompts, length_normalised)
    return leads.sum(-1) / used.sum(-1)


def leads_by_answer(logits: Tensor, prompts: Prompts, length_normalised: bool = False) -> tuple[Tensor, Tensor]:
    """Lead at each scored position, `[N, A]`, 0 where none is scored, and where one is, bool `[N, A]`; of multiple
    choice the single lead `[N, 1]`. Arguments as in `logit_difference`."""
    if logits.shape[1] > 1:
        scores = option_scores(logits, prompts, length_normalised)
        lead = scores[:, 0] - scores[:, 1:].max(dim=1).values
        return lead[:, None], torch.ones_like(lead, dtype=torch.bool)[:, None]
    used = prompts.scored[:, 0] != PADDING
    return _lead(logits, prompts)[:, 0].masked_fill(~used, 0), used


def log_probability(logits: Tensor, prompts: Prompts, length_normalised: bool = False) -> Tensor:
    """Log-probability of the right answer, `[N]`, in nats.

    One option: mean over scored positions of `log P(any accepted token)`. Multiple choice: log-softmax over the
    options' scores, at the correct one. Arguments as in `logit_difference`.
    """
    if logits.shape[1] > 1:
        return option_scores(logits, prompts, length_normalised).log_softmax(dim=1)[:, 0]
    return _mean_over_scored(_accepted(logits, prompts.answers) - logits.logsumexp(-1), prompts)[:, 0]


SCORES = {"log_probability": log_probability, "logit_difference": logit_difference}
"""What a node can be attributed to, by `graph.metric`."""


def is_correct(logits: Tensor, prompts: Prompts, rule: AccuracyRule, length_normalised: bool = False) -> Tensor:
    """Whether each prompt is answered correctly, bool `[N]`.

    `argmax`: the most likely token is accepted at every scored position. `pairwise`: the answers together are more
    probable than the distractors together at every scored position. `choice`: the correct option scores strictly
    best. Other arguments as in `logit_difference`.
    """
    if rule == "choice":
        scores = option_scores(logits, prompts, length_normalised)
        return scores[:, 0] > scores[:, 1:].max(dim=1).values
    if rule == "argmax":
        right = (logits.argmax(-1, keepdim=True) == prompts.answers).any(-1)
    else:
        right = _lead(logits, prompts) > 0
    return (right | (prompts.scored == PADDING)).all(-1)[:, 0]


def option_scores(logits: Tensor, prompts: Prompts, length_normalised: bool) -> Tensor:
    """Log-probability of each option's own scored tokens, sum or mean over them, `[N, C]`."""
    log_p = _accepted(logits, prompts.answers) - logits.logsumexp(-1)
    if length_normalised:
        return _mean_over_scored(log_p, prompts)
    return log_p.masked_fill(prompts.scored == PADDING, 0).sum(-1)


def _lead(logits: Tensor, prompts: Prompts) -> Tensor:
    return _accepted(logits, prompts.answers) - _accepted(logits, prompts.distractors)


def _accepted(logits_NCAV: Tensor, tokens_NCAK: Tensor) -> Tensor:
    """Log-sum-exp of the logits of `tokens`, `[N, C, A]`; entries without any token are finite and meaningless."""
    unused = tokens_NCAK == PADDING
    values = logits_NCAV.gather(-1, tokens_NCAK.clamp(min=0))
    # A row of −inf alone would send NaN gradients through every later mask.
    unused = unused & ~unused.all(-1, keepdim=True)
    return values.masked_fill(unused, -torch.inf).logsumexp(-1)


def _mean_over_scored(values_NCA: Tensor, prompts: Prompts) -> Tensor:
    used = prompts.scored != PADDING
    return values_NCA.masked_fill(~used, 0).sum(-1) / used.sum(-1)
