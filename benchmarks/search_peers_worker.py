"""Runs auto-circuit's ACDC and EAP-IG, as its package has them, on one model; runs in the environment `circuit-peers`.

Reads `weights.safetensors`, `prompts.safetensors` and `config.json` of a folder, writes `scores.json`: of each method a
score for every head and MLP at every position, and seconds. Edges are the package's own, each position's apart. A
node's score is the largest threshold at which a path of edges from it to the logits of the last position survives; ties
are broken by the sum of its edges' scores.

Shape legend: L layers, T positions, H heads.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.prune_algos import ACDC
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.types import AblationType
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patchable_model
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2Config, GPT2LMHeadModel

THRESHOLDS = {"tao_exps": list(range(-4, 1)), "tao_bases": [1, 3]}
ACDC_PROMPTS = 64
"""The package tests edges on the first batch alone; as many as greedy pruning of nodes has here."""

IG_STEPS = 8


def converted(folder: Path, tokens: Tensor) -> HookedTransformer:
    """The GPT-2 of `folder` as a `HookedTransformer` of equal logits."""
    config = GPT2Config(**json.loads((folder / "config.json").read_text()))
    theirs = GPT2LMHeadModel(config).eval()
    theirs.load_state_dict(load_file(folder / "weights.safetensors"))
    cfg = HookedTransformerConfig(
        n_layers=config.n_layer,
        d_model=config.n_embd,
        n_ctx=config.n_positions,
        d_head=config.n_embd // config.n_head,
        n_heads=config.n_head,
        d_mlp=config.n_inner,
        d_vocab=config.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=config.layer_norm_epsilon,
        use_attn_result=True,
        use_attn_in=True,
        use_hook_mlp_in=True,
        device="cpu",
    )
    model = HookedTransformer(cfg)
    model.load_and_process_state_dict(
        convert_gpt2_weights(theirs, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    return model


def node_scores(model: Any, scores: dict[str, Tensor]) -> list[list[list[float]]]:
    """Ranks `[L, T, H + 1]`, the MLP last, larger is better."""
    heads, last = model.cfg.n_heads, model.seq_len - 1
    shape = (model.cfg.n_layers, model.seq_len, heads + 1)
    reach, total = torch.full(shape, -math.inf), torch.zeros(shape)

    def place(name: str, position: int) -> tuple[int, int, int]:
        if name.startswith("MLP"):
            return int(name.split()[1]), position, heads
        layer, head = name[1:].split(".")[:2]
        return int(layer), position, int(head)

    def reaches(name: str, position: int) -> float:
        if name == "Resid End":
            return math.inf if position == last else -math.inf
        layer, _, index = place(name, position)
        if index == heads:
            return float(reach[layer, position, index])
        return float(reach[layer, position:, index].max())  # a head's keys and values are read at later positions

    for edge in sorted(model.edges, key=lambda each: -each.dest.layer):
        if edge.src.name != "Resid Start":
            score = abs(float(scores[edge.dest.module_name][edge.patch_idx]))
            source = place(edge.src.name, edge.seq_idx)
            reach[source] = max(float(reach[source]), min(score, reaches(edge.dest.name, edge.seq_idx)))
            total[source] += min(score, 1e6)
    order = sorted(range(reach.numel()), key=lambda i: (float(reach.flatten()[i]), float(total.flatten()[i])))
    ranks = torch.empty(reach.numel())
    ranks[order] = torch.arange(reach.numel(), dtype=torch.float)
    return ranks.view(shape).tolist()


def main(folder: Path) -> None:
    """See the module's docstring."""
    torch.set_num_threads(1)
    prompts = load_file(folder / "prompts.safetensors")
    clean = prompts["clean"]
    model = patchable_model(
        converted(folder, clean), factorized=True, slice_output="last_seq", seq_len=clean.shape[1], separate_qkv=False
    )
    data = PromptDataset(clean, prompts["corrupt"], list(prompts["answers"]), list(prompts["wrong"]))
    loader, few = (
        PromptDataLoader(data, seq_len=clean.shape[1], diverge_idx=0, batch_size=n, shuffle=False)
        for n in (len(clean), ACDC_PROMPTS)
    )
    mean = src_ablations(model, loader, AblationType.TOKENWISE_MEAN_CLEAN)

    def acdc_of_means() -> dict[str, Tensor]:
        """The package ablates to the corrupt prompts' activations only: here their place is taken by the means."""
        corrupt = prompts["corrupt"][:ACDC_PROMPTS]
        ACDC.src_ablations = lambda m, sample: (
            mean[:, :ACDC_PROMPTS] if torch.equal(sample, corrupt) else src_ablations(m, sample)
        )
        return ACDC.acdc_prune_scores(model, few, None, **THRESHOLDS)

    methods: dict[str, Callable[[], dict[str, Tensor]]] = {
        "eap_ig": lambda: mask_gradient_prune_scores(
            model,
            loader,
            None,
            grad_function="logit",
            answer_function="avg_diff",
            integrated_grad_samples=IG_STEPS,
            ablation_type=AblationType.TOKENWISE_MEAN_CLEAN,
            clean_corrupt=None,
        ),
        "acdc": lambda: ACDC.acdc_prune_scores(model, few, None, **THRESHOLDS),
        "acdc_means": acdc_of_means,
    }
    found = {}
    for name, method in methods.items():
        began = time.perf_counter()
        found[name] = {"scores": node_scores(model, method()), "seconds": time.perf_counter() - began}
    (folder / "scores.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
