from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hagd.activations.capture import Site, capture, observe
from hagd.activations.collect import Storage, choose_storage, collect
from hagd.activations.outliers import MASSIVE, Outliers
from hagd.activations.reader import ShardActivations
from hagd.config.activations import ActivationsConfig
from hagd.errors import ConfigError, NumericalError
from hagd.models.language_model import LanguageModel
from tests.activations.collected import (
    LENGTH,
    N_SHARDS,
    PARTS,
    STORAGES,
    batches,
    collected,
    exact,
    rows,
    same,
    sequences,
)
from tests.builders import random_model


@pytest.mark.parametrize("site", ["mlp", "resid"])
def test_an_epoch_is_every_token_that_counts(lm: LanguageModel, tmp_path: Path, site: Site) -> None:
    parts = (sequences(60), sequences(40, seed=1))
    shards = collected(lm, tmp_path, site=site, parts=parts, buffer_tokens=1000)
    assert not list(tmp_path.iterdir())
    x, y = shards.batch(0, shards.n_tokens)
    wanted = [capture(lm, part.tokens, site, (0, 1)) for part in parts]
    for side, value in ((0, x), (1, y)):
        kept = torch.cat(
            [w[side][:, part.keep] for w, part in zip(wanted, parts, strict=True) if part.keep is not None], dim=1
        )
        assert kept.shape == value.shape == (2, 2861, 16)
        distance = torch.cdist(rows(value), rows(kept), compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.min(0).values.max() < 1e-4 and distance.min(1).values.max() < 1e-4
        torch.testing.assert_close(value.double().sum(1), kept.double().sum(1), rtol=0, atol=1e-3)
    if site == "mlp":
        torch.testing.assert_close(lm.mlp(1)(x[1]), y[1])
    else:
        assert torch.equal(x, y)


@pytest.mark.parametrize("storage", STORAGES)
def test_batches_do_not_depend_on_the_storage(
    lm: LanguageModel, tmp_path: Path, expected: list[tuple[Tensor, Tensor]], storage: Storage
) -> None:
    with collected(lm, tmp_path, storage) as shards:
        assert same(batches(shards), expected)
        assert same(batches(shards, range(17, 20)), expected[17:20]), "what was read before does not matter"
        assert shards.seconds_waited > 0
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == (2 * N_SHARDS if storage == "disk" else 0), "each shard has sequences of both sources"
    assert not any(thread.name == "activations" for thread in threading.enumerate())


def test_another_device_gets_the_shard_that_is_drawn_from(
    lm: LanguageModel, tmp_path: Path, expected: list[tuple[Tensor, Tensor]]
) -> None:
    """Once, however many batches it gives; what the batches hold is tested on a GPU."""
    there, sent = torch.device("meta"), []
    with collected(lm, tmp_path) as shards, pytest.MonkeyPatch.context() as patch:
        on = ShardActivations.on
        patch.setattr(ShardActivations, "on", lambda shard, device: sent.append(shard) or on(shard, device))
        for step in range(60):
            for side, wanted in zip(shards.batch(step, 997, device=there), expected[step], strict=True):
                assert (side.device, side.shape, side.dtype) == (there, wanted.shape, wanted.dtype)
    assert N_SHARDS < len(sent) <= 4 * N_SHARDS, "three epochs and a bit"


@pytest.mark.parametrize("storage", ["disk", "stream"])
def test_reading_ahead_changes_nothing(
    lm: LanguageModel, tmp_path: Path, expected: list[tuple[Tensor, Tensor]], storage: Storage
) -> None:
    shards = collected(lm, tmp_path, storage)
    for ahead in (False, True):
        shards._ahead = ahead
        assert same(batches(shards), expected)
    shards.batch(0, 10)
    shards.batch(40, 10)  # another shard than the one that is coming
    shards.close()
    assert same(batches(shards, range(3)), expected[:3]), "a closed source begins anew"
    shards.close()


def test_a_shard_is_read_once_an_epoch(lm: LanguageModel, tmp_path: Path) -> None:
    forward = 0

    def count(*_: object) -> None:
        nonlocal forward
        forward += 1

    with observe(lm, "mlp", (0,), count), collected(lm, tmp_path, "stream") as shards:
        first = forward
        assert first > 0
        batches(shards, range(3 * shards.n_tokens // 997))
        assert forward <= first * N_SHARDS * 3


def test_another_seed_gives_other_batches(lm: LanguageModel, tmp_path: Path) -> None:
    config = ActivationsConfig(buffer_tokens=7000)
    one, other = (
        collect(lm, PARTS, "mlp", (0, 1), config, folder=tmp_path, seed=seed).batch(0, 50)[0] for seed in (0, 1)
    )
    assert not torch.equal(one, other)


def test_half_precision_is_kept_and_single_precision_given(
    lm: LanguageModel, tmp_path: Path, expected: list[tuple[Tensor, Tensor]]
) -> None:
    for storage in ("memory", "disk"):
        with collected(lm, tmp_path, storage, dtype="bfloat16") as shards:
            found = batches(shards, range(12))
        assert same(found, [(x.bfloat16().float(), y.bfloat16().float()) for x, y in expected[:12]])
        assert found[0][0].dtype == torch.float32
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size < 0.6 * shards.n_tokens * 256


@pytest.mark.parametrize("world", [2, 3])
def test_the_shares_of_all_processes_are_the_batch(
    lm: LanguageModel, tmp_path: Path, expected: list[tuple[Tensor, Tensor]], world: int
) -> None:
    shards = collected(lm, tmp_path)
    for step in (0, 7, 20):
        for side in (0, 1):
            shares = [shards.batch(step, 997, (rank, world))[side] for rank in range(world)]
            together = torch.empty_like(expected[step][side])
            for rank, share in enumerate(shares):
                together[:, rank::world] = share
            assert torch.equal(together, expected[step][side])
    assert torch.equal(shards.batch(0, 1, (1, 2))[0], shards.batch(0, 1)[0]), "too small to be divided"


def test_a_sample_is_ordinary_tokens_of_the_first_shard(lm: LanguageModel, tmp_path: Path) -> None:
    shards = collected(lm, tmp_path)
    x, y = shards.sample(100)
    assert x.shape == y.shape == (2, 100, 16) and torch.equal(x, shards.sample(100)[0])
    torch.testing.assert_close(lm.mlp(0)(x[0]), y[0])
    whole = shards.shard(0)[0]
    assert exact(x) <= exact(whole) and exact(shards.sample(10**6)[0]) == exact(whole)


def massive(factor: float, token: int = 7) -> LanguageModel:
    """A model whose second MLP writes `factor` times as much where the token is `token`."""
    model = random_model(length=LENGTH)
    current: list[Tensor] = []
    model.model.transformer.wte.register_forward_pre_hook(lambda _, args: current.append(args[0]))

    def enlarge(module: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * torch.where(current[-1] == token, factor, 1.0)[..., None]

    model.mlp(1).c_proj.register_forward_hook(enlarge)
    return model


def test_outliers_train_nothing(tmp_path: Path) -> None:
    """A token whose MLP output at one layer is massive is dropped at every layer, and only such a token."""
    part = sequences(100)
    rare = torch.rand(part.tokens.shape, generator=torch.Generator().manual_seed(5)) < 0.05
    part.tokens[part.tokens == 7] = 0
    part.tokens[rare] = 7
    model = massive(30 * MASSIVE)
    shards = collected(model, tmp_path, parts=(part,), buffer_tokens=1000)
    assert part.keep is not None
    x, y = shards.batch(0, shards.n_tokens)
    assert shards.n_tokens == int(part.keep.sum()) and not (y.norm(dim=-1) > shards.outliers.y_limit[:, None]).any()
    whole = capture(model, part.tokens, "mlp", (0, 1))
    flat_x, flat_y = (side[:, part.keep] for side in whole)
    keep = shards.outliers.keep(flat_x, flat_y)
    assert torch.equal(keep, ~rare[part.keep])
    distance = torch.cdist(rows(x), rows(flat_x[:, keep]), compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.min(0).values.max() < 1e-4 and distance.min(1).values.max() < 1e-4


def test_limits_are_medians_of_the_first_shard() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 9, 4, generator=g), torch.randn(2, 9, 4, generator=g)
    outliers = Outliers.of(x.norm(dim=-1), y.norm(dim=-1))
    for side, limit in ((x, outliers.x_limit), (y, outliers.y_limit)):
        torch.testing.assert_close(limit, MASSIVE * side.norm(dim=-1).sort(dim=1).values[:, 4])
    x[1, 3] *= 100
    y[0, 5] *= 100
    assert outliers.keep(x, y).tolist() == [i not in (3, 5) for i in range(9)]


def test_a_shard_of_outliers_is_an_error(tmp_path: Path) -> None:
    one, other = sequences(300), sequences(300)
    one.tokens[one.tokens == 7], other.tokens[:] = 0, 7
    shards = collected(massive(1000.0), tmp_path, "stream", parts=(one,))
    shards._reader.sequences = (other,)
    shards.close()
    with pytest.raises(NumericalError, match="buffer_tokens"):
        shards.batch(0, 10)


@pytest.mark.parametrize(
    ("storage", "sizes", "free", "expected"),
    [
        ("auto", [50, 49], 1e6, "memory"),
        ("auto", [50, 49, 2], 1e6, "disk"),
        ("auto", [40.0] * 20, 1e6, "stream"),
        ("auto", [40.0] * 5, 600, "stream"),
        ("auto", [40.0] * 5, 800, "disk"),
        ("auto", [60.0] * 5, 1e6, r"buffer_tokens=1000: two shards.*take 120 MB.*memory_mb=100; lower .* to 625"),
        ("memory", [50, 49, 2], 1e6, r"storage=memory: .* 101 MB, more than .*memory_mb=100; raise it"),
        ("memory", [80, 20], 1e6, "memory"),
        ("disk", [50], 1e6, "disk"),
        ("disk", [40.0] * 20, 1e6, r"storage=disk: .* 800 MB, more than .*disk_mb=500; raise it"),
        ("disk", [40.0] * 5, 600, r"storage=disk: .* 200 MB, .* but 600 MB are free; free space"),
        ("disk", [60.0] * 5, 1e6, "buffer_tokens=1000"),
        ("stream", [40.0] * 20, 0, "stream"),
        ("stream", [60.0] * 20, 0, "buffer_tokens=1000"),
    ],
)
def test_storage_is_where_there_is_room(storage: Any, sizes: list[float], free: float, expected: str) -> None:
    config = ActivationsConfig(storage=storage, memory_mb=100, disk_mb=500, buffer_tokens=1000)
    if expected in STORAGES:
        assert choose_storage(config, sizes, 5000, free) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            choose_storage(config, sizes, 5000, free)


@pytest.mark.parametrize("buffer_tokens", [10**6, 19_000, 9000])
def test_the_buffer_that_is_advised_fits(lm: LanguageModel, tmp_path: Path, buffer_tokens: int) -> None:
    """Also where a shard is much smaller than the buffer, because there are no more tokens."""
    with pytest.raises(ConfigError) as error:
        collected(lm, tmp_path, "stream", memory_mb=1, buffer_tokens=buffer_tokens)
    advised = re.search(r"lower buffer_tokens to (\d+)", str(error.value))
    assert advised is not None
    collected(lm, tmp_path, "stream", memory_mb=1, buffer_tokens=int(advised[1])).close()


def test_what_is_kept_is_kept_on_disk() -> None:
    assert choose_storage(ActivationsConfig(), [1.0], 100, 1e6) == "memory"
    assert choose_storage(ActivationsConfig(keep=True), [1.0], 100, 1e6) == "disk"
    with pytest.raises(ValueError, match="keep=true needs storage=disk or auto, found stream"):
        ActivationsConfig(keep=True, storage="stream")


def test_the_disk_is_bounded_over_all_that_is_kept(lm: LanguageModel, tmp_path: Path) -> None:
    for job in ("a", "b"):
        collected(lm, tmp_path / job / "activations", "auto", keep=True, disk_mb=40).close()
    sizes = [sum(f.stat().st_size for f in (tmp_path / job).rglob("*.safetensors")) for job in ("a", "b")]
    bound = int(1.5 * sizes[0] / 2**20)
    collected(lm, tmp_path / "b" / "activations", "auto", keep=True, disk_mb=2 * bound).close()
    with pytest.raises(ConfigError, match=r"beside \d+ MB in other folders of .*delete such folders, .*keep=false"):
        collected(lm, tmp_path / "b" / "activations", "auto", keep=True, disk_mb=bound)


def test_a_file_that_has_just_got_its_name_is_no_error(lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / f"activations-00000-000.{os.getpid()}.partial").symlink_to("gone")
    activations = collected(lm, tmp_path, "stream")
    assert activations.n_tokens > 0
    activations.close()


def test_too_much_for_the_disk_is_refused_before_anything_is_captured(lm: LanguageModel, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("captured")

    with observe(lm, "mlp", (0,), refuse), pytest.raises(ConfigError, match="disk_mb=1"):
        collected(lm, tmp_path / "a" / "b", "disk", disk_mb=1)
    assert not (tmp_path / "a").exists()
