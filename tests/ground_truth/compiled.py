"""GPT-2 models whose weights are written by hand, so that their circuits are known.

The residual stream has named blocks. Every entry has a twin of opposite sign and a large constant entry dominates the
norm, so layer norms pass everything on unchanged to within 1e-3. Heads are moved blocks, MLPs lists of ReLU neurons;
each neuron is a feature of an exact transcoder. Beside the mechanism there are decoys: neurons and heads that compute
something of the prompt and write it where nothing reads, or equally to all logits.

Shape legend: T positions, h half the width of the stream, e width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from hagd.models.language_model import LanguageModel
from hagd.transcoders.records import Transcoder, TranscoderSet

LARGE = 1000.0
"""Constant entry of the stream: what all others have to be small against."""

SHARP = 10.0
"""Lead of the attention scores that win."""

GAIN = 8.0
"""Lead, in nats, of a logit whose entry of the block `out` is 1."""


@dataclass
class Stream:
    """Blocks of the residual stream, in order; `one` is 1 everywhere."""

    sizes: dict[str, int]

    def __post_init__(self) -> None:
        self.sizes = {**self.sizes, "one": 1}

    @property
    def half(self) -> int:
        """Entries without twins, the constant included."""
        return sum(self.sizes.values()) + 1

    def block(self, name: str) -> slice:
        """Where a block lies."""
        start = 0
        for other, size in self.sizes.items():
            if other == name:
                return slice(start, start + size)
            start += size
        raise KeyError(name)

    def vector(self, **blocks: Tensor) -> Tensor:
        """`[h]` with these blocks, zero elsewhere."""
        found = torch.zeros(self.half)
        for name, value in blocks.items():
            found[self.block(name)] = value
        return found


@dataclass(frozen=True)
class Head:
    """One head: `query` and `key` `[h, e]` decide where it looks, block `source` is moved to block `target`."""

    query: Tensor
    key: Tensor
    source: str
    target: str
    scale: float = 1.0
    decoy: bool = False


@dataclass(frozen=True)
class Neuron:
    """`ReLU(read · x + bias)` times `write`, both `[h]`."""

    read: Tensor
    bias: float
    write: Tensor
    decoy: bool = False


@dataclass
class Layer:
    """What a layer consists of; `bias` `[h]` is added by its MLP."""

    heads: list[Head] = field(default_factory=list)
    neurons: list[Neuron] = field(default_factory=list)
    bias: Tensor | None = None


def looking_at(stream: Stream, positions: Sequence[int], source: str, target: str, **options: float | bool) -> Head:
    """Attends evenly to `positions`, from everywhere."""
    query, key = torch.zeros(stream.half, stream.half), torch.zeros(stream.half, stream.half)
    query[stream.block("one"), 0] = SHARP
    key[stream.block("position"), 0][list(positions)] = 1.0
    return Head(query, key, source, target, **options)  # type: ignore[arg-type]


def looking_back(stream: Stream, source: str, target: str) -> Head:
    """Attends to the previous position; the first one to itself."""
    query, key = torch.zeros(stream.half, stream.half), torch.zeros(stream.half, stream.half)
    n = stream.sizes["position"]
    query[stream.block("position"), :n] = SHARP * torch.eye(n).roll(-1, dims=1)
    key[stream.block("position"), :n] = torch.eye(n)
    return Head(query, key, source, target)


def matching(stream: Stream, wanted: str, offered: str, source: str, target: str, lead: float = SHARP) -> Head:
    """Attends to the position whose block `offered` equals the own block `wanted`, by a score that leads by `lead`."""
    query, key = torch.zeros(stream.half, stream.half), torch.zeros(stream.half, stream.half)
    n = stream.sizes[wanted]
    query[stream.block(wanted), :n] = lead * torch.eye(n)
    key[stream.block(offered), :n] = torch.eye(n)
    return Head(query, key, source, target)


def decoys(stream: Stream, seen: Sequence[str], count: int, seed: int) -> list[Neuron]:
    """Neurons that read random mixtures of the blocks `seen`; every other one writes to all logits alike."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        read = stream.vector(**{name: torch.randn(stream.sizes[name], generator=g) for name in seen})
        junk = stream.vector(junk=torch.randn(stream.sizes["junk"], generator=g))
        alike = stream.vector(out=torch.ones(stream.sizes["out"]))
        found.append(Neuron(read, 0.3, alike if number % 2 else junk, decoy=True))
    return found


