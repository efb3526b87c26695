"""SmolLM2-135M reading text files: its activations, captured once.

Shape legend: n tokens, N sequences, T positions, d = d_model.
"""

from __future__ import annotations

import glob
import json
import random
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from captured import MASSIVE, SITES, SitePlace, Subject, norm_limits, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from hagd.activations.capture import Site, observe
from hagd.config.model import PackagedModel
from hagd.models.language_model import LanguageModel
from hagd.models.smollm2 import load_smollm2

CONTEXT = 128
"""Tokens a sequence."""

EXPANSION, K = 8, 64
N_TRAIN, N_SELECTION, N_HELDOUT = 400_000, 20_000, 40_000
LAYERS = (10, 5, 20)

PLACES = tuple(SitePlace(site, layer) for layer in LAYERS for site in SITES)

_BATCH = 16
_SPLICED = 64
"""Held-out sequences on which the loss is measured."""


def smollm2(cache: Path, text: str, n_train: int) -> Subject:
    """Captures what is not in `cache` yet; the first `n_train` tokens of that train.

    Files of `text` (a glob pattern) are shuffled; held-out sequences come from files of their own, tokens to choose by
    from the files of the training tokens.

    Raises:
        ValueError: more tokens wanted than captured, too little text, or `cache` holds other text or sizes.
    """
    if n_train > N_TRAIN:
        raise ValueError(f"--tokens: expected at most {N_TRAIN}, found {n_train}; raise N_TRAIN in {__file__}")
    parts = {"heldout": {"heldout": N_HELDOUT}, "train": {"train": N_TRAIN, "selection": N_SELECTION}}
    request = {"text": text, "tokens": parts, "context": CONTEXT, "massive": MASSIVE}
    cache.mkdir(parents=True, exist_ok=True)
    lm = load_smollm2(PackagedModel(), cache)  # its converted copy is kept there, too
    done = cache / "captured.json"
    if not done.exists():
        _capture(lm, cache, text, parts)
        done.write_text(json.dumps(request))
    elif (found := json.loads(done.read_text())) != request:
        raise ValueError(f"{done}: expected {request}, found {found}; give another --cache or delete this one")
    heldout = load_file(cache / "tokens.safetensors")["heldout"][:_SPLICED]
    return Subject("SmolLM2-135M", cache, lm, heldout, 1, EXPANSION * lm.d_model, K, n_train, LAYERS)


def _capture(lm: LanguageModel, cache: Path, text: str, parts: dict[str, dict[str, int]]) -> None:
    wanted = [sum(sizes.values()) for sizes in parts.values()]
    splits = dict(zip(parts, _sequences(lm, text, *wanted), strict=True))
    save_file(splits, cache / "tokens.safetensors")
    read = {split: _read(lm, tokens, cache / f"raw-{split}") for split, tokens in splits.items()}
    for place in PLACES:
        limits = norm_limits(cache, place, read["train"][place])
        for split, sizes in parts.items():
            write(cache, place, sizes, read[split][place], limits)
    for raw in cache.glob("raw-*"):
        raw.unlink()


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
def _read(lm: LanguageModel, tokens: Tensor, raw: Path) -> dict[SitePlace, tuple[Tensor, ...]]:
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
        if (site, layer) == ("resid", last):
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
    return kept
