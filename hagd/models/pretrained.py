"""Pretrained models from a local folder or from the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hagd.config.model import PretrainedModel
from hagd.errors import ModelError, OutOfMemoryError
from hagd.hub import hub_problem
from hagd.models.architectures import all_adapters
from hagd.models.language_model import LanguageModel, unsupported
from hagd.models.layer_streaming import StoredWeights, StreamedLanguageModel, model_without_weights, weight_files
from hagd.models.out_of_memory import is_out_of_memory
from hagd.models.placement import first_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def load_pretrained(
    config: PretrainedModel, *, tokenizer: PreTrainedTokenizerBase | None = None, layer_streaming: bool = False
) -> LanguageModel:
    """Model and tokenizer of `config.path`; the architecture is checked before any weight is read.

    Only safetensors are read and no code from the repository runs. A `tokenizer` that `load_pretrained_tokenizer` gave
    is not loaded again. With `layer_streaming` the weights stay on disk (`hagd.models.layer_streaming`); layers are
    then computed on one device: a GPU if `config.device_map` names one or spreads models, else the CPU.

    Raises:
        ModelError: names model.path (or the key at fault): missing folder, damaged or missing files, unknown
            architecture, unreachable hub, gated or unknown repository.
        OutOfMemoryError: the weights do not fit.
    """
    source = _checked_source(config)
    if layer_streaming:
        return _stream_weights(source, config, tokenizer)
    model = _load_weights(source, config)
    return LanguageModel(model, tokenizer or _load_tokenizer(source, config), config.name)


def load_pretrained_tokenizer(config: PretrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer of `config.path`; the architecture is checked first.

    Raises:
        ModelError: as `load_pretrained`, of everything but the weights.
    """
    return _load_tokenizer(_checked_source(config), config)


def describe_pretrained(config: PretrainedModel) -> LanguageModel:
    """The model of `config.path` with its tokenizer, but without values of its weights, which nothing reads.

    Raises:
        ModelError: as `load_pretrained`.
    """
    from transformers import AutoConfig

    from hagd.models.layer_streaming import model_without_weights

    source = _checked_source(config)
    description = AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=False)
    model = model_without_weights(description, getattr(torch, config.dtype))
    return LanguageModel(model, _load_tokenizer(source, config), config.name)


def _checked_source(config: PretrainedModel) -> str:
    """The folder or the hub name, once it is known to hold a supported architecture."""
    local = Path(config.path).expanduser()
    folder = local if local.exists() else None
    if folder is None and not _HUB_NAME.fullmatch(config.path):
        raise ModelError(f"model.path={config.path}: no such folder; give an existing folder or a hub name")
    if folder is not None and config.revision is not None:
        raise ModelError(
            f"model.revision={config.revision}: chooses among those of the hub, found the folder model.path="
            f"{config.path}; set model.revision=null"
        )
    description = _read_json(folder / "config.json" if folder else _download_config(config), config)
    _check_architecture(description, config)
    return str(folder) if folder else config.path


def _read_json(path: Path, config: PretrainedModel) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(
            f"model.path={config.path}: has no config.json; expected a folder as `save_pretrained` writes it"
        ) from None
    except ValueError as error:
        raise ModelError(f"model.path={config.path}: config.json is damaged ({error}); copy the folder again") from None
    if not isinstance(description, dict):
        raise ModelError(f"model.path={config.path}: config.json holds no object; copy the folder again")
    return description


def _download_config(config: PretrainedModel) -> Path:
    """`config.json` of a hub repository, from the local cache where it is complete or the network is away."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    problem = hub_problem()
    where = f"model.path={config.path}: "
    try:
        return Path(
            hf_hub_download(config.path, "config.json", revision=config.revision, local_files_only=problem is not None)
        )
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{where}no such folder and not in the local hub cache, and the hub is away: "
            f"{problem or 'the connection failed'}; set model.path to a local folder, check the network, or download "
            "the model once and set HF_HUB_OFFLINE=1"
        ) from None
    except GatedRepoError:
        raise ModelError(
            f"{where}access is gated; accept its licence on its hub page and log in with `hf auth login`, "
            "or set model.path to a local folder"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{where}has no revision {config.revision}; set model.revision to one that exists") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"{where}neither a local folder nor a repository of the hub that you may read; check the spelling, "
            "or log in with `hf auth login` if it is private"
        ) from None
    except EntryNotFoundError:
        raise ModelError(f"{where}this hub repository has no config.json, so it is no transformers model") from None
    except Exception as error:  # transport errors have no common base
        raise ModelError(f"{where}download failed ({_first_line(error)}); check the network and try again") from None


def _check_architecture(description: dict[str, Any], config: PretrainedModel) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = str(description.get("model_type", "unnamed"))
    by_type = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, model_type)
    name = str((description.get("architectures") or [by_type])[0])
    if not any(name in adapter.classes for adapter in all_adapters()):
        raise ModelError(f"model.path={config.path}: {unsupported(name)}")


def _load_weights(source: str, config: PretrainedModel) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    where = f"model.path={config.path}: "
    load: Any = AutoModelForCausalLM.from_pretrained  # typed as if it always returned the model alone
    model: PreTrainedModel
    try:
        model, info = load(
            source,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            device_map=config.device_map,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    # Missing shards, truncated files, sizes that differ from config.json: each raises a type of its own.
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"{where}expected memory for the weights, found too little ({_first_line(error)}); set "
                "model.dtype=bfloat16, model.device_map=auto or transcoder.activations.layer_streaming=true"
            ) from error
        raise ModelError(
            f"{where}the weights cannot be loaded ({_first_line(error)}); expected complete safetensors files that "
            "fit config.json; copy or download the model again"
        ) from error
    lacking = sorted(map(str, info["missing_keys"]))
    if lacking:  # transformers would go on with random values
        raise ModelError(
            f"{where}the weights lack {len(lacking)} tensors ({', '.join(lacking[:3])}, …); "
            "copy or download the model again"
        )
    return model


def _stream_weights(source: str, config: PretrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> LanguageModel:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from transformers import AutoConfig

    def locate(name: str) -> Path | None:
        if Path(source).is_dir():
            path = Path(source) / name
            return path if path.is_file() else None
        try:
            return Path(
                hf_hub_download(source, name, revision=config.revision, local_files_only=hub_problem() is not None)
            )
        except EntryNotFoundError:
            return None

    try:
        weights = StoredWeights(weight_files(locate))
        description = AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=False)
        model = model_without_weights(description, getattr(torch, config.dtype))
    except Exception as error:  # as for the weights
        raise ModelError(
            f"model.path={config.path}: the weights cannot be streamed ({_first_line(error)}); expected complete "
            "safetensors files that fit config.json; copy or download the model again"
        ) from error
    device = first_device(config.device_map)
    return StreamedLanguageModel(model, weights, tokenizer or _load_tokenizer(source, config), config.name, str(device))


def _load_tokenizer(source: str, config: PretrainedModel) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=False
        )
        known = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
        # What transformers makes of a class without its files, or of files of another class.
        if not known or not tokenizer("text").input_ids:
            raise ValueError(f"it knows no text, but only {len(tokenizer)} tokens")
    except Exception as error:  # as for the weights
        raise ModelError(
            f"model.path={config.path}: no usable tokenizer ({_first_line(error)}); expected tokenizer.json beside "
            "config.json; copy or download the model again"
        ) from error
    return tokenizer


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
