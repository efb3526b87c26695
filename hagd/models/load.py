"""A model that exists already, from wherever its configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hagd.config.model import PackagedModel, PretrainedModel
from hagd.models.language_model import LanguageModel
from hagd.models.placement import refuse_unusable
from hagd.models.pretrained import describe_pretrained, load_pretrained, load_pretrained_tokenizer
from hagd.models.smollm2 import describe_smollm2, load_smollm2, load_smollm2_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_model(
    config: PretrainedModel | PackagedModel,
    cache: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layer_streaming: bool = False,
) -> LanguageModel:
    """The model and its tokenizer; `cache` keeps converted copies between runs.

    A `tokenizer` that `load_tokenizer` gave is not loaded again. With `layer_streaming` a model of files stays there
    and is read layer by layer (`hagd.models.layer_streaming`).

    Raises:
        ModelError: it cannot be loaded; says why and what to do.
    """
    refuse_unusable(config.device_map)
    if isinstance(config, PackagedModel):
        assert not layer_streaming, "refused by the configuration"
        return load_smollm2(config, cache, tokenizer)
    return load_pretrained(config, tokenizer=tokenizer, layer_streaming=layer_streaming)


def load_tokenizer(config: PretrainedModel | PackagedModel, cache: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_model` gives the model, without reading weights.

    Raises:
        ModelError: as `load_model`, of everything but the weights.
    """
    refuse_unusable(config.device_map)  # a tokenizer needs no device, but the model that is loaded after it does
    if isinstance(config, PackagedModel):
        return load_smollm2_tokenizer(config, cache)
    return load_pretrained_tokenizer(config)


def describe_model(config: PretrainedModel | PackagedModel) -> LanguageModel:
    """The model with its tokenizer, but without values of its weights: its sizes are known and nothing runs.

    Raises:
        ModelError: as `load_model`.
    """
    return describe_smollm2(config) if isinstance(config, PackagedModel) else describe_pretrained(config)
