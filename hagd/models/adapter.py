"""Where the sites of an architecture are: module paths, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Adapter:
    """Names of the modules that every later stage hooks.

    Attributes:
        name: label of the architecture.
        classes: `transformers` classes with this layout.
        backbone: the model without its unembedding; returns the final-normed residual stream.
        embedding, layers, final_norm, unembedding: paths from the model.
        attention, attention_norm, mlp, mlp_norm: paths from one layer. The MLP's input is what enters it
            after its norm, its output is what it adds to the residual stream.
        query, key, value: paths from the attention to what projects to queries, keys and values; one path for a fused
            projection.
        fused: how the three lie in the output of a fused projection: `thirds` (all queries, all keys, all values) or
            `heads` (query, key, value of one head after the other); None for projections of their own.
        rotary: path from the model to what gives angles by position, None for models without.
        attention_output: path from the attention to the projection of the heads' outputs; what enters it are these
            outputs, side by side.
        positions: path from the model to learnt position embeddings, None where there are none.
        renamed: (path, name in weight files) of modules that files call otherwise.
    """

    name: str
    classes: tuple[str, ...]
    backbone: str
    embedding: str
    layers: str
    attention: str
    attention_norm: str
    query: str
    key: str
    value: str
    fused: Literal["thirds", "heads"] | None
    attention_output: str
    mlp: str
    mlp_norm: str
    final_norm: str
    unembedding: str
    positions: str | None = None
    rotary: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()
