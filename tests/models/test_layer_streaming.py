from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hagd.activations import collect as collecting
from hagd.activations.capture import Site, capture, observe
from hagd.activations.collect import collect
from hagd.activations.plan import Sequences
from hagd.config.activations import ActivationsConfig
from hagd.errors import ModelError, NumericalError
from hagd.models import language_model, layer_streaming
from hagd.models.language_model import LanguageModel, rows_a_pass
from hagd.models.layer_streaming import INDEX, SINGLE
from hagd.models.pretrained import load_pretrained
from tests.models.test_pretrained import ALPHABET, SUPPORTED, saved, settings

LENGTH = 7
DEEP = [
    (config, model, {**sizes, "n_layer" if "n_layer" in sizes else "num_hidden_layers": 3})
    for config, model, sizes in SUPPORTED
]
THREE = DEEP[:3]
BOTH = ["single", "sharded"]


def pair(
    folder: Path, row: tuple[str, str, dict[str, int]], files: str = "sharded"
) -> tuple[LanguageModel, LanguageModel]:
    """The model in memory, and the same one streamed."""
    original = saved(folder, *row)
    if files == "sharded":
        (folder / SINGLE).unlink()
        original.save_pretrained(folder, max_shard_size="8KB")
        assert (folder / INDEX).exists() and len(list(folder.glob("*.safetensors"))) > 2
    return load_pretrained(settings(folder)), load_pretrained(settings(folder), layer_streaming=True)


def tokens(n: int) -> Tensor:
    return torch.randint(len(ALPHABET), (n, LENGTH), generator=torch.Generator().manual_seed(n))


def without_weights(lm: LanguageModel) -> bool:
    return all(parameter.is_meta for parameter in lm.model.parameters())


@pytest.mark.parametrize(
    ("row", "files"),
    [
        *(pytest.param(row, "sharded", id=f"{row[1]}-sharded") for row in DEEP),
        # One file is read alike whatever the architecture.
        *(
            pytest.param(row, "single", id=f"{row[1]}-single", marks=[pytest.mark.slow] * (i > 0))
            for i, row in enumerate(DEEP)
        ),
    ],
)
def test_logits_are_those_of_the_model_in_memory(
    tmp_path: Path, row: tuple[str, str, dict[str, int]], files: str
) -> None:
    whole, streamed = pair(tmp_path, row, files)
    assert without_weights(streamed) and not without_weights(whole)
    positions = torch.tensor([[0, LENGTH - 1]]).expand(5, -1)
    assert torch.equal(streamed.logits_at(tokens(5), positions), whole.logits_at(tokens(5), positions))
    assert without_weights(streamed)


