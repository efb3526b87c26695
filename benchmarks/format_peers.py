"""The peers' side of `format_compatibility.py`: their own code loads, encodes, reconstructs and saves.

`python format_peers.py read FOLDER` loads every `FOLDER/<layout>/<case>`, writes features and reconstructions of
`FOLDER/../inputs.safetensors` to `<case>.out` beside it and saves the dictionaries again to `<case>.again`.
`python format_peers.py make FOLDER` first makes dictionaries of each peer's architectures there, with random weights.

`python format_peers.py graph FILE` reads one prompt's graph.

Shape legend: L layers, n tokens, d = d_model, m dictionary size.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Read = Callable[[Path, Tensor, Path], tuple[Tensor, Tensor]]
"""From a folder, inputs `[L, n, d]` and a folder for a copy to features `[L, n, m]` and reconstructions `[L, n, d]`."""

M, K = 128, 8
SPARSE_LAYERS = (2, 10, 11)
"""Layers whose order as text is not their order."""


def read_sparsify(folder: Path, x: Tensor, again: Path) -> tuple[Tensor, Tensor]:
    """All hookpoints, by sparsify."""
    from sparsify import SparseCoder

    features, outputs = [], []
    for (name, coder), inputs in zip(SparseCoder.load_many(str(folder), local=True).items(), x, strict=True):
        values, index, _ = coder.encode(inputs.to(coder.dtype))
        features.append(torch.zeros(len(inputs), coder.num_latents, dtype=values.dtype).scatter(1, index, values))
        outputs.append(coder(inputs.to(coder.dtype)).sae_out)
        coder.save_to_disk(again / name)
    return torch.stack(features), torch.stack(outputs)


def read_saelens(folder: Path, x: Tensor, again: Path) -> tuple[Tensor, Tensor]:
    """All layers, by SAELens."""
    from sae_lens import SAE

    def layer(path: Path) -> int:
        return int(re.findall(r"\d+", path.name)[0])

    features, outputs = [], []
    for path, inputs in zip(sorted(folder.iterdir(), key=layer), x, strict=True):
        sae = SAE.load_from_disk(path)
        features.append(sae.encode(inputs))
        outputs.append(sae(inputs.to(sae.dtype)))
        sae.save_model(again / path.name)
    return torch.stack(features), torch.stack(outputs)


def read_circuit_tracer(folder: Path, x: Tensor, again: Path) -> tuple[Tensor, Tensor]:
    """A set or a cross-layer transcoder, by circuit-tracer, which reads the large matrices when they are needed."""
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
    from circuit_tracer.utils.caching import load_transcoders_from_cache

    dtype = torch.bfloat16 if "bfloat16" in folder.name else torch.float32
    found, settings = load_transcoders_from_cache(folder.name, folder.parent, torch.device("cpu"), dtype)
    x = x.to(dtype)
    features = found.encode(x)
    outputs = found.decode(features.to_sparse() if isinstance(found, CrossLayerTranscoder) else features, x)
    found.to_safetensors(str(again))
    (again / "config.yaml").write_text(yaml.safe_dump(settings))
    return features, outputs


READ: dict[str, Read] = {
    "sparsify": read_sparsify,
    "saelens": read_saelens,
    "circuit_tracer": read_circuit_tracer,
}


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Every weight matters; thresholds are positive but for some, where SAELens clips features at 0 all the same."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.data.copy_(0.5 + drawn.abs() if "threshold" in name else drawn / max(tensor.shape[-1], 1) ** 0.5)


def make_sparsify(folder: Path, d: int, generator: torch.Generator) -> None:
    """Transcoders with and without skip, autoencoders with both ways of saying their size."""
    from sparsify import SparseCoder, SparseCoderConfig

    cases = {
        "transcoder": {"transcode": True},
        "transcoder, skip": {"transcode": True, "skip_connection": True},
        "autoencoder": {},
        "autoencoder, expansion_factor": {"num_latents": 0, "expansion_factor": 4},
    }
    for case, options in cases.items():
        for layer in SPARSE_LAYERS:
            coder = SparseCoder(d, SparseCoderConfig(**{"num_latents": M, "k": K, **options}))
            randomise(coder, generator)
            coder.save_to_disk(folder / case / f"layers.{layer}{'.mlp' if options.get('transcode') else ''}")


def make_saelens(folder: Path, d: int, generator: torch.Generator) -> None:
    """Every architecture of SAELens that this project reads."""
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    def build(kind: str, layer: int, **options: Any) -> Any:
        mlp = "Transcoder" in kind
        hooks = {"hook_name": f"blocks.{layer}.{'mlp.hook_in' if mlp else 'hook_resid_post'}"}
        if mlp:
            hooks["hook_name_out"] = f"blocks.{layer}.mlp.hook_out"
            options = {"d_out": d, "apply_b_dec_to_input": False, **options}
        metadata = SAEMetadata(model_name="some/model", **hooks)
        config = getattr(sae_lens, f"{kind}Config")(d_in=d, d_sae=M, metadata=metadata, **options)
        built = getattr(sae_lens, kind)(config)
        randomise(built, generator)
        return built

    plain: dict[str, tuple[str, dict[str, Any]]] = {
        "topk": ("TopKSAE", {"k": K}),
        "topk, input less b_dec off": ("TopKSAE", {"k": K, "apply_b_dec_to_input": False}),
        "topk, rescaled": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
        "jumprelu": ("JumpReLUSAE", {}),
        "jumprelu, negative thresholds": ("JumpReLUSAE", {}),
        "standard": ("StandardSAE", {}),
        "transcoder": ("Transcoder", {}),
        "skip_transcoder": ("SkipTranscoder", {}),
        "jumprelu_transcoder": ("JumpReLUTranscoder", {}),
        "jumprelu_skip_transcoder": ("JumpReLUSkipTranscoder", {}),
    }
    for case, (kind, options) in plain.items():
        for layer in SPARSE_LAYERS:
            sae = build(kind, layer, **options)
            if "negative" in case:
                sae.threshold.data.sub_(1)
            sae.save_model(folder / case / f"layer_{layer}")
    for layer in SPARSE_LAYERS:
        trained = build("TopKTrainingSAE", layer, k=K)
        trained.save_inference_model(folder / "topk, trained" / f"layer_{layer}")
        batch = build("BatchTopKTrainingSAE", layer, k=float(K))
        batch.save_inference_model(folder / "batchtopk" / f"layer_{layer}")
        batch.save_model(folder / "batchtopk, checkpoint" / f"layer_{layer}")


def make_circuit_tracer(folder: Path, d: int, generator: torch.Generator) -> None:
    """Sets and cross-layer transcoders."""
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    full = {"device": torch.device("cpu"), "dtype": torch.float32}

    def store(case: str, kind: str, built: Any) -> None:
        randomise(built, generator)
        built.to_safetensors(str(folder / case))
        settings = {"model_name": "some/model", "model_kind": kind, "scan": "none", **hooks}
        (folder / case / "config.yaml").write_text(yaml.safe_dump(settings))

    for case, jump, skip in (("relu", False, False), ("jumprelu", True, False), ("jumprelu, skip", True, True)):
        layers = {
            i: SingleLayerTranscoder(
                d, M, JumpReLU(torch.zeros(M)) if jump else nn.functional.relu, i, skip_connection=skip, **full
            )
            for i in range(3)
        }
        store(case, "transcoder_set", TranscoderSet(layers, scan="none", **hooks))
    for case, function in (("cross-layer, relu", "relu"), ("cross-layer, jumprelu", "jump_relu")):
        built = CrossLayerTranscoder(3, M, d, activation_function=function, lazy_decoder=False, **hooks, **full)
        store(case, "cross_layer_transcoder", built)


MAKE = {"sparsify": make_sparsify, "saelens": make_saelens, "circuit_tracer": make_circuit_tracer}


def cases(folder: Path) -> Iterator[Path]:
    """The folders of dictionaries, without what is written beside them."""
    yield from sorted(path for layout in READ for path in (folder / layout).iterdir() if path.suffix == "")


def read_graph(file: Path) -> None:
    """One prompt's graph: circuit-tracer's models accept it and write the same, and make the same nodes.

    Raises:
        ValueError: they do not.
    """
    from circuit_tracer.frontend.graph_models import Model, Node

    written = json.loads(file.read_text())
    nodes = Model.model_validate(written).model_dump()["nodes"]
    own = {
        "cross layer transcoder": lambda n: Node.feature_node(
            int(n["layer"]), n["ctx_idx"], int(n["node_id"].split("_")[1]), n["influence"], n["activation"]
        ),
        "embedding": lambda n: Node.token_node(n["ctx_idx"], n["node_id"].split("_")[1], n["influence"]),
        "logit": lambda n: Node.logit_node(
            n["ctx_idx"], n["feature"], n["clerp"].split('"')[1], int(n["layer"]) - 1, token_prob=n["token_prob"]
        ),
    }
    same = ("node_id", "feature", "layer", "ctx_idx", "feature_type", "token_prob", "activation")
    for node, read in zip(written["nodes"], nodes, strict=True):
        if read != node:
            raise ValueError(f"circuit-tracer reads {read}, written was {node}")
        made = own[node["feature_type"]](node).model_dump() if node["feature_type"] in own else node
        if any(made[name] != node[name] for name in same):
            raise ValueError(f"circuit-tracer makes {made}, written was {node}")


@torch.no_grad()
def main(what: str, folder: Path) -> None:
    """See the module."""
    torch.set_num_threads(1)
    if what == "graph":
        return read_graph(folder)
    x = load_file(folder.parent / "inputs.safetensors")["x"]
    if what == "make":
        for layout, make in MAKE.items():
            make(folder / layout, x.shape[-1], torch.Generator().manual_seed(1))
    for path in list(cases(folder)):
        again = path.with_name(f"{path.name}.again")
        # What SAELens saves of a BatchTopK training it can only train further; inference is by what it saves beside it.
        checkpoint = what == "make" and path.name == "batchtopk, checkpoint"
        source = path.with_name("batchtopk") if checkpoint else path
        features, outputs = READ[path.parent.name](source, x, again)
        out = {"features": features.float().contiguous(), "outputs": outputs.float().contiguous()}
        save_file(out, path.with_name(f"{path.name}.out"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
