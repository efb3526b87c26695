"""Meta-training of the scorer on graphs whose circuits are known."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from hagd.config.run import GNNConfig, TrainerConfig
from hagd.errors import ConfigError
from hagd.search.scorer.apply import build_network, logits
from hagd.search.scorer.inputs import IMPORTANCE, INPUTS
from hagd.search.scorer.records import ScoredGraph, TrainedScorer
from hagd.training.loader import StepLoader, batch_indices

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

    from hagd.search.scorer.module import GraphBatch
    from hagd.search.scorer.network import CircuitScorer

log = logging.getLogger(__name__)

STAGE = "gnn"
_HOLD_OUT_FROM = 3
_GRADIENT_CLIP = 1.0


def train_scorer(
    graphs: Sequence[ScoredGraph],
    config: GNNConfig,
    seed: int,
    trainer: TrainerConfig,
    checkpoint_dir: Path,
    loggers: Sequence[Logger] = (),
) -> TrainedScorer:
    """A scorer trained for `config.epochs` passes over `graphs`, one graph a step, in an order given by `seed`.

    Of three or more graphs the last is held out. The scorer that is returned has never seen it: it is not trained
    again on all of them, so its `validation_correlation` is about these very weights.

    Raises:
        ConfigError: there are no graphs.
        NumericalError: the loss is NaN or infinite.
    """
    from hagd.search.scorer.module import ScorerTraining
    from hagd.training.fit import fit

    if not graphs:
        raise ConfigError("gnn.models, gnn.tasks, gnn.seeds: expected at least one graph to train on, found none")
    held_out = graphs[-1] if len(graphs) >= _HOLD_OUT_FROM else None
    seen = graphs[:-1] if held_out else graphs
    batches = [_batch(graph) for graph in seen]
    n_steps = config.epochs * len(seen)
    settings: dict[str, int | bool] = {
        "n_inputs": len(INPUTS),
        "hidden": config.hidden,
        "heads": config.heads,
        "n_layers": config.n_layers,
        "edges": config.edges,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(settings)
    fit(
        ScorerTraining(network, config, n_steps),
        StepLoader(lambda step: batches[int(batch_indices(len(batches), 1, seed, step))], n_steps),
        trainer,
        n_steps,
        checkpoint_dir,
        loggers,
        metrics=("loss", "correlation"),
        stage=STAGE,
        seed=seed,
        gradient_clip=_GRADIENT_CLIP,
    )
    network = network.cpu()
    ours, alone = _validate(network, held_out, loggers, n_steps) if held_out else (None, None)
    return TrainedScorer(
        state={name: value.detach().clone() for name, value in network.state_dict().items()},
        config=settings,
        inputs=INPUTS,
        trained_on=tuple(graph.name for graph in seen),
        validation_graph=held_out.name if held_out else None,
        validation_correlation=ours,
        importance_correlation=alone,
    )


def _validate(network: CircuitScorer, graph: ScoredGraph, loggers: Sequence[Logger], step: int) -> tuple[float, float]:
    """Correlations with the target of the network's logits and of importance alone."""
    target = graph.target.numpy()
    ours = spearman(logits(network, graph).numpy(), target)
    alone = spearman(graph.inputs[: graph.n_candidates, IMPORTANCE].numpy(), target)
    log.info("%s: held-out %s: Spearman %.3f, importance alone %.3f", STAGE, graph.name, ours, alone)
    for logger in loggers:
        metrics = {"validation_correlation": ours, "importance_correlation": alone}
        logger.log_metrics({f"{STAGE}/{name}": value for name, value in metrics.items()}, step=step)
        logger.save()
    return ours, alone


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman rank correlation of two `[n]`; NaN if one of them is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def standardised_ranks(target: np.ndarray) -> Tensor:
    """Ranks of `target` `[n]` with zero mean and unit length, equal values sharing theirs; zeros if all are equal."""
    ranks = rankdata(target)
    ranks = ranks - ranks.mean()
    return torch.from_numpy(ranks / max(np.linalg.norm(ranks), 1e-12)).float()


def _batch(graph: ScoredGraph) -> GraphBatch:
    from hagd.search.scorer.module import GraphBatch

    ranks = standardised_ranks(graph.target.numpy())
    return GraphBatch(graph.inputs, graph.edge_index, graph.edge_type, graph.edge_attr, graph.target, ranks)
