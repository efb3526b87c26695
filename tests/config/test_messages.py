"""Each message says the key, what was expected, what was found, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from hagd.config.load import load_config, plain
from hagd.config.run import ExtractConfig, TrainConfig
from hagd.errors import ConfigError
from tests.config.composed import container


def message(*overrides: str, entry: str = "extract") -> str:
    schema: Any = {"extract": ExtractConfig, "train": TrainConfig}[entry]
    composed = container(*overrides, entry=entry)
    with pytest.raises(ConfigError) as caught:
        load_config(schema, composed)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("+search.n_node=3", "search.n_node", "search.n_nodes"),
        ("+transcoder.kk=3", "transcoder.kk", "transcoder.k"),
        ("+task.training.step=3", "task.training.step", "task.training.steps"),
        ("+model.d_modl=3", "model.d_modl", "model.d_model"),
        ("+model.training.steps=3", "model.training", "task.training"),
        ("+n_nodes=3", "n_nodes", "search.n_nodes"),
        ("+serch.n_nodes=3", "serch", "search"),
        ("transcoder.corpus={dataset: x, n_tokns: 3}", "transcoder.corpus.n_tokns", "transcoder.corpus.n_tokens"),
    ],
)
def test_unknown_keys_get_the_nearest_name(override: str, key: str, near: str) -> None:
    text = message(override)
    assert text.startswith(f"{key}: expected a known key, found {key}=")
    assert text.endswith(f"did you mean {near}?")


def test_an_unknown_key_that_is_like_no_other_gets_the_keys_beside_it() -> None:
    assert message("+typo.k=3") == (
        "typo: expected one of the keys seed, model, task, transcoder, graph, hierarchy, search, validation, report, "
        "comparison, trainer, tracking, paths, optimized_metric, mode, found typo={'k': 3}; remove or correct it"
    )
    assert "expected one of the keys affinity, neighbours, branching, min_size, " in message(
        "+hierarchy.wxyzwxyzwxyz=3"
    )
    assert "expected one of the keys accelerator, devices, " in message("+trainer.foo=3")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("hierarchy.branching=3x", "hierarchy.branching: expected a valid integer, found '3x'"),
        ("hierarchy.branching=1.5", "hierarchy.branching: expected a valid integer, found 1.5"),
        ("hierarchy.branching=2.0", "hierarchy.branching: expected a valid integer, found 2.0"),
        ("hierarchy.branching=true", "hierarchy.branching: expected a valid integer, found True"),
        ("hierarchy.branching=null", "hierarchy.branching: expected a valid integer, found None"),
        ("hierarchy.branching=1", "hierarchy.branching: expected at least 2, found 1"),
        ("transcoder.k=0", "transcoder.k: expected at least 1, found 0"),
        ("search.target_preservation=1.5", "search.target_preservation: expected at most 1.0, found 1.5"),
        ("search.target_preservation=0", "search.target_preservation: expected more than 0.0, found 0"),
        ("transcoder.learning_rate=inf", "transcoder.learning_rate: expected a finite number, found inf"),
        ("transcoder.learning_rate=nan", "transcoder.learning_rate: expected a finite number, found nan"),
        ("search.sizes=3", "search.sizes: expected a list, found 3"),
        ("search.sizes=[1,a]", "search.sizes[1]: expected a valid integer, found 'a'"),
        ("search.method=best", "search.method: expected 'hagd', 'attribution', "),
        ("trainer.devices=x", "trainer.devices: expected a valid integer or 'auto', found 'x'"),
        ("paths.runs=null", "paths.runs: expected text, found None"),
        ("transcoder.corpus=5", "transcoder.corpus: expected a section, found 5"),
        ("task.p=1", "task.p: expected at least 2, found 1 (modulus)"),
        ("task.training.steps=0", "task.training.steps: expected at least 1, found 0"),
        (f"seed={2**64}", f"seed: expected at most {2**63 - 1}, found {2**64}"),
    ],
)
def test_wrong_types_and_ranges(override: str, expected: str) -> None:
    text = message(override)
    assert text.startswith(expected)
    key = expected.partition(":")[0].partition("[")[0]
    assert f"; for example {key}=" in text
    assert "\n" not in text


def test_numbers_where_text_is_expected_are_to_be_quoted() -> None:
    text = message("graph.scope=prompt", "graph.prompt=17")
    assert text.startswith("graph.prompt: expected text, found 17 (") and "for example" not in text
    quoted = text.rpartition('"graph.prompt=')[2].removesuffix('"')
    config = load_config(ExtractConfig, container("graph.scope=prompt", f"graph.prompt={quoted}"))
    assert config.graph.prompt == "17"


def test_empty_text_is_named_as_such() -> None:
    assert message("graph.scope=prompt", "graph.prompt=''").startswith(
        "graph.prompt: expected text that is not empty, found ''"
    )


@pytest.mark.parametrize("group", ["experiment", "recipe", "variant", "hparams_search"])
def test_a_file_without_its_package_is_told_what_it_lacks(group: str) -> None:
    assert message(f"+{group}={{search: {{n_nodes: 20}}}}").endswith("make `# @package _global_` its first line")


def test_the_example_in_a_message_is_accepted() -> None:
    example = message("search.sizes=3").rpartition("for example ")[2]
    assert example.startswith("search.sizes=")
    assert load_config(ExtractConfig, container(example)).search.sizes


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["transcoder.k=513"],
            "transcoder.k must be at most the dictionary size m = expansion × d_model = 512, found 513; lower "
            "transcoder.k or raise transcoder.expansion",
        ),
        (["transcoder.layers=[5]"], "transcoder.layers must be below model.n_layers=2, found [5]"),
        (["graph.heads=true", "graph.head_layers=[2]"], "graph.head_layers must be below model.n_layers=2, found [2]"),
        (["graph.head_layers=[1]"], "graph.head_layers needs graph.heads=true, found head_layers=[1], heads=false"),
        (["graph.heads=true", "graph.head_layers=[]"], "graph.head_layers must be null or layers from 0 up, ascending"),
        (["transcoder.layers=[1,0]"], "transcoder.layers must be ascending and distinct, found [1, 0]"),
        (["transcoder.layers=[-1]"], "transcoder.layers must be null (all) or at least one layer from 0 up"),
        (["transcoder.layers=[]"], "transcoder.layers must be null (all) or at least one layer from 0 up"),
        (
            ["transcoder=resid", "transcoder.skip=true"],
            "transcoder.skip and cross_layer need site=mlp, found skip=True, cross_layer=False at site=resid; an "
            "autoencoder with either would copy its input",
        ),
        (
            ["transcoder.site=resid", "transcoder.cross_layer=true"],
            "transcoder.skip and cross_layer need site=mlp, found skip=False, cross_layer=True at site=resid",
        ),
        (
            ["search=greedy_edges", "graph.heads=true"],
            "search.method=greedy_edges prunes edges between features, found graph.heads=true; set it to false",
        ),
        (
            ["trainer.strategy=layers", "transcoder.cross_layer=true"],
            "trainer.strategy=layers divides dictionaries that each write to their own layer, found",
        ),
        (
            ["trainer.strategy=fsdp", "transcoder.optimiser=adafactor"],
            "trainer.strategy=fsdp divides the state of transcoder.optimiser=adam, found adafactor; choose adam",
        ),
        (
            ["transcoder.selection=bfloat16", "transcoder.activation=jumprelu"],
            "transcoder.selection=bfloat16 needs activation=topk, found jumprelu; set selection=exact",
        ),
        (["transcoder.selection=bfloat16", "transcoder.activation=relu"], "transcoder.selection=bfloat16 needs "),
        (
            ["search=attribution", "search.scorer=edgeless"],
            "search.scorer and traversal need method=hagd, found scorer=edgeless, traversal=False at "
            "method=attribution; set search.scorer=null search.traversal=false, or choose search.method=hagd",
        ),
        (
            ["search=gates", "search.traversal=true"],
            "search.scorer and traversal need method=hagd, found scorer=None, traversal=True at method=gates; ",
        ),
        (["search.sizes=[0,4]"], "search.sizes must be at least 1 each, found [0, 4]"),
        (["search=gates", "search.gates=false"], "search.method=gates is flat gates alone, found gates=false"),
        (
            ["search.n_nodes=5000"],
            "search.n_nodes must be at most graph.n_max=4096, found 5000; lower it or raise graph.",
        ),
        (
            ["transcoder.corpus={data_files: x.txt}"],
            "transcoder.corpus needs a model with a tokenizer, found model.kind=",
        ),
        (
            ["model=gpt2", "task=ioi", "transcoder.corpus={n_tokens: 500}"],
            "transcoder.corpus.dataset and data_files: expected a source of text, found null for both; set transcoder.",
        ),
        (["model.n_heads=3"], "model.d_model must be a multiple of n_heads=3, found 64"),
        (["task=sorting", "task.length=20"], "task.length must be at most n_symbols=10, found 20"),
        (["trainer.devices=0"], "trainer.devices must be at least 1, or auto, found 0"),
        (["task=ioi"], "task=ioi needs a pretrained model with a tokenizer, found model.kind=mini; choose model="),
        (["model=gpt2"], "task=modular_arithmetic has a vocabulary of its own that only mini models are trained on"),
        (["model=hf", "task=ioi"], "model.path: expected local folder, or hub name such as openai-community/gpt2, "),
        (["model.kind=maxi"], "model.kind: expected one of 'mini', 'pretrained', 'smollm2', found 'maxi'"),
        (["task.name=chess"], "task.name: expected one of 'modular_arithmetic', "),
        (["~task.name"], "task.name: expected"),
        (["~model"], "model: expected a section, found nothing; set model="),
    ],
)
def test_values_that_do_not_fit_each_other(overrides: list[str], expected: str) -> None:
    text = message("transcoder.expansion=8", *overrides)
    assert text.startswith(expected) and "\n" not in text


def test_stages_of_training() -> None:
    assert message("gnn.hidden=30", entry="train") == "gnn.hidden must be a multiple of gnn.heads=4, found 30"
    assert message("stage=all", entry="train").startswith("stage: expected 'lm', 'transcoder' or 'gnn', found 'all'")


def test_all_problems_are_reported_together() -> None:
    text = message("transcoder.k=3x", "seed=-1", "+typo.x=1", "+search.n_node=1", "search.method=best")
    assert [line.partition(":")[0] for line in text.splitlines()] == [
        "seed",
        "transcoder.k",
        "search.method",
        "search.n_node",
        "typo",
    ]
    both = message("transcoder.k=5000", "transcoder.layers=[7]")
    assert "transcoder.k must be" in both and "transcoder.layers must be" in both


def test_a_wrong_section_is_not_printed_whole() -> None:
    assert len(message("task.name=chess")) < 300


@pytest.mark.parametrize("value", ["${task.nam}", "${oc.env:NOT_SET_ANYWHERE}", "${nothing:1}"])
def test_interpolations_that_lead_nowhere(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plain(OmegaConf.create({"task": {"name": "ioi"}, "model": {"path": value}}))
    assert str(caught.value).startswith("model.path: expected a value or the name of another key in ${…}, found: ")
    assert "\n" not in str(caught.value)
