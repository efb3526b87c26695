"""Activations of SmolLM2-135M on text files, captured once and read by every contender in the same order.

Shape legend: n tokens, N sequences, T positions, d = d_model.
"""

from __future__ import annotations

import glob
import json
import random
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hagd.activations.capture import Site, observe
from hagd.config.model import PackagedModel
from hagd.models.language_model import LanguageModel
from hagd.models.smollm2 import load_smollm2

CONTEXT = 128
"""Tokens a sequence."""

MASSIVE = 10.0
"""A token whose norm exceeds this many medians of the training tokens, in or out, is left out for everybody."""

_BATCH = 16


@dataclass(frozen=True)
class SitePlace:
    """Where activations are read: an MLP's input and output, or the residual stream after a layer."""

    site: Site
    layer: int

    @property
    def name(self) -> str:
        """Stem of its files."""
        return f"{self.site}{self.layer}"


PLACES = (SitePlace("mlp", 10), SitePlace("resid", 10), SitePlace("mlp", 5), SitePlace("mlp", 20))


@dataclass(frozen=True)
class Captured:
    """One place's tokens `[n, d]`, shuffled, without massive ones. `y` is `x` itself for the residual stream.

    Attributes:
        x_limit: largest norm of an input that is not massive.
        y_limit: the same of an output.
    """

    x: Tensor
    y: Tensor
    x_limit: float
    y_limit: float


def load_language_model(cache: Path) -> LanguageModel:
    """SmolLM2 in float32; its converted copy is kept in `cache`."""
    return load_smollm2(PackagedModel(), cache)


def capture_all(cache: Path, text: str, n_train: int, n_heldout: int) -> None:
    """Write training and held-out activations of every place to `cache`, unless they are there.

    Files of `text` (a glob pattern) are shuffled; held-out sequences come from files of their own.

    Raises:
        ValueError: too little text, or `cache` holds activations of other text or sizes.
    """
    request = {"text": text, "n_train": n_train, "n_heldout": n_heldout, "context": CONTEXT, "massive": MASSIVE}
    done = cache / "captured.json"
    if done.exists():
        found = json.loads(done.read_text())
        if found != request:
            raise ValueError(f"{done}: expected {request}, found {found}; give another --cache or delete this one")
        return
    cache.mkdir(parents=True, exist_ok=True)
    lm = load_language_model(cache)
    splits = dict(zip(("heldout", "train"), _sequences(lm, text, n_heldout, n_train), strict=True))
    save_file(splits, cache / "tokens.safetensors")
    read = {split: _read(lm, tokens, cache / f"raw-{split}") for split, tokens in splits.items()}
    for place in PLACES:
        limits = [MASSIVE * float(side.norm(dim=1).median()) for side in read["train"][place]]
        for split, wanted in (("train", n_train), ("heldout", n_heldout)):
            _write(cache, place, split, read[split][place], limits, wanted)
        (cache / f"{place.name}.json").write_text(json.dumps({"x_limit": limits[0], "y_limit": limits[1]}))
    for raw in cache.glob("raw-*"):
        raw.unlink()
    done.write_text(json.dumps(request))


def load_captured(cache: Path, place: SitePlace, split: str) -> Captured:
    """What `capture_all` wrote."""
    tensors = load_file(cache / f"{place.name}-{split}.safetensors")
    return Captured(
        tensors["x"], tensors.get("y", tensors["x"]), **json.loads((cache / f"{place.name}.json").read_text())
    )


def heldout_tokens(cache: Path, n_sequences: int) -> Tensor:
    """Token ids `[n_sequences, T]` of held-out text."""
    return load_file(cache / "tokens.safetensors")["heldout"][:n_sequences]


def _sequences(lm: LanguageModel, text: str, n_heldout: int, n_train: int) -> Iterator[Tensor]:
    """Token ids `[N, T]`: first the held-out ones, then training ones from other files, 3 % more than asked for."""
    paths = sorted(glob.glob(text, recursive=True))
    random.Random(0).shuffle(paths)
    files = iter(paths)
    generator = torch.Generator().manual_seed(0)
    for wanted, choice in ((n_heldout, 1), (n_train, 4)):
        n_sequences = -(-int(wanted * 1.03) // CONTEXT)
        ids: list[int] = []
        for path in files:
            ids += _token_ids(lm, Path(path))
            if len(ids) >= choice * n_sequences * CONTEXT:
                break
        if len(ids) < n_sequences * CONTEXT:
            raise ValueError(f"--text={text}: expected {n_sequences * CONTEXT} more tokens, found {len(ids)}")
        rows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
        yield rows[torch.randperm(len(rows), generator=generator)[:n_sequences]].contiguous()


def _token_ids(lm: LanguageModel, path: Path) -> list[int]:
    assert lm.tokenizer is not None and lm.tokenizer.eos_token_id is not None
    ids = lm.tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return [*ids, lm.tokenizer.eos_token_id]


class _AllRead(Exception):
    """Ends a forward pass above the last place."""


@torch.no_grad()
def _read(lm: LanguageModel, tokens: Tensor, raw: Path) -> dict[SitePlace, tuple[Tensor, Tensor]]:
    """Inputs and outputs `[N · T, d]` of every place, in files that the operating system pages in."""
    n = tokens.numel()
    kept = {
        place: tuple(
            torch.from_file(f"{raw}-{place.name}-{side}", shared=True, size=n * lm.d_model).view(n, lm.d_model)
            for side in ("x" if place.site == "resid" else "xy")
        )
        for place in PLACES
    }
    last = max(place.layer for place in PLACES)
    start = 0

    def keep(site: Site, layer: int, x: Tensor, y: Tensor) -> None:
        for tensor, value in zip(kept[SitePlace(site, layer)], (x, y), strict=False):
            tensor[start : start + x.shape[0] * CONTEXT] = value.flatten(0, 1)
        if (site, layer) == ("mlp", last):
            raise _AllRead

    for first in range(0, len(tokens), _BATCH):
        start = first * CONTEXT
        with ExitStack() as stack:
            for place in PLACES:

                def record(layer: int, x: Tensor, y: Tensor, site: Site = place.site) -> None:
                    keep(site, layer, x, y)

                stack.enter_context(observe(lm, place.site, [place.layer], record))
            with suppress(_AllRead):
                lm.hidden(tokens[first : first + _BATCH])
        print(f"captured {min(first + _BATCH, len(tokens))} of {len(tokens)} sequences", flush=True)
    return {place: (sides[0], sides[-1]) for place, sides in kept.items()}


def _write(
    cache: Path, place: SitePlace, split: str, sides: tuple[Tensor, Tensor], limits: list[float], wanted: int
) -> None:
    ordinary = torch.ones(len(sides[0]), dtype=torch.bool)
    for side, limit in zip(sides, limits, strict=True):
        ordinary &= side.norm(dim=1) <= limit
    index = ordinary.nonzero().squeeze(1)
    if len(index) < wanted:
        raise ValueError(
            f"{place.name}, {split}: expected {wanted} ordinary tokens, found {len(index)} of {len(ordinary)}"
        )
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(1))[:wanted]]
    tensors = {"x": sides[0][index]}
    if place.site == "mlp":
        tensors["y"] = sides[1][index]
    save_file(tensors, cache / f"{place.name}-{split}.safetensors")
