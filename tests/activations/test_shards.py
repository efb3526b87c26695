from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hagd.activations.capture import capture, observe
from hagd.activations.shards import MASSIVE, ActivationShards, Sequences, collect
from hagd.models.language_model import LanguageModel
from tests.builders import VOCABULARY, random_model

LENGTH = 32


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return random_model(length=LENGTH)


def sequences(n: int, seed: int = 0) -> Sequences:
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(n, LENGTH, generator=g) < 0.9
    return Sequences(torch.randint(VOCABULARY, (n, LENGTH), generator=g), keep)


def all_tokens(shards: ActivationShards, n: int) -> tuple[Tensor, Tensor]:
    read = [shards.shard(i) for i in range(n)]
    return torch.cat([x for x, _ in read], dim=1), torch.cat([y for _, y in read], dim=1)


# 2 layers × 16 wide × 8 bytes = 256 bytes a token: 500 sequences are some 14,400 tokens, 3.5 MB.
PARTS = (sequences(300), sequences(200, seed=1))


def test_one_shard_in_memory_holds_every_kept_token(lm: LanguageModel, tmp_path: Path) -> None:
    shards = collect(lm, PARTS, "mlp", (0, 1), shard_mb=64, folder=tmp_path, seed=0)
    assert not list(tmp_path.iterdir())
    x, y = all_tokens(shards, 1)
    expected = [capture(lm, part.tokens, "mlp", (0, 1)) for part in PARTS]
    for side, value in ((0, x), (1, y)):
        kept = torch.cat([e[side][:, part.keep] for e, part in zip(expected, PARTS, strict=True)], dim=1)
        torch.testing.assert_close(value, kept)


def test_many_shards_hold_the_same_tokens(lm: LanguageModel, tmp_path: Path) -> None:
    whole = collect(lm, PARTS, "mlp", (0, 1), shard_mb=64, folder=tmp_path, seed=0)
    shards = collect(lm, PARTS, "mlp", (0, 1), shard_mb=1, folder=tmp_path, seed=0)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 2 and all(file.suffix == ".safetensors" for file in files)
    assert max(file.stat().st_size for file in files) < 2 * 2**20
    for one, many in zip(all_tokens(whole, 1), all_tokens(shards, len(files)), strict=True):
        torch.testing.assert_close(one, many)


def test_shards_that_exist_are_not_computed_again(lm: LanguageModel, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def collected() -> tuple[ActivationShards, int]:
        forward = 0

        def count(*_: object) -> None:
            nonlocal forward
            forward += 1

        seen.clear()
        with observe(lm, "mlp", (0,), count):
            shards = collect(
                lm,
                PARTS,
                "mlp",
                (0, 1),
                shard_mb=1,
                folder=tmp_path,
                seed=0,
                progress=lambda done, total: seen.append((done, total)),
            )
        return shards, forward

    first, all_batches = collected()
    assert all_batches == len(seen) == 9  # 300 and 200 sequences in batches of 64
    assert seen[-1] == (500, 500)
    files = sorted(tmp_path.iterdir())
    expected = all_tokens(first, len(files))
    files[1].unlink()
    again, some_batches = collected()
    assert 0 < some_batches < all_batches
    assert seen[-1][0] <= 500 and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert all(torch.equal(a, b) for a, b in zip(expected, all_tokens(again, len(files)), strict=True))
    assert collected()[1] == 0
    assert seen[-1] == (500, 500), "shards that exist count as done"


def test_a_folder_that_does_not_exist_is_made(lm: LanguageModel, tmp_path: Path) -> None:
    collect(lm, PARTS, "mlp", (0, 1), shard_mb=1, folder=tmp_path / "a" / "b", seed=0)
    assert list((tmp_path / "a" / "b").iterdir())


def test_a_batch_is_a_function_of_seed_and_step(lm: LanguageModel, tmp_path: Path) -> None:
    def shards(seed: int) -> ActivationShards:
        return collect(lm, PARTS, "mlp", (0, 1), shard_mb=1, folder=tmp_path, seed=seed)

    one, other = shards(0), shards(0)
    other.batch(500, 7)  # what was read before does not matter
    for step in (0, 3, 70, 200):
        x, y = one.batch(step, 7)
        assert x.shape == y.shape == (2, 7, 16)
        assert all(torch.equal(a, b) for a, b in zip((x, y), other.batch(step, 7), strict=True))
    assert not torch.equal(one.batch(0, 7)[0], one.batch(1, 7)[0])
    assert not torch.equal(one.batch(0, 7)[0], shards(1).batch(0, 7)[0])


def test_every_shard_has_its_turn_and_pairs_stay_together(lm: LanguageModel, tmp_path: Path) -> None:
    shards = collect(lm, PARTS, "mlp", (0, 1), shard_mb=1, folder=tmp_path, seed=0)
    n = len(list(tmp_path.iterdir()))
    drawn = set()
    for step in range(0, 64 * n, 16):
        x, y = shards.batch(step, 3)
        torch.testing.assert_close(lm.mlp(1)(x[1]), y[1])
        for i in range(n):
            held = shards.shard(i)[0]
            if all((held == x[:, j : j + 1]).all((0, 2)).any() for j in range(3)):
                drawn.add(i)
    assert drawn == set(range(n))


def test_outliers_train_nothing(lm: LanguageModel, tmp_path: Path) -> None:
    """A token whose MLP output at one layer is massive is dropped at every layer."""
    model = random_model(length=LENGTH)
    part = sequences(20)
    part.tokens[part.tokens == 7] = 0
    part.tokens[3, 4], part.keep[3, 4] = 7, True

    def massive(module: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        factor = torch.ones((*output.shape[:2], 1))
        factor[part.tokens == 7] = 3 * MASSIVE
        return output * factor

    with model.mlp(1).c_proj.register_forward_hook(massive):
        shards = collect(model, [part], "mlp", (0, 1), shard_mb=64, folder=tmp_path, seed=0)
    x, y = shards.shard(0)
    part.keep[3, 4] = False
    expected = capture(model, part.tokens, "mlp", (0, 1))
    torch.testing.assert_close(x, expected[0][:, part.keep])
    torch.testing.assert_close(y, expected[1][:, part.keep])
