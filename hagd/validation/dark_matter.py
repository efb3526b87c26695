"""What the errors of dictionaries hold ("dark matter"): whether they tell the answer, what is lost without them.

Shape legend: L decomposed layers, R probed rows, d = d_model, m dictionary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hagd.activations.capture import capture
from hagd.config.stages import ValidationConfig
from hagd.patching.error_ablation import logits_without_errors
from hagd.patching.objective import Objective
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import PADDING, Prompts, TaskData
from hagd.validation.measures import Interval, bootstrap, preservation
from hagd.validation.probe import Probe, encode, shuffled_within
from hagd.validation.records import DarkMatter

Progress = Callable[[int, int], None]

_SHUFFLES = 5


def measure_errors(
    patched: PatchedModel, task: TaskData, config: ValidationConfig, seed: int, progress: Progress | None = None
) -> DarkMatter:
    """Figures of each decomposed layer, `dark_matter.layerI.NAME`, and of all at once, `dark_matter.all.NAME`.

    - `fvu`: unexplained share of the variance of the layer's output at the positions of the validation split that have
      a slot; of all layers, their mean. `fvu_scored`: where answers are read.
    - `probe_error`, `probe_reconstruction`, `probe_features`: share of answers that a linear probe (`Probe`) reads off
      the error, the dictionary's output and its features at the position where the answer is read; of all layers, off
      theirs side by side. Trained on the discovery split, measured on the validation split. `probe_shuffled`: off the
      error with answers shuffled within each scored position, which is what position and answer frequencies tell.
    - `lost_mean`, `lost_zero`: 1 − preservation when errors are at their mean in the slot, or zero, and all features
      are kept (`logits_without_errors`).

    The answer is the first accepted token; of multiple choice, whether the option is the right one, read at its last
    token.

    Args:
        patched: the model without heads as nodes.
        task: its discovery split trains probes, its validation split is measured on.
        config: resamples and batch size.
        seed: of shuffles and the bootstrap.
        progress: called with measurements done and to do.
    """
    layers = patched.transcoders.layers
    parts: dict[str, tuple[int, ...]] = {f"layer{layer}": (i,) for i, layer in enumerate(layers)}
    if len(layers) > 1:
        parts["all"] = tuple(range(len(layers)))
    train, test = (_observe(patched, split, config.batch_size) for split in (task.discovery, task.validation))
    objective = Objective(patched, task, task.validation, ablation="mean", error="keep", batch_size=config.batch_size)
    figures: dict[str, float] = {}
    for done, (name, chosen) in enumerate(parts.items(), start=1):
        of_part = {
            "fvu": float(np.mean(test.fvu[list(chosen)])),
            "fvu_scored": float(np.mean(test.fvu_scored[list(chosen)])),
        }
        of_part |= _probed(train, test, chosen, config.n_bootstrap, seed)
        of_part |= _lost(objective, [layers[i] for i in chosen], config.n_bootstrap, seed)
        figures |= {f"dark_matter.{name}.{key}": value for key, value in of_part.items()}
        if progress is not None:
            progress(done, len(parts))
    return DarkMatter({**figures, "dark_matter.classes": float(len(np.unique(train.label)))})


@dataclass(frozen=True)
class _Observed:
    """A split as probes see it.

    Attributes:
        error, reconstruction, features: `[L, R, d]`, `[L, R, d]` and `[L, R, m]`.
        label, prompt, place: `[R]`, the answer, its prompt, which of the scored positions of the prompt it is.
        fvu, fvu_scored: `[L]`.
    """

    error: np.ndarray
    reconstruction: np.ndarray
    features: np.ndarray
    label: np.ndarray
    prompt: np.ndarray
    place: np.ndarray
    fvu: np.ndarray
    fvu_scored: np.ndarray

    def rows(self, kind: str, chosen: Sequence[int]) -> np.ndarray:
        """`[R, …]`, layers side by side."""
        return np.concatenate(getattr(self, kind)[list(chosen)], axis=-1)


@torch.no_grad()
def _observe(patched: PatchedModel, prompts: Prompts, batch: int) -> _Observed:
    kept: list[tuple[Tensor, ...]] = []
    labels: list[tuple[Tensor, ...]] = []
    outputs, squares = [], []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch].to(patched.lm.device)
        tokens, used = part.tokens.flatten(0, 1), part.slots.flatten(0, 1) >= 0
        _, y = capture(patched.lm, tokens, patched.transcoders.site, patched.transcoders.layers)
        features, error = patched.features(tokens)
        row, position, label, prompt, place = _probed_rows(part)
        kept.append(tuple(each[:, row, position] for each in (error, y - error, features)))
        labels.append((label, prompt + start, place))
        outputs.append(y[:, used])
        squares.append(error[:, used].square().sum(-1))
    error, reconstruction, features = (torch.cat(side, 1) for side in zip(*kept, strict=True))
    answer, owner, number = (torch.cat(side).cpu().numpy() for side in zip(*labels, strict=True))
    return _Observed(
        error=error.double().cpu().numpy(),
        reconstruction=reconstruction.double().cpu().numpy(),
        features=features.double().cpu().numpy(),
        label=answer,
        prompt=owner,
        place=number,
        fvu=_unexplained(torch.cat(squares, 1), torch.cat(outputs, 1)),
        fvu_scored=_unexplained(error.square().sum(-1), error + reconstruction),
    )


def _unexplained(squares: Tensor, y: Tensor) -> np.ndarray:
    """`Σ ‖ε‖² / Σ ‖y − ȳ‖²`, `[L]`, of squared errors `[L, R]` and outputs `[L, R, d]`."""
    power = (y - y.mean(1, keepdim=True)).square().sum((1, 2))
    return (squares.sum(1) / power).double().cpu().numpy()


def _probed_rows(prompts: Prompts) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sequence, position, label, prompt and place of every row."""
    n, c = prompts.tokens.shape[:2]
    scored = prompts.scored.flatten(0, 1)
    if c == 1:
        row, place = (scored != PADDING).nonzero(as_tuple=True)
        return row, scored[row, place], prompts.answers[:, 0, :, 0][row, place], row, place
    row = torch.arange(n * c, device=scored.device)
    option = row % c
    return row, scored.max(-1).values, (option == 0).long(), row // c, torch.zeros_like(row)


