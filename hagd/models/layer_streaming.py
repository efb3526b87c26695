"""A pretrained model whose weights are never in memory as a whole.

Its modules exist without weights (device `meta`). Whenever the forward pass comes to a layer, an embedding or a norm,
the weights of that one module are read from the safetensors files and freed afterwards. A layer computes all sequences
before the next one is loaded, so a forward pass over many sequences reads the weights once; between layers the hidden
states of all sequences are in memory.

Shape legend: B sequences, T positions, d = d_model.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hagd.errors import ModelError
from hagd.models.language_model import LanguageModel, rows_a_pass

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class StreamedLanguageModel(LanguageModel):
    """A frozen model that reads its weights during each forward pass. It has no gradients.

    Args:
        model: from `model_without_weights`.
        weights: where its tensors are.
        tokenizer: its tokenizer.
        name: label.
        device: where layers are computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: StoredWeights,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "model",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(model, tokenizer, name)
        self._weights = weights
        self._device = torch.device(device)
        self._lock = threading.RLock()
        for buffers in (module._buffers for module in model.modules()):
            buffers.update({key: value.to(self._device) for key, value in buffers.items() if value is not None})
        layers = {id(layer) for layer in self.layers}
        for unit, names in self._units():
            streamed = partial(self._stream, unit, names, unit.forward, id(unit) in layers)
            setattr(unit, "forward", streamed)  # noqa: B010 (a method, to the type checker)

    @property
    def device(self) -> torch.device:
        """Where layers are computed and token ids go."""
        return self._device

    @property
    def streams_layers(self) -> bool:
        """Each forward pass reads the weights anew."""
        return True

    @torch.no_grad()
    def hidden(self, tokens: Tensor) -> Tensor:
        """Final-normed residual stream `[B, T, d]` for `tokens` `[B, T]`, one layer of weights at a time."""
        with self._lock:
            return super().hidden(tokens)

    def _units(self) -> Iterator[tuple[nn.Module, dict[str, str]]]:
        """Modules that are loaded as a whole, with the stored name of each of their tensors.

        Raises:
            ModelError: a tensor is missing or has another shape.
        """
        layers = {f"{self.adapter.layers}.{i}": layer for i, layer in enumerate(self.layers)}
        inside = tuple(f"{path}." for path in layers)
        others = {
            path: module
            for path, module in self.model.named_modules()
            if not path.startswith(inside)
            and path not in layers
            and any(True for _ in module.parameters(recurse=False))
        }
        lacking, units = [], []
        for path, module in {**others, **layers}.items():
            names = {}
            for name, parameter in module.named_parameters(recurse=path in layers):
                stored = self._stored_as(f"{path}.{name}", tuple(parameter.shape))
                if stored is None:
                    lacking.append(f"{path}.{name}")
                else:
                    names[name] = stored
            units.append((module, names))
        if lacking:
            raise ModelError(
                f"model {self.name}: the weights lack {len(lacking)} tensors of the shape that config.json asks for "
                f"({', '.join(lacking[:3])}, …); copy or download the model again"
            )
        yield from units

    def _parameter(self, name: str) -> Tensor:
        stored = self._stored_as(name, tuple(self.model.get_parameter(name).shape))
        assert stored is not None, "refused when the model was made"
        return self._weights.read([stored])[stored]

    def _stored_as(self, name: str, shape: tuple[int, ...]) -> str | None:
        """What the files call a parameter; None: they lack it."""
        return next((each for each in self._stored_names(name) if self._weights.shapes.get(each) == shape), None)

    def _stored_names(self, name: str) -> list[str]:
        """What files may call a tensor: its path, with or without the model's prefix, or what it is tied to."""
        adapter = self.adapter
        names = [
            name,
            *(name.replace(path, other, 1) for path, other in adapter.renamed if name.startswith(f"{path}.")),
        ]
        tied = [f"{adapter.unembedding}.weight", f"{adapter.embedding}.weight"]
        if self.model.config.tie_word_embeddings and name in tied:
            names.extend(other for other in tied if other != name)
        prefix = f"{self.model.base_model_prefix}."
        return [each for full in names for each in (full, full.removeprefix(prefix))]

    def _stream(
        self,
        unit: nn.Module,
        names: Mapping[str, str],
        forward: Callable[..., Any],
        is_layer: bool,
        *args: Any,
        **kw: Any,
    ) -> Any:
        with self._lock, self._loaded(unit, names):
            return _by_rows(forward, args, kw) if is_layer else forward(*args, **kw)

    @contextmanager
    def _loaded(self, unit: nn.Module, names: Mapping[str, str]) -> Iterator[None]:
        """Within: the module has its weights."""
        empty = {name: unit.get_parameter(name) for name in names}
        dtype = self.model.dtype
        stored = self._weights.read(names.values())
        try:
            for name, where in names.items():
                _assign(unit, name, nn.Parameter(stored.pop(where).to(self._device, dtype), requires_grad=False))
            yield
        finally:
            for name, parameter in empty.items():
                _assign(unit, name, parameter)


