"""`extract.py graph.scope=prompt` on a tiny model: what it leaves behind, what it reuses, what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer, normalizers

from hagd.artifacts.codec import save_record
from hagd.config.load import load_config
from hagd.config.run import ExtractConfig
from hagd.config.stages import LogitsConfig
from hagd.errors import ConfigError, ModelError
from hagd.models.pretrained import load_pretrained
from hagd.pipeline.pipeline import Pipeline
from hagd.pipeline.progress import StageProgress
from hagd.pipeline.prompt_extraction import run_prompt
from hagd.pipeline.prompt_plan import run_plan
from hagd.pipeline.prompt_stages import explain_prompt, logit_tokens
from tests.builders import random_transcoders, tiny_extract
from tests.models.test_pretrained import SUPPORTED, saved, settings

QUIET = Console(quiet=True)


def prompt_config(runs: Path, prompt: str = "3 7 5", **changes: Any) -> ExtractConfig:
    return tiny_extract(runs, graph__scope="prompt", graph__prompt=prompt, **changes)


@pytest.fixture(scope="module")
def explained(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("prompt")
    return folder, run_prompt(prompt_config(tiny_runs), folder, None, QUIET)


def test_the_run_folder_is_complete(tiny_runs: Path, explained: tuple[Path, dict[str, float]]) -> None:
    folder, metrics = explained
    assert {file.name for file in folder.iterdir()} == {
        "config.yaml",
        "manifest.json",
        "graph.json",
        "neuronpedia.json",
        "metrics.json",
        "report.html",
    }
    assert load_config(ExtractConfig, yaml.safe_load((folder / "config.yaml").read_text())) == prompt_config(tiny_runs)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["graph.tokens"] == 3 and metrics["graph.active_features"] == 2 * 3 * 4
    assert metrics["graph.sum_error"] < 1e-4 and 0 < metrics["graph.replacement"] <= 1
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    assert set(stages) == {"task", "lm", "prompts", "transcoders", "prompt_graph", "prompt_hierarchy", "prompt_report"}
    assert stages["transcoders"]["reused"], "the dictionaries of the task's own run"
    page = (folder / "report.html").read_text()
    assert "3 7 5" in page and page.count("<canvas") == 1 and "$" not in page.split("<script")[0]


def test_the_terminal_names_the_folder(tiny_runs: Path, tmp_path: Path) -> None:
    folder, console = tmp_path / "run[a]", Console(file=io.StringIO())
    run_prompt(prompt_config(tiny_runs), folder, None, console)
    assert f"results: {folder}\n" in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_interrupted_graph_leaves_no_edges(tiny_runs: Path, tmp_path: Path) -> None:
    class Interrupted(StageProgress):
        def part(self, name: str, done: int, total: int) -> None:
            assert list((tmp_path / "edges").iterdir())
            raise KeyboardInterrupt

    config = prompt_config(tiny_runs)
    pipeline = Pipeline(config, QUIET)
    task, transcoders = pipeline.get("prompts"), pipeline.get("transcoders")
    with pytest.raises(KeyboardInterrupt):
        explain_prompt(config, pipeline.lm, task, transcoders, tmp_path, Interrupted("prompt_graph", QUIET))
    assert not list(tmp_path.iterdir()), "the next attempt begins anew"


def test_graph_json_holds_the_record(tiny_runs: Path, explained: tuple[Path, dict[str, float]]) -> None:
    written = json.loads((explained[0] / "graph.json").read_text())
    graph = Pipeline(prompt_config(tiny_runs), QUIET).get("prompt_graph")
    assert written["tokens"] == ["3", "7", "5"] and len(written["nodes"]) == len(graph.nodes)
    kinds = {node["id"]: node["kind"] for node in written["nodes"]}
    assert set(kinds.values()) <= {"feature", "error", "token", "logit"}
    assert [edge["weight"] for edge in written["edges"]] == graph.edge_attr.tolist()
    for edge in written["edges"]:
        assert kinds[edge["target"]] in ("feature", "logit") and kinds[edge["source"]] != "logit"


def test_the_shared_file_groups_the_features_by_supernode(tiny_runs: Path, tmp_path: Path) -> None:
    config = prompt_config(tiny_runs, graph__pruning={"nodes": 1.0, "edges": 1.0}, hierarchy__min_size=4)
    run_prompt(config, tmp_path, None, QUIET)
    written = json.loads((tmp_path / "neuronpedia.json").read_text())
    pipeline = Pipeline(config, QUIET)
    graph, hierarchy, report = (pipeline.get(f"prompt_{part}") for part in ("graph", "hierarchy", "report"))
    assert len(written["nodes"]) == len(graph.nodes) and len(written["links"]) == len(graph.edge_attr)
    features = [node["node_id"] for node in written["nodes"] if node["feature_type"] == "cross layer transcoder"]
    grouped = [member for _, *members in written["qParams"]["supernodes"] for member in members]
    assert features and sorted(grouped) == sorted(features)
    assert len(written["qParams"]["supernodes"]) > 1
    best_first = graph.nodes.cumulative[np.argsort(-graph.nodes.influence, kind="stable")]
    assert 0 < best_first[0] < 1 and (np.diff(best_first) >= 0).all()
    hierarchy.require(graph)
    for view, *path in zip(report.nodes, *(level.supernode.tolist() for level in hierarchy.levels), strict=True):
        assert view.supernodes == tuple(path)
    sizes = [[each.n_nodes for each in level.supernodes] for level in report.levels]
    assert sizes == [np.bincount(level.supernode).tolist() for level in hierarchy.levels]


def test_supernodes_promote_what_their_features_write_together(tiny_runs: Path) -> None:
    config = prompt_config(tiny_runs, graph__pruning={"nodes": 1.0, "edges": 1.0}, hierarchy__min_size=4)
    pipeline = Pipeline(config, QUIET)
    graph, report, task = (pipeline.get(name) for name in ("prompt_graph", "prompt_report", "task"))
    decoders = {each.layer: each.W_dec for each in pipeline.get("transcoders").transcoders}
    compared = 0
    for number, supernode in enumerate(report.levels[-1].supernodes):
        rows = [view.id for view in report.nodes if view.kind == "feature" and view.supernodes[-1] == number]
        terms = [
            float(graph.nodes.value[i]) * decoders[int(graph.nodes.layer[i])][int(graph.nodes.feature[i])] for i in rows
        ]
        if not terms:
            assert supernode.promoted == ()
            continue
        logits = pipeline.lm.unembedding.weight @ sum(terms)
        best = int(logits.argmax())
        token, value = supernode.promoted[0]
        assert (token, value) == (task.vocabulary[best], pytest.approx(float(logits[best] - logits.mean()), rel=1e-4))
        compared += 1
    assert compared > 1


def test_a_task_run_shares_everything_up_to_the_dictionaries(tiny_runs: Path) -> None:
    task, prompt, other = (
        Pipeline(config, QUIET)
        for config in (tiny_extract(tiny_runs), prompt_config(tiny_runs), prompt_config(tiny_runs, "3 7 6"))
    )
    assert prompt.key("transcoders") == task.key("transcoders") and prompt.key("graph") == task.key("graph")
    assert prompt.key("prompt_graph") != other.key("prompt_graph")
    limited = Pipeline(prompt_config(tiny_runs, graph__memory_limit_mb=10_000), QUIET)
    assert limited.key("prompt_graph") == prompt.key("prompt_graph")


def test_a_difference_of_logits_is_one_node(tiny_runs: Path, tmp_path: Path) -> None:
    chosen = {"graph__logits": {"tokens": ["7"], "minus": "5"}}
    metrics = run_prompt(prompt_config(tiny_runs, **chosen), tmp_path, None, QUIET)
    assert metrics["graph.logits"] == 1
    nodes = json.loads((tmp_path / "graph.json").read_text())["nodes"]
    assert [node["feature"] for node in nodes if node["kind"] == "logit"] == [-1]
    assert '"7 − 5"' in (tmp_path / "report.html").read_text()
    shared = json.loads((tmp_path / "neuronpedia.json").read_text())["nodes"]
    (logit,) = (node["clerp"] for node in shared if node["feature_type"] == "logit")
    assert logit.startswith('Output "7 − 5" (p=')


def test_two_texts_of_one_token_are_refused(tmp_path: Path) -> None:
    """The model writes both in lower case."""
    saved(tmp_path, *SUPPORTED[0])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lm = load_pretrained(settings(tmp_path))
    for logits, key in (({"tokens": ("a", "b", "A")}, "tokens"), ({"tokens": ("a",), "minus": "A"}, "minus")):
        with pytest.raises(ConfigError, match=rf"graph\.logits\.{key}: expected distinct tokens .* found 'a' and 'A'"):
            logit_tokens(LogitsConfig(**logits), lm, ())
    assert len(logit_tokens(LogitsConfig(tokens=("a",), minus="b"), lm, ())) == 2


def test_an_attention_score_is_explained_beside_the_graph(tiny_runs: Path, tmp_path: Path) -> None:
    asked = {"graph__score": {"layer": 1, "head": 0, "query": 2, "key": 1, "pairs": 5}}
    metrics = run_prompt(prompt_config(tiny_runs, **asked), tmp_path, None, QUIET)
    written = json.loads((tmp_path / "graph.json").read_text())["attention_score"]
    assert written["score"] == metrics["graph.score"] and len(written["terms"]) == 5
    assert all(
        end is None or end[0] in ("feature", "error", "token") for t in written["terms"] for end in (t["query"],)
    )
    assert "layer 1, head 0: from 2 5 to 1 7" in (tmp_path / "report.html").read_text()


def test_heads_of_a_prompt_reach_the_page(tiny_runs: Path, tmp_path: Path) -> None:
    asked = {"graph__heads": True, "graph__score": {"layer": 1, "head": 0, "query": 2, "key": 1, "pairs": 200}}
    metrics = run_prompt(prompt_config(tiny_runs, **asked), tmp_path, None, QUIET)
    written = json.loads((tmp_path / "graph.json").read_text())
    heads = {node["id"]: node for node in written["nodes"] if node["kind"] == "head"}
    shared = json.loads((tmp_path / "neuronpedia.json").read_text())["nodes"]
    assert len({node["node_id"] for node in shared}) == len(written["nodes"])
    assert sum(node["feature_type"] == "attention head" for node in shared) == len(heads)
    assert metrics["graph.heads"] == len(heads) > 0 and metrics["graph.sum_error"] < 1e-4
    ends = [(edge["source"] in heads, edge["target"] in heads) for edge in written["edges"]]
    assert any(source for source, _ in ends) and any(target for _, target in ends)
    assert any(term["query"] and term["query"][0] == "head" for term in written["attention_score"]["terms"])
    page = (tmp_path / "report.html").read_text()
    shown = json.loads(page.split('<script type="application/json" id="circuit-data">')[1].split("</script>")[0])[
        "nodes"
    ]
    assert [node["feature"] for node in heads.values()] == [
        i for i, kind in zip(shown["feature"], shown["kind"], strict=True) if kind == "head"
    ]
    named = {f"L{node['layer']}.{node['feature']}" for node in heads.values()}
    assert named <= set(shown["label"]) and f"{len(heads)} attention head" in page
    assert all(shown["promoted"][i] for i in heads)


def test_heads_change_the_key_of_this_graph_alone(tiny_runs: Path) -> None:
    plain, heads, some = (
        Pipeline(prompt_config(tiny_runs, **changes), QUIET)
        for changes in ({}, {"graph__heads": True}, {"graph__heads": True, "graph__head_layers": (1,)})
    )
    assert plain.key("transcoders") == heads.key("transcoders")
    assert len({each.key("prompt_graph") for each in (plain, heads, some)}) == 3


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ("3 seven", {}, r"graph\.prompt: expected words of the task's vocabulary .*found 'seven'"),
        ("3 7 5 1 2", {}, r"graph\.prompt: expected at most 3 tokens.*found 5"),
        ("  ", {}, r"graph\.prompt: expected at least one token, found '  '; set a text"),
        ("3", {"graph__skip_first": True}, r"graph\.skip_first: expected .* found one token \('3'\); lengthen"),
        ("3 7 5", {"graph__logits": {"tokens": ["x"]}}, r"graph\.logits\.tokens: expected words .*found 'x'"),
    ],
)
def test_what_the_model_does_not_know_is_refused_before_any_work(
    tmp_path: Path, prompt: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_prompt(prompt_config(tmp_path, prompt, **changes), tmp_path / "out", None, QUIET)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize("changes", [{}, {"graph__max_features": 3, "graph__strongest": 2, "graph__heads": True}])
def test_one_token_is_a_prompt(tiny_runs: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    asked = {"graph__score": {"layer": 1}, "graph__memory_limit_mb": 100_000, **changes}
    metrics = run_prompt(prompt_config(tiny_runs, "3", **asked), tmp_path, None, QUIET)
    assert metrics["graph.tokens"] == 1 and metrics["graph.active_features"] == 2 * 4
    assert metrics["graph.sum_error"] < 1e-4 and metrics["graph.edges"] > 0


@pytest.mark.parametrize("heads", [False, True])
def test_a_plan_is_printed_and_nothing_else_runs(tmp_path: Path, heads: bool) -> None:
    config = prompt_config(tmp_path, mode="plan", graph__heads=heads)
    figures = run_plan(config, tmp_path / "out", QUIET)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == figures
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["active"] == figures["plan.active_features"] == 24
    assert plan["peak_mb"] == pytest.approx(sum(plan["memory_mb"].values()))
    assert not (tmp_path / "artifacts").exists() and ("heads" in plan["memory_mb"]) == heads


@pytest.mark.parametrize(
    ("device_map", "gpu"),
    [("cpu", True), (None, True), ("auto", False)],
)
def test_a_plan_is_measured_where_the_model_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device_map: str | None, gpu: bool
) -> None:
    """Where there is no GPU, measuring on one fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    saved(tmp_path / "model", *SUPPORTED[0])
    model = {"kind": "pretrained", "path": str(tmp_path / "model"), "device_map": device_map}
    config = prompt_config(tmp_path, "ab cd", model=model, task={"name": "ioi"}, mode="plan")
    assert run_plan(config, tmp_path / "out", QUIET)["plan.seconds"] > 0


