"""One measurement of `attribution.py`: `attribution_worker.py CONTENDER FOLDER OUT`.

Prints one line of JSON: CPU seconds of all edges and of pruning, the largest resident size, what pruning left. Then
writes to OUT, for comparison: active features, edges into sampled targets, pruned nodes, structural scores. Linux only.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from hagd.attribution.prompt.compute import Computed

_SAMPLED = 400
NODES, EDGES = 0.8, 0.98


class Result(NamedTuple):
    """What a contender gives: figures for the report, and what `compare` needs."""

    attribution: float
    pruning: float
    nodes: int
    edges: int
    compare: Callable[[np.ndarray], dict[str, Any]]


def _replacement_model(setup: dict[str, Any], folder: Path) -> Any:
    """The model in the class that circuit-tracer would make of one from a hub."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.activation_functions import TopK
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    weights = load_file(folder / "transcoders.safetensors")
    layers = {}
    for i in range(setup["n_layers"]):
        layers[i] = SingleLayerTranscoder(setup["d"], setup["m"], TopK(setup["k"]), i, dtype=torch.float32)
        layers[i].load_state_dict({name: weights[f"{name}_{i}"] for name in ("W_enc", "W_dec", "b_enc", "b_dec")})
    config = HookedTransformerConfig(
        n_layers=setup["n_layers"],
        d_model=setup["d"],
        n_ctx=setup["positions"],
        d_head=setup["d"] // setup["heads"],
        n_heads=setup["heads"],
        d_vocab=setup["vocabulary"],
        act_fn="gelu_new",
        normalization_type="LN",
        model_name="random",
        device="cpu",
    )
    words = {str(i): i for i in range(setup["vocabulary"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "0")), bos_token="0")
    found = TranscoderSet(layers, "mlp.hook_in", "mlp.hook_out")
    model = TransformerLensReplacementModel.from_config(config, found)
    model.tokenizer = tokenizer  # given to the constructor, it would be loaded again from a hub
    state = convert_gpt2_weights(GPT2LMHeadModel.from_pretrained(folder / "model"), model.cfg)
    state["unembed.b_U"] = torch.zeros(setup["vocabulary"])
    inside = {".mlp.": ".mlp.old_mlp.", "unembed.": "unembed.old_unembed."}  # circuit-tracer wraps these
    for old, new in inside.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    missing = {name for name, _ in model.named_parameters() if not name.startswith("transcoders")} - set(state)
    if missing:
        raise RuntimeError(f"expected a value for every weight, found none for {sorted(missing)[:5]}")
    model.load_state_dict(state, strict=False)
    return model


