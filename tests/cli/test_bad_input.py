"""Wrong configurations, damaged files, full disks: one line that says what to do, exit code 1, nothing half written."""

from __future__ import annotations

import json
import logging
import re
import resource
import shutil
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from hagd.artifacts.codec import load_record, save_record
from hagd.cli.unknown_key import key_advice, option_advice, problems_explained, syntax_advice
from hagd.config.run import ExtractConfig, TrainConfig
from hagd.models.records import TrainedLM
from tests.cli.jobs import run_command, run_here, tiny_overrides
from tests.models.test_pretrained import SUPPORTED, saved


def failure(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one message of a job that fails in a way the user can act on."""
    with pytest.raises(SystemExit) as stop:
        run_here(folder, *overrides)
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    message = shown.partition("error: ")[2].strip()
    assert (folder / "error.txt").read_text().strip() == message
    assert not (folder / "metrics.json").exists()
    return message


def partial_artifacts(runs: Path) -> list[Path]:
    """Unfinished results, and results without their last file."""
    results = [
        path
        for stage in (runs / "artifacts").glob("*")
        if stage.name not in ("work", "locks")
        for path in stage.iterdir()
    ]
    return [path for path in results if path.name.startswith(".") or not (path / "meta.json").is_file()]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "+search.n_node=3",
            "search.n_node: expected a known key, found search.n_node=3; did you mean search.n_nodes?",
        ),
        ("+typo.k=3", "typo: expected one of the keys seed, model, "),
        ("hierarchy.branching=3x", "hierarchy.branching: expected a valid integer, found '3x'"),
        ("hierarchy.branching=1", "hierarchy.branching: expected at least 2, found 1"),
        (
            "transcoder.k=65",
            "transcoder.k must be at most the dictionary size m = expansion × d_model = 64, found 65; ",
        ),
        (
            "search.scorer=nowhere",
            "search.scorer: expected null, one of edgeless, edges, or a folder with a trained scorer, found nowhere",
        ),
        pytest.param(
            "transcoder.optimiser=adam8bit",
            "transcoder.optimiser=adam8bit: expected the package torchao, found none; pip install 'hagd[optim8bit]', ",
            marks=pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed"),
        ),
    ],
)
def test_configurations_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    runs = tmp_path / "runs"
    assert failure(tmp_path / "run", capsys, *tiny_overrides(runs), override).startswith(message)
    assert not (runs / "artifacts").exists()


def test_all_problems_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(tmp_path / "run", capsys, *tiny_overrides(tmp_path), "transcoder.k=0", "+typo.k=3", "seed=-1")
    assert [line.partition(":")[0] for line in message.splitlines()] == ["seed", "transcoder.k", "typo"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["task.n_train=1000"],
            r"task.n_train=1000 \+ .*: 1056 distinct prompts wanted, 132 exist; lower these sizes or",
        ),
        (
            ["task.n_selection=1"],
            r"task.n_selection=1: a counterfactual needs another answer, .*; raise task.n_selection",
        ),
        (["task.n_symbols=2"], r"task\.length=2: must be below task\.n_symbols=2"),
    ],
)
def test_splits_that_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert re.match(message, failure(tmp_path / "run", capsys, *tiny_overrides(tmp_path), *overrides))
    assert partial_artifacts(tmp_path) == []


def test_more_nodes_than_candidates_keeps_the_finished_stages(
    tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = failure(tmp_path, capsys, *tiny_overrides(tiny_runs), "search.n_nodes=4000")
    assert message.startswith("search.n_nodes: expected at most ") and "found 4000; lower it" in message
    assert partial_artifacts(tiny_runs) == []


def test_a_model_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "no" / "such" / "model"
    chosen = ["model=hf", f"model.path={path}", "task=ioi", "tracking=disabled", f"paths.runs={tmp_path}"]
    message = failure(tmp_path / "run", capsys, *chosen)
    assert str(path) in message and "model.path" in message


def truncated(root: Path) -> list[str]:
    """A model whose tokenizer is whole and whose weights are not, as overrides."""
    saved(root / "model", *SUPPORTED[0])
    weights = root / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return ["model=hf", f"model.path={root / 'model'}", "tracking=disabled", f"paths.runs={root}"]


def test_a_truncated_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = [{"sentence": f"{i} _ is.", "option1": f"a{i}", "option2": f"b{i}", "answer": "1"} for i in range(6)]
    (tmp_path / "items").write_text(json.dumps(items))
    chosen = [*truncated(tmp_path), "task=winogrande", f"task.data_files={tmp_path / 'items'}"]
    message = failure(tmp_path / "run", capsys, *chosen)
    assert str(tmp_path / "model") in message and "copy or download the model again" in message
    assert partial_artifacts(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b'{"sentence": "The _ .", "option1": "a", "option2": "b"}', "row 1 lacks answer; expected the columns"),
        (b"sentence,option1,option2,answer\n", "line 1 is no JSON"),
        (b"PAR1\x15\x04\xff\xfe", "expected JSON lines, found no UTF-8 text; convert other formats, such as Parquet"),
        (b'{"sentence": "The _ .", "option1": "a", "option2": "b", "answer": "1"}', "too few usable prompts"),
    ],
)
def test_task_data_are_read_before_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    """Reading the weights fails here, so what is said first was found without them."""
    file = tmp_path / "items"
    if content is not None:
        file.write_bytes(content)
    chosen = [*truncated(tmp_path), "task=winogrande", f"task.data_files={file}"]
    said = failure(tmp_path / "run", capsys, *chosen)
    assert said.startswith(f"task.data_files={file}") and message in said


@pytest.mark.parametrize("only_correct", ["true", "false"])
def test_weights_that_are_not_numbers(
    tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], only_correct: str
) -> None:
    runs = tmp_path / "runs"
    for stage in ("task", "lm"):
        shutil.copytree(tiny_runs / "artifacts" / stage, runs / "artifacts" / stage)
    key = json.loads((tiny_runs / "first" / "manifest.json").read_text())["stages"]["lm"]["key"]
    _spoil(runs / "artifacts" / "lm" / key)
    message = failure(tmp_path / "run", capsys, *tiny_overrides(runs), f"task.only_correct={only_correct}")
    assert "tiny" in message and "expected finite " in message and "found NaN or infinity" in message
    assert ("layer 1" in message) == (only_correct == "false")
    assert partial_artifacts(runs) == []


def _spoil(folder: Path) -> None:
    """Store the model again with NaN in the MLP of its second layer, as an intact record."""
    trained = load_record(TrainedLM, folder)
    name = next(name for name in trained.state if name.endswith("h.1.mlp.c_fc.weight"))
    state = {**trained.state, name: trained.state[name] * float("nan")}
    meta = (folder / "meta.json").read_text()
    shutil.rmtree(folder)
    save_record(replace(trained, state=state), folder)
    (folder / "meta.json").write_text(meta)


def test_a_full_disk(tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files may not grow beyond 20 kB: stages and reports fail to be written, with the fix in the message."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fresh = tmp_path / "runs"
    brief = ["task.training.steps=60", "transcoder.steps=10", "search=random"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        during_a_stage = failure(tmp_path / "a", capsys, *tiny_overrides(fresh), *brief)
        in_the_run_folder = failure(tmp_path / "b", capsys, *tiny_overrides(tiny_runs))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for message in (during_a_stage, in_the_run_folder):
        assert "cannot be used" in message and "raise the limit on file sizes" in message
    assert str(tmp_path / "b") in in_the_run_folder
    assert partial_artifacts(fresh) == []
    run_here(tmp_path / "again", *tiny_overrides(fresh), *brief)  # with space, the same command finishes
    assert (tmp_path / "again" / "metrics.json").is_file()


def test_a_log_on_a_full_disk_does_not_bury_the_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = logging.FileHandler("/dev/full")
    logging.getLogger().addHandler(full)
    try:
        untrained = ["task.training.steps=1", "task.training.learning_rate=1e-8"]  # logs that its target is missed
        message = failure(tmp_path / "run", capsys, *tiny_overrides(tmp_path), *untrained)
    finally:
        logging.getLogger().removeHandler(full)
        with suppress(OSError):
            full.close()
    assert "none of the 24 discovery prompts" in message


def test_the_real_command_exits_with_one_line(tmp_path: Path) -> None:
    done = run_command(tmp_path, "+search.n_node=3")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "error: search.n_node: expected a known key, found search.n_node=3; did you mean search.n_nodes?"
    )


@pytest.mark.parametrize(
    ("entry", "override", "near"),
    [
        ("extract.py", "serch.n_nodes=3", "search.n_nodes"),
        pytest.param("extract.py", "n_nodes=3", "search.n_nodes", marks=pytest.mark.slow),  # as test_messages.py
        ("train.py", "gnn.epoch=3", "gnn.epochs"),
    ],
)
def test_an_unknown_key_without_plus_gets_the_nearest_name(
    tmp_path: Path, entry: str, override: str, near: str
) -> None:
    key = override.partition("=")[0]
    done = run_command(tmp_path, override, entry=entry)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: {key}: expected a known key; did you mean {near}?"


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("serch.n_nodes", "expected a known key; did you mean search.n_nodes?"),
        ("stage", "a key of train.py alone; run train.py for it, or leave it out"),
        ("export.format", "a key of train.py alone; run train.py for it, or leave it out"),
        (
            "transcoder.corpus.data_files",
            "transcoder.corpus is null; set it as a whole: 'transcoder.corpus={data_files: …}'",
        ),
        ("graph.score.layer", "graph.score is null; set it as a whole: 'graph.score={layer: …}'"),
        ("comparison.seed_offset", "comparison is null; choose comparison=… as well"),
        (
            "task.relation",
            "needs task.name=factual_recall, found another; choose task=… with it, or leave it out",
        ),
        ("model.path", "needs model.kind=pretrained, found another; choose model=… with it, or leave it out"),
    ],
)
def test_a_key_that_hydra_cannot_override_is_explained(key: str, advice: str) -> None:
    assert key_advice(f"Could not override '{key}'.\nTo append …", lambda: ExtractConfig) == f"{key}: {advice}"


def test_a_key_of_the_other_command_is_not_taken_for_one_that_is_alike() -> None:
    advice = key_advice("Could not override 'mode'.", lambda: TrainConfig)
    assert advice == "mode: a key of extract.py alone; run extract.py for it, or leave it out"


def test_an_argument_that_hydra_cannot_parse_is_explained(tmp_path: Path) -> None:
    done = run_command(tmp_path, "paths.runs=a=b")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: paths.runs: expected a value without signs that mean ")
    assert syntax_advice("foo") == "foo: expected key=value, found no =; remove it or give foo=VALUE"


def test_ctrl_c_before_the_job_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, problems_explained(lambda: ExtractConfig):
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted before anything was run\n"


def test_other_messages_of_hydra_stand_alone() -> None:
    assert key_advice("Could not find 'model/gpt3'", lambda: ExtractConfig) is None
    assert key_advice("Could not override 'wxyzwxyz'.", lambda: ExtractConfig) is None
    assert option_advice("Could not override 'wxyzwxyz'.") is None


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("model/gpt3", "model: expected one of gpt2, hf, found gpt3; did you mean model=gpt2?"),
        (
            "model/own/tiny",
            "model: expected one of gpt2, hf, found own/tiny; choose one, or give the folder of your own",
        ),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest(file: str, advice: str) -> None:
    said = (
        f"In 'base': Could not find '{file}'\n\nAvailable options in 'model':\n\tgpt2\n\thf\nConfig search path:\n\tx"
    )
    assert str(option_advice(said)).startswith(advice)


@pytest.mark.parametrize(
    ("override", "message", "advice"),
    [
        ("model=gpt2_minni", "In 'base': Could not find 'model/gpt2_minni'", "did you mean model=gpt2_mini?"),
        ("serch.n_nodes=3", "Could not override 'serch.n_nodes'.", "did you mean search.n_nodes?"),
    ],
)
def test_a_wrong_sweep_is_not_taken_for_a_run(tmp_path: Path, override: str, message: str, advice: str) -> None:
    done = run_command(tmp_path, "experiment=quick/main", "seed=0,1", override)
    assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.strip().endswith(advice)
    assert "Ambiguous" not in done.stderr and "Traceback" not in done.stderr


def test_a_list_of_values_without_a_sweep_is_refused(tmp_path: Path) -> None:
    done = run_command(tmp_path, "seed=0,1")
    assert done.returncode == 1 and "To sweep over it, add --multirun" in done.stderr


def test_a_key_of_another_section_is_not_called_unknown(tmp_path: Path) -> None:
    done = run_command(tmp_path, "task.relation=capital")  # a key of factual_recall, here with modular_addition
    assert done.returncode == 1 and "did you mean" not in done.stderr