def _assign(unit: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(unit.get_submodule(path), leaf, parameter)


def _by_rows(forward: Callable[..., Tensor], args: Sequence[Any], kw: Mapping[str, Any]) -> Tensor:
    """A layer's output for hidden states `[B, T, d]` (the first argument), some sequences at a time."""
    hidden: Tensor = args[0]
    n, step = len(hidden), rows_a_pass(hidden.shape[1])
    if n <= step:
        return forward(*args, **kw)
    out = torch.empty_like(hidden)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        out[rows] = forward(*_rows_of(tuple(args), rows, n), **_rows_of(dict(kw), rows, n))
    return out


def _rows_of(value: Any, rows: slice, n: int) -> Any:
    """What belongs to some of n sequences; tensors of one dimension run along positions, not along sequences."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 1 and len(value) == n else value
    if isinstance(value, tuple):
        return tuple(_rows_of(each, rows, n) for each in value)
    if isinstance(value, dict):
        return {key: _rows_of(each, rows, n) for key, each in value.items()}
    return value


class StoredWeights:
    """Tensors in safetensors files, by name; nothing is read before it is asked for.

    Attributes:
        shapes: of every tensor.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    self._file_of[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors, memory-mapped: their memory is that of the file's pages, freed with them."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        found = {}
        for path, wanted in by_file.items():
            with safe_open(path, "pt") as file:
                found.update({name: file.get_tensor(name) for name in wanted})
        return found


def weight_files(locate: Callable[[str], Path | None]) -> list[Path]:
    """The safetensors files of a model, as `save_pretrained` writes them. Where a folder has both a single file and an
    index, as after saving twice, `transformers` reads the single file.

    Args:
        locate: the path of one of the model's files; None: it has no such file.

    Raises:
        FileNotFoundError: there are no safetensors files, or one that the index names is missing.
    """
    single = locate(SINGLE)
    if single is not None:
        return [single]
    index = locate(INDEX)
    if index is None:
        raise FileNotFoundError(f"{SINGLE} is missing")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    files = []
    for name in names:
        path = locate(name)
        if path is None:
            raise FileNotFoundError(f"{name} is missing")
        files.append(path)
    return files


def model_without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model that `config` describes, its parameters on the device `meta`, its buffers computed."""
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    with _parameters_without_memory():
        model: PreTrainedModel = build(config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
    return model


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Within: parameters of new modules lose their memory before anything is written to it.

    Under `torch.device("meta")` buffers would have no values either (rotary frequencies), and no file has them.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        empty = None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, empty)

    setattr(nn.Module, "register_parameter", on_meta)  # noqa: B010 (a method, to the type checker)
    try:
        yield
    finally:
        setattr(nn.Module, "register_parameter", register)  # noqa: B010
