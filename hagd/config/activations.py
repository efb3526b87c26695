"""`transcoder.corpus` and `transcoder.activations`: what trains the transcoders and where it is kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hagd.config.base import Section


class Corpus(Section):
    """Text whose activations train the transcoders beside the task's own prompts."""

    dataset: str | None = Field(None, description="hub name, streamed through `datasets`")
    subset: str | None = Field(None, description="configuration of the hub data set")
    split: str = Field("train", description="split of the hub data set")
    column: str = Field("text", description="column that holds the text")
    data_files: str | None = Field(None, description="local text files (glob); replaces the hub data set")
    n_tokens: int = Field(20_000, ge=1, description="tokens to read")
    context: int = Field(128, ge=2, description="tokens a sequence")

    @model_validator(mode="after")
    def _has_a_source(self) -> Corpus:
        if self.dataset is None and self.data_files is None:
            raise ValueError(
                "dataset and data_files: expected a source of text, found null for both; set "
                "transcoder.corpus.dataset to a hub name, transcoder.corpus.data_files to local text files (a path or "
                "a glob pattern), or transcoder.corpus=null"
            )
        return self


class ActivationsConfig(Section):
    """Where the activations that train the transcoders are kept, between the model and the training."""

    storage: Literal["auto", "memory", "disk", "stream"] = Field(
        "auto",
        description="disk: two shards at a time are in memory; stream: so they are, and captured whenever their turn "
        "comes; auto: memory, else disk, else stream, whichever has room. Decides time and space, no result",
    )
    keep: bool = Field(
        False,
        description="on disk below paths.runs/activations, where they stay for all trainings on the same activations, "
        "as in a sweep over k; delete the folder to free the disk. With storage=auto in memory as well, if they fit. "
        "Decides time and space, no result",
    )
    memory_mb: int = Field(4096, ge=1, description="activations in memory: all, or two shards at a time")
    disk_mb: int = Field(
        32_768,
        ge=1,
        description="activations on disk, with keep those of other trainings too; without they are deleted when the "
        "training ends",
    )
    buffer_tokens: int = Field(
        65_536, ge=1, description="tokens of a shard: what is shuffled, loaded and captured together"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="precision that is kept; training computes in float32 either way"
    )
    layer_streaming: bool = Field(
        False,
        description="the model is never loaded as a whole: each capture reads its layers from disk one by one "
        "(model.kind=pretrained, train.py stage=transcoder)",
    )

    @model_validator(mode="after")
    def _kept_on_disk(self) -> ActivationsConfig:
        if self.keep and self.storage not in ("auto", "disk"):
            raise ValueError(f"keep=true needs storage=disk or auto, found {self.storage}")
        return self
