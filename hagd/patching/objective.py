"""What a circuit is judged by during discovery: how far the patched model is from the full one, on one split.

Shape legend: N prompts, C options, A scored positions, V vocabulary, G gate settings, L, S, m as in
`hagd.patching.patched_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hagd.config.stages import Ablation, ErrorMode, SearchLoss
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import PADDING, Prompts, TaskData
from hagd.tasks.scoring import SCORES, is_correct, leads_by_answer, logit_difference, option_scores


@dataclass(frozen=True)
class Outcome:
    """Per-prompt results of one patched model.

    Attributes:
        correct: bool `[N]`.
        logit_difference: `[N]`, nats.
    """

    correct: Tensor
    logit_difference: Tensor

    @property
    def accuracy(self) -> float:
        """Share of correct prompts."""
        return float(self.correct.double().mean())


class Objective:
    """Runs circuits on one split of a task; `patched.evaluations` counts what that costs.

    `loss` is what a search minimises: `divergence`, KL(full ‖ patched); `shortfall`, the mean over a prompt's answers
    of `max(Δ_full − Δ_patched, 0)² / mean(Δ_full²)`, Δ the logit difference of one answer; or `both`, the shortfall
    plus the divergence relative to that of the empty circuit.
    """

    def __init__(
        self,
        patched: PatchedModel,
        task: TaskData,
        prompts: Prompts,
        *,
        ablation: Ablation,
        error: ErrorMode,
        batch_size: int,
        loss: SearchLoss = "divergence",
    ) -> None:
        self.patched = patched
        self.task = task
        self.prompts = prompts.to(patched.lm.device)
        self.ablation = ablation
        self.error = error
        self.batch_size = batch_size
        self._loss = loss
        full = [(part, self._full(part)) for part in self._parts()]
        self._target = torch.cat([self._distribution(logits, part) for part, logits in full])
        leads = [leads_by_answer(logits, part, task.length_normalised) for part, logits in full]
        self._leads, used = (torch.cat(side) for side in zip(*leads, strict=True))
        self._power = (self._leads.square().sum() / used.sum()).clamp(min=1e-6)

    def __len__(self) -> int:
        return len(self.prompts)

    def full(self) -> Outcome:
        """The unpatched model."""
        return self.outcome_of(self._full)

    def outcome(self, gates: Tensor) -> Outcome:
        """The patched model with gates in the shape `patched.gate_shape`."""
        return self.outcome_of(lambda part: self._logits(part, gates))

    @torch.no_grad()
    def outcome_of(self, run: Callable[[Prompts], Tensor]) -> Outcome:
        """Of any other logits `[N, C, A, V]` for some of the prompts."""
        correct, lead = [], []
        for part in self._parts():
            logits = run(part)
            correct.append(is_correct(logits, part, self.task.accuracy, self.task.length_normalised))
            lead.append(logit_difference(logits, part, self.task.length_normalised))
        return Outcome(torch.cat(correct).cpu(), torch.cat(lead).cpu())

    def loss(self, gates: Tensor, index: Tensor) -> Tensor:
        """Mean loss over the prompts `index`; differentiable in `gates`."""
        return self.loss_by_prompt(gates, index).mean()

    def loss_by_prompt(self, gates: Tensor, index: Tensor, owner: Tensor | None = None) -> Tensor:
        """Loss of each of the prompts `index`, `[n]`; with `owner` `[n]`, gates are `[G, *gate_shape]`."""
        return self._measured(self._loss, gates, index, owner)

    def loss_of_logits(self, logits: Tensor, index: Tensor) -> Tensor:
        """Loss of each of the prompts `index`, `[n]`, whose logits `[n, C, A, V]` are given."""
        return self._judged(self._loss, logits, self.prompts[index], index)

    def losses(self, gates: Tensor, index: Tensor) -> Tensor:
        """Mean loss of G gate settings at once: `[G, *gate_shape]` → `[G]`, without gradient."""
        return self._means(self._loss, gates, index)

    def divergence(self, gates: Tensor, index: Tensor) -> Tensor:
        """Mean KL(full ‖ patched) over the prompts `index`, nats; differentiable in `gates`."""
        return self._measured("divergence", gates, index).mean()

    def divergences(self, gates: Tensor, index: Tensor) -> Tensor:
        """The same for G gate settings at once: `[G, *gate_shape]` → `[G]`, without gradient."""
        return self._means("divergence", gates, index)

    @torch.no_grad()
    def _means(self, loss: SearchLoss, gates: Tensor, index: Tensor) -> Tensor:
        at_once = max(1, self.batch_size // max(len(index), 1))
        values = []
        for chunk in gates.split(at_once):
            by_prompt = []
            for part in index.split(self.batch_size):
                owner = torch.arange(len(chunk), device=gates.device).repeat_interleave(len(part))
                value = self._measured(loss, chunk, part.repeat(len(chunk)), owner)
                by_prompt.append(value.view(len(chunk), len(part)))
            values.append(torch.cat(by_prompt, dim=1).mean(1))
        return torch.cat(values)

    def _measured(self, loss: SearchLoss, gates: Tensor, index: Tensor, owner: Tensor | None = None) -> Tensor:
        part = self.prompts[index]
        return self._judged(loss, self._logits(part, gates, owner), part, index)

    def _judged(self, loss: SearchLoss, logits: Tensor, part: Prompts, index: Tensor) -> Tensor:
        if loss == "divergence":
            return self._kl(self._target[index], logits, part)
        shortfall = self._shortfall(logits, part, index)
        return (
            shortfall if loss == "shortfall" else shortfall + self._kl(self._target[index], logits, part) / self._empty
        )

    def _shortfall(self, logits: Tensor, part: Prompts, index: Tensor) -> Tensor:
        leads, used = leads_by_answer(logits, part, self.task.length_normalised)
        return (self._leads[index] - leads).relu().square().sum(-1) / used.sum(-1) / self._power

    @property
    def unmeasured(self) -> int:
        """Evaluations that the next loss costs beside its own: that of the empty circuit, where it is not known yet."""
        return int(self._loss == "both" and "_empty" not in vars(self))

    @cached_property
    def _empty(self) -> Tensor:
        """Divergence of the empty circuit."""
        closed = torch.zeros(1, *self.patched.gate_shape, device=self.patched.lm.device)
        return self.divergences(closed, torch.arange(len(self)))[0].clamp(min=1e-6)

    def metric(self, name: str, gates: Tensor, index: Tensor, owner: Tensor | None = None) -> Tensor:
        """`log_probability` or `logit_difference` of the prompts `index`, `[n]`; differentiable in `gates`."""
        part = self.prompts[index]
        return SCORES[name](self._logits(part, gates, owner), part, self.task.length_normalised)

    def metric_between(self, name: str, gates: Tensor, index: Tensor, share: float) -> Tensor:
        """The same with inputs mixed with counterfactuals, as in `PatchedModel.logits_between`, `[n]`."""
        part = self.prompts[index]
        logits = self.patched.logits_between(part, gates, share, ablation=self.ablation, error=self.error)
        return SCORES[name](logits, part, self.task.length_normalised)

    def sample(self, size: int, generator: torch.Generator) -> Tensor:
        """Indices of `size` random prompts, all of them in order when there are no more."""
        if size >= len(self):
            return torch.arange(len(self))
        return torch.randperm(len(self), generator=generator)[:size]

    def _logits(self, part: Prompts, gates: Tensor, owner: Tensor | None = None) -> Tensor:
        return self.patched.logits(part, gates, ablation=self.ablation, error=self.error, owner=owner)

    @torch.no_grad()
    def _full(self, part: Prompts) -> Tensor:
        return self.patched.full_logits(part)

    def _parts(self) -> Iterator[Prompts]:
        for start in range(0, len(self), self.batch_size):
            yield self.prompts[start : start + self.batch_size]

    def _distribution(self, logits: Tensor, part: Prompts) -> Tensor:
        """Log-probabilities that are compared: of tokens `[N, 1, A, V]`, or of options `[N, C]`."""
        if logits.shape[1] == 1:
            return logits.log_softmax(-1)
        return option_scores(logits, part, self.task.length_normalised).log_softmax(-1)

    def _kl(self, target: Tensor, logits: Tensor, part: Prompts) -> Tensor:
        patched = self._distribution(logits, part)
        kl = (target.exp() * (target - patched)).sum(-1)
        if logits.shape[1] > 1:
            return kl
        used = part.scored != PADDING
        return kl.masked_fill(~used, 0).sum((1, 2)) / used.sum((1, 2))
