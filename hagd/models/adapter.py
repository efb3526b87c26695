"""Where the sites of an architecture are: module paths, nothing else."""

from __future__ import annotations

from dataclasses import dataclass


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
        renamed: (path, name in weight files) of modules that files call otherwise.
    """

    name: str
    classes: tuple[str, ...]
    backbone: str
    embedding: str
    layers: str
    attention: str
    attention_norm: str
    mlp: str
    mlp_norm: str
    final_norm: str
    unembedding: str
    renamed: tuple[tuple[str, str], ...] = ()