def _probed(train: _Observed, test: _Observed, chosen: Sequence[int], resamples: int, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    known = np.unique(train.label)
    fitted, wanted = encode(train.label, known), encode(test.label, known)  # −1 is never predicted
    right: dict[str, np.ndarray] = {}
    for kind in ("error", "reconstruction", "features"):
        probe, x = Probe(train.rows(kind, chosen), len(known)), test.rows(kind, chosen)
        right[kind] = probe.predict(fitted, x) == wanted
        if kind == "error":
            shuffled = (shuffled_within(fitted, train.place, rng) for _ in range(_SHUFFLES))
            right["shuffled"] = np.mean([probe.predict(labels, x) == wanted for labels in shuffled], axis=0)
    found: dict[str, float] = {}
    for kind, values in right.items():
        interval = bootstrap(_by_prompt(values, test.prompt), test.prompt.max() + 1, resamples, seed)
        found |= interval.named(f"probe_{kind}")
    return found


def _by_prompt(values: np.ndarray, prompt: np.ndarray) -> Callable[[np.ndarray], float]:
    """Mean of `values` `[R]` over the rows of the prompts that are asked for."""
    total, count = np.bincount(prompt, weights=values), np.bincount(prompt)
    return lambda index: float(total[index].sum() / count[index].sum())


def _lost(objective: Objective, layers: Sequence[int], resamples: int, seed: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, zero in (("lost_mean", False), ("lost_zero", True)):

        def run(part: Prompts, zero: bool = zero) -> Tensor:
            return logits_without_errors(objective.patched, part, layers, zero=zero)

        kept = bootstrap(preservation(objective.outcome_of(run), objective.full()), len(objective), resamples, seed)
        found |= Interval(1 - kept.value, 1 - kept.high, 1 - kept.low).named(name)
    return found
