"""Decides where activations are kept, and captures what has to be there before the training begins."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout

from hagd.activations.capture import Site
from hagd.activations.part_files import clear_partials
from hagd.activations.plan import Sequences, plan_shards
from hagd.activations.reader import ShardReader
from hagd.activations.shards import ActivationShards
from hagd.config.activations import ActivationsConfig
from hagd.errors import ConfigError
from hagd.models.language_model import LanguageModel

log = logging.getLogger(__name__)

Storage = Literal["memory", "disk", "stream"]
Progress = Callable[[int, int], None]

_PART_MB = 64
"""Size of a file at most, but for one that holds a single forward pass."""

_RESERVE_MB = 512
"""Disk space that stays free."""

_FILES = "activations-*.safetensors"
"""Whole files; those that another process is writing get another name at any moment."""

_NORM_BYTES = 4
_KEY = "transcoder.activations"


def collect(
    lm: LanguageModel,
    sequences: Sequence[Sequences],
    site: Site,
    layers: Sequence[int],
    config: ActivationsConfig,
    *,
    folder: Path,
    seed: int,
    progress: Progress | None = None,
) -> ActivationShards:
    """Activations of every token of `sequences` that counts, kept as `config.storage` says.

    What is in `folder` already is not captured again, so a killed run continues; a file whose checksum does not fit
    is. Several processes may share a folder. The batches do not depend on where the activations are kept.

    Args:
        lm: the model.
        sequences: what it reads.
        site: what is captured.
        layers: at these layers, ascending.
        config: how it is kept.
        folder: for the files; made when needed.
        seed: decides shards and batches.
        progress: called with sequences done and to do before the training begins.

    Raises:
        ConfigError: the tokens do not fit where `config` wants them; says what would.
        NumericalError: an activation is NaN or infinite.
        OSError: the disk is full or not writable.
    """
    dtype = getattr(torch, config.dtype)
    token_bytes = len(layers) * (1 if site == "resid" else 2) * (lm.d_model * dtype.itemsize + _NORM_BYTES)
    shards = plan_shards(sequences, config.buffer_tokens, max(1, _PART_MB * 2**20 // token_bytes), seed)
    sizes_mb = [shard.n_tokens * token_bytes / 2**20 for shard in shards]
    n_tokens = sum(shard.n_tokens for shard in shards)
    kept_mb = _kept_mb(folder) if config.keep else 0.0
    storage = choose_storage(config, sizes_mb, n_tokens, _free_mb(folder), kept_mb)
    log.info(
        "activations: %d tokens, %.0f MB, shards: %d, %s",
        n_tokens,
        sum(sizes_mb),
        len(shards),
        {"memory": "in memory", "disk": "on disk", "stream": "captured whenever their turn comes"}[storage],
    )
    reader = ShardReader(lm, sequences, shards, site, layers, dtype, folder if storage == "disk" else None)
    if storage == "disk":
        folder.mkdir(parents=True, exist_ok=True)
        _store(reader, folder, progress)
        fits = config.storage == "auto" and sum(sizes_mb) <= config.memory_mb
        loaded = [reader.read(index) for index in range(len(shards) if fits else 1)]
    else:
        wanted = shards if storage == "memory" else shards[:1]
        counts = [shard.n_sequences for shard in wanted]
        loaded = [
            reader.read(index, _after(sum(counts[:index]), sum(counts), progress)) for index in range(len(wanted))
        ]
    return ActivationShards(reader, seed, loaded, ahead=storage == "disk" or lm.device.type != "cpu")


def _store(reader: ShardReader, folder: Path, progress: Progress | None) -> None:
    """Bring all shards into files; several processes with the same folder divide the work."""
    todo = list(range(len(reader.shards)))
    done, total = 0, sum(shard.n_sequences for shard in reader.shards)
    for timeout in (0, -1):  # first what no other process is at, then wait for the others
        for index in list(todo):
            lock = FileLock(folder / f"shard-{index:05d}.lock", timeout=timeout)
            with suppress(Timeout), lock:
                clear_partials(folder, f"activations-{index:05d}-")
                if not reader.stored(index):
                    reader.read(index, _after(done, total, progress))
                todo.remove(index)
                done += reader.shards[index].n_sequences
                _after(done, total, progress)(0)


def _after(done: int, total: int, progress: Progress | None) -> Callable[[int], None]:
    """Reports the sequences of a shard before which `done` of `total` were there."""

    def report(rows: int) -> None:
        if progress is not None:
            progress(done + rows, total)

    return report


def choose_storage(
    config: ActivationsConfig, sizes_mb: Sequence[float], n_tokens: int, free_mb: float, kept_mb: float = 0.0
) -> Storage:
    """Where shards of `sizes_mb` with `n_tokens` in all are kept, beside `kept_mb` of other activations; `auto` takes
    the first of memory, disk and stream that has room.

    Raises:
        ConfigError: there is no room where the configuration wants them.
    """
    total = sum(sizes_mb)
    two = sum(sorted(sizes_mb)[-2:])
    needs = f"{_KEY}.storage={config.storage}{', keep=true' * config.keep}: the activations take {total:,.0f} MB, "
    instead = "keep=false" if config.keep else "storage=stream"
    problems: dict[Storage, str | None] = dict.fromkeys(("memory", "disk", "stream"))
    if total > config.memory_mb:
        problems["memory"] = (
            f"{needs}more than {_KEY}.memory_mb={config.memory_mb}; raise it, set dtype=bfloat16, or storage=auto"
        )
    if two > config.memory_mb:
        fits = max(1, n_tokens // (int(2 * total / config.memory_mb) + 2))  # one shard more than must be
        problems["disk"] = problems["stream"] = (
            f"{_KEY}.buffer_tokens={config.buffer_tokens}: two shards, one in use and one coming, take {two:,.0f} MB, "
            f"more than {_KEY}.memory_mb={config.memory_mb}; lower buffer_tokens to {fits} or raise memory_mb"
        )
    elif total + kept_mb > config.disk_mb:
        beside = f"beside {kept_mb:,.0f} MB in other folders of paths.runs/activations " if kept_mb else ""
        problems["disk"] = (
            f"{needs}{beside}more than {_KEY}.disk_mb={config.disk_mb}; raise it, "
            f"{'delete such folders, ' if kept_mb else ''}set dtype=bfloat16, or {instead}"
        )
    elif total + _RESERVE_MB > free_mb:
        problems["disk"] = (
            f"{needs}and {_RESERVE_MB} MB are to stay free, but {free_mb:,.0f} MB are free; free space, set "
            f"paths.runs to another disk, or {instead}"
        )
    wanted = "disk" if config.keep else config.storage
    if wanted != "auto":
        problem = problems[wanted]
        if problem is None:
            return wanted
        raise ConfigError(problem)
    for storage, problem in problems.items():
        if problem is None:
            return storage
    raise ConfigError(problems["stream"])


def _kept_mb(folder: Path) -> float:
    """Size of what `keep` has left in the folders beside the one that `folder` is in."""
    others = (file for file in folder.parent.parent.glob(f"*/{folder.name}/{_FILES}") if file.parent != folder)
    return sum(file.stat().st_size for file in others) / 2**20


def _free_mb(folder: Path) -> float:
    """Free disk space at `folder`, what is stored there already counted as free."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    held = sum(file.stat().st_size for file in folder.glob(_FILES))
    return (shutil.disk_usage(there).free + held) / 2**20