@pytest.mark.parametrize("site", ["mlp", "resid"])
@pytest.mark.parametrize("row", THREE, ids=[row[1] for row in THREE])
def test_activations_are_those_of_the_model_in_memory(
    tmp_path: Path, row: tuple[str, str, dict[str, int]], site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the sequences go through a layer in several passes, and are as many as positions."""
    whole, streamed = pair(tmp_path, row)
    for n in (1, LENGTH, 20):
        for x, y in zip(*(capture(lm, tokens(n), site, (0, 2)) for lm in (whole, streamed)), strict=True):
            assert torch.equal(x, y)
    monkeypatch.setattr(language_model, "TOKENS_A_PASS", 3 * LENGTH)
    assert rows_a_pass(LENGTH) == 3
    for n in (LENGTH, 20):
        parts = [capture(whole, part, site, (1,)) for part in tokens(n).split(3)]
        for side, value in enumerate(capture(streamed, tokens(n), site, (1,))):
            assert torch.equal(value, torch.cat([part[side] for part in parts], dim=1))
    assert without_weights(streamed)


def test_each_layer_is_read_once_and_none_above_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "TOKENS_A_PASS", LENGTH)
    _, streamed = pair(tmp_path, THREE[2])
    read: list[str] = []
    original = layer_streaming.StoredWeights.read

    def watched(self: layer_streaming.StoredWeights, names: list[str]) -> dict[str, Tensor]:
        read.extend(names)
        return original(self, names)

    monkeypatch.setattr(layer_streaming.StoredWeights, "read", watched)
    resident: list[int] = []

    def count(*_: object) -> None:
        resident.append(sum(not p.is_meta for p in streamed.model.parameters()))

    with observe(streamed, "mlp", (0, 1), count):
        capture(streamed, tokens(9), "mlp", (0, 1))
    assert len(read) == len(set(read))
    assert {name.split(".")[2] for name in read if ".layers." in name} == {"0", "1"}
    assert set(resident) == {len(list(streamed.layers[0].parameters()))} and len(resident) >= 2 * 9 - 1


@pytest.mark.parametrize("row", THREE, ids=[row[1] for row in THREE])
@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_shards_are_those_of_the_model_in_memory(
    tmp_path: Path, row: tuple[str, str, dict[str, int]], storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "TOKENS_A_PASS", 4 * LENGTH)
    whole, streamed = pair(tmp_path / "model", row)
    keep = torch.rand(40, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.8
    parts = (Sequences(tokens(40), keep), Sequences(tokens(30)[:, :4]))
    config = ActivationsConfig.model_validate({"storage": storage, "buffer_tokens": 150})
    done: list[int] = []
    one, other = (
        collect(lm, parts, "mlp", (0, 2), config, folder=tmp_path / name, seed=0, progress=lambda d, _: done.append(d))
        for name, lm in (("whole", whole), ("streamed", streamed))
    )
    for step in range(8):
        for a, b in zip(one.batch(step, 100), other.batch(step, 100), strict=True):
            assert torch.equal(a, b)
    half = len(done) - done[::-1].index(70) - 1
    assert done[half] == 70 and done.count(70) >= 2
    first = one.batch(0, 100)
    one.close()
    other.close()
    if storage == "disk":
        file = sorted((tmp_path / "streamed").glob("*.safetensors"))[0]
        expected = {name: value.clone() for name, value in load_file(file).items()}
        file.write_bytes(b"damaged")
        with collect(streamed, parts, "mlp", (0, 2), config, folder=tmp_path / "streamed", seed=0) as again:
            assert all(torch.equal(a, b) for a, b in zip(again.batch(0, 100), first, strict=True))
        assert all(torch.equal(value, expected[name]) for name, value in load_file(file).items())


def test_a_lost_file_costs_one_pass_over_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of its source; the others' files are read."""
    monkeypatch.setattr(language_model, "TOKENS_A_PASS", 4 * LENGTH)
    monkeypatch.setattr(collecting, "_PART_MB", 0)
    _, streamed = pair(tmp_path / "model", THREE[0])
    parts = [Sequences(tokens(n)) for n in (6, 7, 8)]
    config, folder = ActivationsConfig(storage="disk"), tmp_path / "activations"
    passes: list[int] = []
    streamed.embedding.register_forward_hook(lambda *_: passes.append(1))
    first = collect(streamed, parts, "mlp", (0, 2), config, folder=folder, seed=0)
    files = sorted(folder.glob("*.safetensors"))
    assert len(passes) == 3 and len(files) == 6
    for source, lost in enumerate((files[:1], files[2:4], files[5:])):
        done: list[int] = []
        for file in lost:
            file.unlink()
        passes.clear()
        again = collect(
            streamed, parts, "mlp", (0, 2), config, folder=folder, seed=0, progress=lambda d, _, to=done: to.append(d)
        )
        assert len(passes) == 1 and done == sorted(done)
        assert min(done) >= 21 - len(parts[source].tokens) and done[-1] == 21
        assert all(torch.equal(a, b) for a, b in zip(again.batch(0, 147), first.batch(0, 147), strict=True))
        again.close()
    first.close()


def test_files_without_the_models_prefix_and_with_a_tied_unembedding(tmp_path: Path) -> None:
    whole, _ = pair(tmp_path, THREE[0])
    stored: dict[str, Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        stored.update(load_file(file))
        file.unlink()
    (tmp_path / INDEX).unlink()
    assert whole.model.config.tie_word_embeddings and "lm_head.weight" not in stored
    save_file({name.removeprefix("transformer."): value for name, value in stored.items()}, tmp_path / SINGLE)
    again = load_pretrained(settings(tmp_path), layer_streaming=True)
    assert torch.equal(again.hidden(tokens(3)), whole.hidden(tokens(3)))


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_embedding_has_either_name(tmp_path: Path, kept: str) -> None:
    saved(tmp_path, *SUPPORTED[2][:2], {**SUPPORTED[2][2], "tie_word_embeddings": True})
    stored = load_file(tmp_path / SINGLE)
    stored[kept] = stored.pop("model.embed_tokens.weight")
    save_file(stored, tmp_path / SINGLE, {"format": "pt"})
    whole, streamed = (load_pretrained(settings(tmp_path), layer_streaming=each) for each in (False, True))
    positions = torch.tensor([[LENGTH - 1]]).expand(3, -1)
    assert torch.equal(streamed.logits_at(tokens(3), positions), whole.logits_at(tokens(3), positions))


@pytest.mark.parametrize("last", BOTH)
def test_of_two_copies_of_the_weights_both_read_the_same(tmp_path: Path, last: str) -> None:
    """Saving a model again in one file, or in several, leaves files of the time before."""
    original = saved(tmp_path, *SUPPORTED[2])
    for files in sorted(BOTH, key=lambda each: each == last):
        with torch.no_grad():
            original.lm_head.weight.add_(1)
        original.save_pretrained(tmp_path, max_shard_size="8KB" if files == "sharded" else "1GB")
    assert (tmp_path / INDEX).exists() and (tmp_path / SINGLE).exists()
    whole, streamed = (load_pretrained(settings(tmp_path), layer_streaming=each) for each in (False, True))
    positions = torch.tensor([[LENGTH - 1]]).expand(3, -1)
    assert torch.equal(streamed.logits_at(tokens(3), positions), whole.logits_at(tokens(3), positions))


def test_precision_is_the_configured_one(tmp_path: Path) -> None:
    saved(tmp_path, *THREE[1])
    whole, streamed = (
        load_pretrained(settings(tmp_path, dtype="bfloat16"), layer_streaming=each) for each in (False, True)
    )
    found = streamed.hidden(tokens(4))
    assert found.dtype == torch.bfloat16 and torch.equal(found, whole.hidden(tokens(4)))


@pytest.mark.parametrize("damage", ["shape", "missing", "file", "truncated"])
def test_weights_that_do_not_fit_are_refused_before_they_are_used(tmp_path: Path, damage: str) -> None:
    pair(tmp_path, THREE[2])
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    file = tmp_path / weight_map[name]
    stored = load_file(file)
    match damage:
        case "shape":
            save_file({**stored, name: stored[name][1:].clone()}, file)
        case "missing":
            save_file({key: value for key, value in stored.items() if key != name}, file)
        case "file":
            file.unlink()
        case "truncated":
            file.write_bytes(file.read_bytes()[:-10])
    wanted = {"shape": name, "missing": name, "file": f"{file.name} is missing", "truncated": "cannot be streamed"}
    with pytest.raises(ModelError, match=wanted[damage]):
        load_pretrained(settings(tmp_path), layer_streaming=True)


def test_an_error_frees_the_weights(tmp_path: Path) -> None:
    _, streamed = pair(tmp_path, THREE[0], "single")
    stored = load_file(tmp_path / SINGLE)
    stored["transformer.h.1.mlp.c_proj.weight"][0, 0] = torch.nan
    save_file(stored, tmp_path / SINGLE, {"format": "pt"})
    with pytest.raises(NumericalError, match="site mlp, layer 1"):
        capture(streamed, tokens(3), "mlp", (0, 1))
    assert without_weights(streamed)