def compile_gpt2(stream: Stream, layers: Sequence[Layer], vocabulary: int, name: str) -> LanguageModel:
    """The model: block `token` is the token, `position` the position, logits are read off block `out`."""
    h, n_heads = stream.half, max(2, *(len(layer.heads) for layer in layers))
    d, n_positions = 2 * h * n_heads, stream.sizes["position"]
    width = max(len(layer.neurons) for layer in layers)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=n_positions,
            n_embd=d,
            n_layer=len(layers),
            n_head=n_heads,
            n_inner=width,
            activation_function="relu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    ).eval()
    body = model.transformer
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for token in range(vocabulary):
            _write(body.wte.weight[token], stream.vector(token=torch.eye(vocabulary)[token]))
        for position in range(n_positions):
            entries = stream.vector(position=torch.eye(n_positions)[position], one=torch.ones(1))
            entries[-1] = LARGE
            _write(body.wpe.weight[position], entries)
        for norm in (body.ln_f, *(n for block in body.h for n in (block.ln_1, block.ln_2))):
            norm.weight.fill_((2 / d) ** 0.5 * LARGE)
        for block, layer in zip(body.h, layers, strict=True):
            _attention(block.attn, stream, layer.heads)
            for number, neuron in enumerate(layer.neurons):
                block.mlp.c_fc.weight[:h, number] = neuron.read
                block.mlp.c_fc.bias[number] = neuron.bias
                _write(block.mlp.c_proj.weight[number], neuron.write)
            if layer.bias is not None:
                _write(block.mlp.c_proj.bias, layer.bias)
        model.lm_head.weight[:, stream.block("out")] = GAIN * torch.eye(vocabulary)
    return LanguageModel(model, name=name)


def _write(row: Tensor, entries: Tensor) -> None:
    """`entries` `[h]` and their twins into a row `[d]`."""
    h = len(entries)
    row[:h], row[h : 2 * h] = entries, -entries


def _attention(attention: torch.nn.Module, stream: Stream, heads: Sequence[Head]) -> None:
    h = stream.half
    d = attention.c_proj.weight.shape[0]
    e = d // attention.num_heads
    for number, head in enumerate(heads):
        start = number * e
        attention.c_attn.weight[:h, start : start + h] = head.query * e**0.5
        attention.c_attn.weight[:h, d + start : d + start + h] = head.key
        size = min(stream.sizes[head.source], stream.sizes[head.target])  # the first entries of the larger block
        value = attention.c_attn.weight[:h, 2 * d + start : 2 * d + start + size]
        value[stream.block(head.source)][:size] = torch.eye(size)
        for entry in range(size):
            moved = stream.vector(**{head.target: head.scale * torch.eye(stream.sizes[head.target])[entry]})
            _write(attention.c_proj.weight[start + entry], moved)


def exact_transcoders(lm: LanguageModel) -> TranscoderSet:
    """One feature a neuron."""
    found = []
    for layer in range(lm.n_layers):
        mlp = lm.mlp(layer)
        enc, dec = mlp.c_fc, mlp.c_proj
        weights = (enc.weight.detach().T.contiguous(), enc.bias.detach(), dec.weight.detach(), dec.bias.detach())
        found.append(Transcoder(layer, None, *weights, threshold=torch.zeros_like(enc.bias.detach())))
    return TranscoderSet(lm.name, "mlp", tuple(found), ())