@pytest.mark.parametrize("model", [{"kind": "pretrained", "path": "gpt2"}, {"kind": "smollm2"}], ids=["hf", "smollm2"])
@pytest.mark.parametrize(("device_map", "n_gpus"), [("cuda:1", 0), ("cuda:1", 1), ("nowhere", 0), ("meta", 0)])
def test_a_plan_where_no_model_can_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, str], device_map: str, n_gpus: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    config = prompt_config(tmp_path, model={**model, "device_map": device_map}, task={"name": "ioi"}, mode="plan")
    with pytest.raises(ModelError, match=rf"model\.device_map={device_map}: expected a (GPU|device)"):
        run_plan(config, tmp_path / "out", QUIET)


def test_a_plan_is_of_the_dictionaries_in_the_files(tiny_runs: Path, tmp_path: Path) -> None:
    lm = Pipeline(prompt_config(tiny_runs), QUIET).lm
    save_record(random_transcoders(lm, layers=(1,), k=2), tmp_path / "own")
    config = prompt_config(tiny_runs, mode="plan", transcoder__path=str(tmp_path / "own"))
    assert run_plan(config, tmp_path / "out", QUIET)["plan.active_features"] == 2 * 3


@pytest.mark.parametrize("mode", ["run", "plan"])
def test_a_graph_beyond_the_limit_is_refused_with_its_plan_before_any_work(tmp_path: Path, mode: str) -> None:
    config = prompt_config(tmp_path, mode=mode, graph__memory_limit_mb=10)
    run = run_plan if mode == "plan" else lambda config, folder, console: run_prompt(config, folder, None, console)
    with pytest.raises(ConfigError, match=r"graph\.memory_limit_mb: expected .* at most 10 MB of memory, found a plan"):
        run(config, tmp_path / "out", QUIET)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "plan"}, "mode=plan plans the graph of one prompt, found graph.scope=task"),
        ({"graph__scope": "prompt"}, "scope=prompt and graph.prompt belong together"),
        ({"graph__prompt": "3"}, "scope=prompt and graph.prompt belong together"),
        (
            {"graph__scope": "prompt", "graph__prompt": "3", "transcoder__site": "resid"},
            "needs transcoder.site=mlp, found resid",
        ),
        (
            {"graph__scope": "prompt", "graph__prompt": "3", "graph__logits": {"minus": "5"}},
            "graph.logits.minus needs exactly one token",
        ),
        (
            {"graph__scope": "prompt", "graph__prompt": "3", "graph__logits": {"tokens": []}},
            "tokens must be null or at least one token",
        ),
        (
            {"graph__scope": "prompt", "graph__prompt": "3", "graph__logits": {"tokens": ["3", "4", "3"]}},
            r"graph.logits.*tokens and minus must be distinct, found \['3', '4', '3'\]; name each token once",
        ),
        (
            {"graph__scope": "prompt", "graph__prompt": "3", "graph__logits": {"tokens": ["3"], "minus": "3"}},
            r"tokens and minus must be distinct, found \['3', '3'\]",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_extract(tmp_path, **changes)