def circuit_tracer(setup: dict[str, Any], folder: Path) -> Result:
    """circuit-tracer's own code; only the model is built here, because it loads those of a hub by name."""
    from circuit_tracer.attribution.attribute import attribute
    from circuit_tracer.graph import compute_graph_scores, prune_graph

    model = _replacement_model(setup, folder)
    # By default it ranks features anew after 2,048 of them; HAGD ranks four times, however many are sought.
    often = {} if setup["most"] is None else {"batch_size": -(-setup["most"] // 4), "update_interval": 1}
    start = time.process_time()
    graph = attribute(torch.tensor(setup["tokens"]), model, max_feature_nodes=setup["most"], **often)
    middle = time.process_time()
    pruned = prune_graph(graph, NODES, EDGES)
    end = time.process_time()

    def compare(targets: np.ndarray) -> dict[str, Any]:
        return {
            "active": graph.active_features[graph.selected_features].numpy(),
            "rows": graph.adjacency_matrix[torch.from_numpy(targets)].numpy(),
            "nodes": pruned.node_mask.numpy(),
            "scores": np.array(compute_graph_scores(graph)),
        }

    return Result(middle - start, end - middle, int(pruned.node_mask.sum()), int(pruned.edge_mask.sum()), compare)


def _our_transcoders(setup: dict[str, Any], folder: Path) -> Any:
    from hagd.transcoders.records import Transcoder, TranscoderSet

    weights = load_file(folder / "transcoders.safetensors")
    parts = ("W_enc", "b_enc", "W_dec", "b_dec")
    layers = (Transcoder(i, setup["k"], *(weights[f"{p}_{i}"] for p in parts)) for i in range(setup["n_layers"]))
    return TranscoderSet("random", "mlp", tuple(layers))


def ours(setup: dict[str, Any], folder: Path) -> Result:
    """The parts of `hagd.attribution.prompt.graph.build_prompt_graph`."""
    from transformers import GPT2LMHeadModel

    from hagd.attribution.prompt.compute import Calculation
    from hagd.attribution.prompt.frozen_model import freeze
    from hagd.attribution.prompt.graph import at_last_position
    from hagd.attribution.prompt.influence import prune
    from hagd.attribution.prompt.layout import Sources
    from hagd.attribution.prompt.logits import likely
    from hagd.attribution.prompt.trace import decompose, trace
    from hagd.models.language_model import LanguageModel

    found, lm = _our_transcoders(setup, folder), LanguageModel(GPT2LMHeadModel.from_pretrained(folder / "model"))
    scratch = tempfile.TemporaryDirectory()
    with torch.no_grad():
        start = time.process_time()
        run = trace(lm, torch.tensor(setup["tokens"]))
        active, errors = decompose(run, found, skip_first=True)
        for error in errors:
            error[0] = 0  # circuit-tracer has no errors at the first position either
        sources = Sources(run.embedding, active, errors, found)
        logits = likely(lm, run, 10, 0.95)
        targets = at_last_position(sources, logits)
        calculation = Calculation(freeze(lm, run, found), sources, found, targets, logits.weights.numpy())
        if setup["most"] is None:
            computed = calculation.all_features(Path(scratch.name))
        else:
            computed = calculation.most_influential(Path(scratch.name), setup["most"])
        middle = time.process_time()
        first_token = sources.error(sources.n_layers)
        pruned = prune(
            computed.edges,
            calculation.weights,
            computed.influence,
            n_inner=len(active),
            first_token=first_token,
            node_share=NODES,
            edge_share=EDGES,
        )
        end = time.process_time()

    def compare(targets: np.ndarray) -> dict[str, Any]:
        kept = np.flatnonzero(computed.chosen)
        rows = _rows(computed, kept[targets])[:, kept]
        scratch.cleanup()
        influence = computed.influence
        by_error = influence[len(active) : first_token].sum()
        by_token = influence[first_token : len(sources)].sum()
        total = influence.sum() + float(logits.weights.sum())
        identities = torch.stack([active.layer, active.position, active.feature], dim=1).numpy()
        return {
            "active": identities[computed.chosen[: len(active)]],
            "rows": rows,
            "nodes": pruned.nodes[kept],
            "scores": np.array([by_token / (by_token + by_error), 1 - by_error / total]),
        }

    return Result(middle - start, end - middle, int(pruned.nodes.sum()), len(pruned.value), compare)


def _rows(computed: Computed, targets: np.ndarray) -> np.ndarray:
    """Dense edges into `targets`, `[targets, nodes]`."""
    wanted = np.isin(np.arange(len(computed.chosen)), targets)
    rows = {int(target): np.zeros(len(wanted), dtype=np.float32) for target in targets}
    for block in computed.edges.from_above(wanted):
        for i, target in enumerate(block.targets):
            rows[int(target)][block.source[block.row == i]] = block.value[block.row == i]
    return np.stack([rows[int(target)] for target in targets])


def sampled_targets(n_features: int, first_logit: int) -> np.ndarray:
    """Features spread evenly, and the first logit."""
    return np.append(np.unique(np.linspace(0, n_features - 1, _SAMPLED).astype(int)), first_logit)


def peak_mb() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """See the module's docstring."""
    torch.set_num_threads(1)
    contender, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    setup = json.loads((folder / "setup.json").read_text())
    result = {"ours": ours, "circuit_tracer": circuit_tracer}[contender](setup, folder)
    figures = {key: getattr(result, key) for key in ("attribution", "pruning", "nodes", "edges")}
    peak = peak_mb()
    n_features = setup["most"] or setup["n_layers"] * (setup["positions"] - 1) * setup["k"]
    first_logit = n_features + (setup["n_layers"] + 1) * setup["positions"]
    np.savez(out, **result.compare(sampled_targets(n_features, first_logit)))
    print(json.dumps({**figures, "peak_mb": peak}))


if __name__ == "__main__":
    main()
