from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hagd.artifacts.codec import save_record
from hagd.pipeline.extraction import run_extraction
from hagd.pipeline.job_key import job_key
from hagd.pipeline.pipeline import Pipeline
from hagd.pipeline.stage_list import STAGES
from hagd.search.scorer.records import TrainedScorer
from tests.builders import tiny_extract, tiny_train


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"model__d_mlp": 32},
        {"task__training__steps": 90},
        {"transcoder__k": 3},
        {"hierarchy__branching": 2},
        {"search__pruning": False},
        {"validation__n_random": 4},
        {"trainer__precision": "bf16-mixed"},
        {"graph__scope": "prompt", "graph__prompt": "0 1"},
        {"report__effect_prompts": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_decides_a_result_is_another_job(changes: dict[str, Any]) -> None:
    assert job_key(tiny_extract(Path("a"), **changes)) != job_key(tiny_extract(Path("a")))


@pytest.mark.parametrize(
    "changes",
    [
        {"tracking__mode": "offline"},
        {"trainer__threads": 2},
        {"trainer__checkpoint_every": 7},
        {"graph__batch_size": 3},
        {"validation__batch_size": 3},
        {"transcoder__activations__storage": "disk"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_decides_no_result_is_the_same_job(changes: dict[str, Any]) -> None:
    assert job_key(tiny_extract(Path("b"), **changes)) == job_key(tiny_extract(Path("a")))


def test_batch_topk_follows_the_processes_that_share_its_tokens() -> None:
    """Each picks among its own tokens; of everything else the number of processes decides no more than rounding."""

    def made(**changes: Any) -> tuple[str, dict[str, Any]]:
        pipeline = Pipeline(tiny_extract(Path("a"), **changes), Console(quiet=True))
        return pipeline.key("transcoders"), STAGES["transcoders"].config(pipeline)

    batch = {"transcoder__activation": "batch_topk"}
    shared = [
        {"trainer__strategy": "ddp", "trainer__devices": 2},
        {"trainer__strategy": "auto", "trainer__devices": 2},
        {"trainer__strategy": "fsdp", "trainer__num_nodes": 2},
        {"trainer__strategy": "ddp", "trainer__devices": 3, "trainer__num_nodes": 2},
    ]
    alone = [
        {"trainer__strategy": "layers", "trainer__devices": 2},
        {"trainer__strategy": "ddp", "trainer__devices": 1},
        {"trainer__strategy": "ddp", "trainer__devices": "auto"},  # one on a CPU
    ]
    assert [made(**batch, **trainer)[1].pop("processes") for trainer in shared] == [2, 2, 2, 6]
    assert len({made(**batch, **trainer)[0] for trainer in shared} | {made(**batch)[0]}) == 3
    for same in (*({**batch, **trainer} for trainer in alone), *shared, *alone):
        plain = made(**{name: value for name, value in same.items() if not name.startswith("trainer")})
        assert made(**same) == plain and "processes" not in plain[1]


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ({"transcoder__activation": "jumprelu"}, "transcoder__bandwidth"),
        ({"transcoder__prediction_head": "low_rank"}, "transcoder__head_rank"),
        ({"transcoder__prediction_head": "tied_low_rank"}, "transcoder__head_rank"),
    ],
)
def test_settings_count_where_dictionaries_read_them(kind: dict[str, Any], setting: str) -> None:
    keys = {
        Pipeline(tiny_extract(Path("a"), **kind, **{setting: n}), Console(quiet=True)).key("transcoders")
        for n in (1, 2)
    }
    assert len(keys) == 2


def test_predictions_beside_a_skip_have_a_new_address_and_nothing_else_has() -> None:
    def decided(**changes: Any) -> dict[str, Any]:
        return STAGES["transcoders"].config(Pipeline(tiny_extract(Path("a"), **changes), Console(quiet=True)))

    assert decided(transcoder__skip=True)["skip_version"] == 2
    for changes in ({}, {"transcoder__skip": True, "transcoder__lambda_prediction": 0.0}):
        assert "skip_version" not in decided(**changes)


def test_decoders_at_a_rate_of_their_own_have_a_new_address_and_others_keep_theirs() -> None:
    def decided(**changes: Any) -> dict[str, Any]:
        return STAGES["transcoders"].config(Pipeline(tiny_extract(Path("a"), **changes), Console(quiet=True)))

    assert "decoder_rate" not in decided() and "decoder_rate" not in decided(transcoder__decoder_rate=1.0)
    assert decided(transcoder__decoder_rate=2.0)["decoder_rate"] == 2


def test_what_autocast_changes_has_a_new_address_and_nothing_else_has() -> None:
    def decided(accelerator: str, precision: str) -> dict[str, Any]:
        changes = {"trainer__accelerator": accelerator, "trainer__precision": precision}
        return STAGES["transcoders"].config(Pipeline(tiny_extract(Path("a"), **changes), Console(quiet=True)))

    assert decided("gpu", "bf16-mixed")["autocast_version"] == decided("gpu", "16-mixed")["autocast_version"] == 2
    for changes in (("gpu", "32-true"), ("cpu", "bf16-mixed")):
        assert "autocast_version" not in decided(*changes)


def test_a_packaged_model_has_a_new_address_where_a_device_is_named_and_nowhere_else() -> None:
    def identity(**settings: Any) -> dict[str, Any]:
        config = tiny_extract(Path("a"), model={"kind": "smollm2", **settings}, task={"name": "ioi"})
        return Pipeline(config, Console(quiet=True)).model_identity

    alone = {"kind": "smollm2", "name": "smollm2_135m", "dtype": "float32"}
    assert identity() == alone and identity(device_map="cuda") == {**alone, "device_map": "cuda"}


def test_a_plan_and_stages_of_training_are_jobs_of_their_own() -> None:
    prompt = {"graph__scope": "prompt", "graph__prompt": "0 1"}
    jobs = [
        tiny_extract(Path("a")),
        tiny_extract(Path("a"), **prompt),
        tiny_extract(Path("a"), mode="plan", **prompt),
        *(tiny_train(Path("a"), stage=stage) for stage in ("lm", "transcoder", "gnn")),
        tiny_train(Path("a"), stage="gnn", gnn__edges=True),
        tiny_train(Path("a"), export__format="hagd", export__path="copy"),
    ]
    assert len({job_key(job) for job in jobs}) == len(jobs)
    assert job_key(tiny_train(Path("a"), stage="lm", gnn__edges=True)) == job_key(tiny_train(Path("a"), stage="lm"))


def test_another_scorer_is_another_job(tmp_path: Path) -> None:
    keys = {job_key(tiny_extract(tmp_path))}
    for graph in ("1", "2"):
        save_record(TrainedScorer({}, {}, (), (graph,), None, None, None), tmp_path)
        keys.add(job_key(tiny_extract(tmp_path, search__scorer=str(tmp_path))))
    assert len(keys) == 3


@pytest.mark.usefixtures("undrawn")
def test_a_run_writes_its_key(tiny_runs: Path, tmp_path: Path) -> None:
    config = tiny_extract(tiny_runs)
    run_extraction(config, tmp_path, None, Console(quiet=True))
    assert json.loads((tmp_path / "manifest.json").read_text())["job_key"] == job_key(config)
