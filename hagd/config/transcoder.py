"""`transcoder`: the dictionaries and how they are trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hagd.config.activations import ActivationsConfig, Corpus
from hagd.config.base import Section

ActivationFunction = Literal["topk", "batch_topk", "jumprelu", "relu"]
PredictionHeadKind = Literal["tied", "tied_low_rank", "low_rank", "dense"]
Optimiser = Literal["adam", "adafactor", "adam8bit"]
Selection = Literal["exact", "bfloat16", "int8", "float8"]


class TranscoderConfig(Section):
    """Sparse dictionaries of what each layer computes, trained with Eq. 4 of arXiv 2601.12879."""

    site: Literal["mlp", "resid"] = Field(
        "mlp", description="mlp: from what enters the MLP to what it adds; resid: residual stream to itself (paper)"
    )
    layers: tuple[int, ...] | None = Field(None, description="layers to decompose (null = all)")
    path: str | None = Field(
        None,
        min_length=1,
        description="dictionaries trained elsewhere: a folder in HAGD's, sparsify's, SAELens' or circuit-tracer's "
        "layout; nothing is trained. Of the settings here only site, layers, fvu_warning and "
        "activations.layer_streaming are read; the files decide k, expansion, activation, cross_layer and skip: one "
        "that is neither the default nor what they hold is refused",
    )
    activation: ActivationFunction = Field(
        "topk",
        description="topk: k a token; batch_topk: k a token on average; jumprelu: learnt thresholds, drawn to k on "
        "average; relu: no k, lambda_sparsity alone",
    )
    k: int = Field(32, ge=1, description="active features a token")
    expansion: int = Field(4, ge=1, description="dictionary size m over d_model")
    skip: bool = Field(False, description="a linear map from input to output beside the features (site=mlp)")
    cross_layer: bool = Field(
        False, description="features write to every later decomposed layer too (cross-layer transcoder)"
    )
    selection: Selection = Field(
        "exact",
        description="how the k largest are found for topk. exact: as a product in full precision ranks them; bfloat16: "
        "as one in bfloat16 does; int8: one in eight bits chooses a quarter more, at least 16, of which full precision "
        "chooses; float8: as a product in float8 (e4m3) does, which newer GPUs make faster",
    )
    bandwidth: float = Field(0.1, gt=0, description="width of the straight-through gradient of jumprelu thresholds")
    lambda_prediction: float = Field(0.1, ge=0, description="λ1, weight of the cross-layer prediction term")
    lambda_sparsity: float = Field(1e-3, ge=0, description="λ2, weight of the L1 term")
    prediction_head: PredictionHeadKind = Field(
        "tied",
        description="tied: next layer's encoder on a linear map of this layer's output; low_rank: factors of "
        "head_rank; tied_low_rank: both; dense: m × m (paper)",
    )
    head_rank: int = Field(64, ge=1, description="rank of low-rank prediction heads")
    head_negatives: int = Field(
        512, ge=1, description="features, beside the active ones, on which the prediction loss is estimated a step"
    )
    steps: int = Field(2400, ge=1, description="optimiser steps")
    batch_size: int = Field(512, ge=1, description="tokens a step")
    optimiser: Optimiser = Field(
        "adam", description="adam; adafactor: second moments factored; adam8bit: moments in 8 bits (extra [optim8bit])"
    )
    learning_rate: float = Field(
        3.5e-3,
        gt=0,
        description="peak rate of the optimiser for m = 2¹⁴ features, falling with √m, and of prediction heads; "
        "encoder and decoder: times the cube root of their rows' mean norm at the start, the latter times decoder_rate",
    )
    decoder_rate: float = Field(1.0, gt=0, description="factor of decoders' peak rate; that of encoders is 1")
    warmup_fraction: float = Field(0.05, ge=0, le=1, description="share of the steps with rising rate")
    decay_fraction: float = Field(0.95, ge=0, le=1, description="share of the steps with falling rate, at the end")
    aux_weight: float = Field(1 / 32, ge=0, description="weight of the AuxK term that revives dead features")
    dead_fraction: float = Field(
        0.05, gt=0, le=1, description="a feature silent for this share of all training tokens counts as dead"
    )
    fvu_warning: float = Field(0.25, gt=0, description="warn when the unexplained share of variance exceeds this")
    activations: ActivationsConfig = ActivationsConfig()
    corpus: Corpus | None = Field(None, description="extra text; null = the task's prompts alone")

    @model_validator(mode="after")
    def _layers_ascend(self) -> TranscoderConfig:
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be ascending and distinct, found {list(self.layers)}")
        if self.layers is not None and (not self.layers or self.layers[0] < 0):
            raise ValueError(f"layers must be null (all) or at least one layer from 0 up, found {list(self.layers)}")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> TranscoderConfig:
        if self.site == "resid" and (self.skip or self.cross_layer):
            raise ValueError(
                f"skip and cross_layer need site=mlp, found skip={self.skip}, cross_layer={self.cross_layer} at "
                "site=resid; an autoencoder with either would copy its input"
            )
        if self.selection != "exact" and self.activation != "topk":
            raise ValueError(
                f"selection={self.selection} needs activation=topk, found {self.activation}; set selection=exact"
            )
        return self
