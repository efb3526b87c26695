"""Every option of every group composes into a valid configuration, and YAML and schema agree."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import pytest
import yaml
from hydra.errors import ConfigCompositionException

from hagd.config.comparison import ComparisonConfig
from hagd.config.load import load_config
from hagd.config.run import ExtractConfig, TrainConfig
from tests.config.composed import CONF, GROUPS, container, options

SYMBOLIC = ("modular_addition", "modular_multiplication", "modular_subtraction", "parity", "sorting")


def fits(model: str, task: str) -> bool:
    return model.endswith("_mini") == (task in SYMBOLIC)


def together() -> Iterator[dict[str, str]]:
    """Choices of one option of every group, as few as hold every option: a model, a task that fits it, and the rest."""
    others = {group: cycle(options(group)) for group in GROUPS if group not in ("model", "task")}
    for mini in (True, False):
        models = [name for name in options("model") if name.endswith("_mini") == mini]
        tasks = [name for name in options("task") if (name in SYMBOLIC) == mini]
        pairs = zip(cycle(models), cycle(tasks), strict=False)
        for model, task in islice(pairs, max(len(models), len(tasks))):
            yield {"model": model, "task": task, **{group: next(names) for group, names in others.items()}}


TOGETHER = list(together())


def with_option(group: str, name: str) -> dict[str, Any]:
    chosen = next(each for each in TOGETHER if each[group] == name)
    path = ["model.path=somewhere"] if chosen["model"] == "hf" else []
    return container(*(f"{key}={option}" for key, option in chosen.items()), *path)


def test_every_group_is_known_here() -> None:
    folders = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    assert set(GROUPS) <= folders
    assert folders - set(GROUPS) <= {"hydra", "experiment", "variant", "hparams_search", "comparison", "recipe"}


@pytest.mark.parametrize(
    ("name", "tokens"), [("tokens_400k", 4e5), ("autoencoder_400k", 4e5), ("tokens_5m", 5e6), ("tokens_100m", 1e8)]
)
def test_recipes_are_for_the_tokens_of_their_names(name: str, tokens: float) -> None:
    chosen = load_config(TrainConfig, container(f"recipe={name}", entry="train")).transcoder
    assert chosen.steps * chosen.batch_size == pytest.approx(tokens, rel=0.03)


@pytest.mark.parametrize("experiment", ["smollm2_ioi", "smollm2_capitals"])
def test_a_recipe_is_heard_beside_an_experiment(experiment: str) -> None:
    own, chosen = (
        load_config(ExtractConfig, container(f"experiment={experiment}", *more)).transcoder
        for more in ((), ("recipe=tokens_5m",))
    )
    recipe = load_config(ExtractConfig, container("recipe=tokens_5m")).transcoder
    for key in ("steps", "batch_size", "learning_rate"):
        assert getattr(chosen, key) == getattr(recipe, key) != getattr(own, key)
    assert chosen.layers == own.layers


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in options(group)])
def test_every_option_composes(group: str, name: str) -> None:
    section = getattr(load_config(ExtractConfig, with_option(group, name)), group)
    written = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    written.pop("defaults", None)
    for key, value in written.items():
        if value not in ("???", ""):  # to be given, or named after what is given
            assert section.model_dump(mode="json")[key] == value


FOLDER = CONF / "experiment"
EXPERIMENTS = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in sorted(FOLDER.rglob("*.yaml"))]


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        # Those of tables compose in tests/tables/test_definition.py as well, and a quick one only sweeps less.
        *(pytest.param("extract", name, marks=[pytest.mark.slow] * ("/" in name)) for name in EXPERIMENTS),
        *(
            # train.py takes the sections from the same files; these two stand for the others.
            pytest.param("train", name, marks=[pytest.mark.slow] * (name not in ("main", "smollm2_ioi")))
            for name in EXPERIMENTS
            if "/" not in name
        ),
    ],
)
def test_every_experiment_composes(entry: str, name: str) -> None:
    schema: Any = {"extract": ExtractConfig, "train": TrainConfig}[entry]
    assert isinstance(load_config(schema, container(f"experiment={name}", entry=entry)), schema)


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONF / "variant").glob("*.yaml"))])
def test_every_variant_changes_what_it_names(name: str) -> None:
    chosen, plain = (load_config(ExtractConfig, container(*extra)) for extra in ([f"variant={name}"], []))
    assert (chosen == plain) == (name == "full")


@pytest.mark.parametrize("name", options("comparison"))
def test_every_comparison_is_with_another_extraction(name: str) -> None:
    config = load_config(ExtractConfig, container(f"comparison={name}", "model=llama_mini", "seed=3"))
    assert config.comparison is not None
    assert (
        config.comparison.seed_offset == 1 and config.comparison.n_null == ComparisonConfig(model=config.model).n_null
    )
    if name in options("model"):
        assert config.comparison.model == load_config(ExtractConfig, container(f"model={name}")).model
    else:
        assert config.comparison.model != config.model and config.comparison.model.name == "llama_mini_half"


@pytest.mark.parametrize(("entry", "schema"), [("extract", ExtractConfig), ("train", TrainConfig)])
def test_yaml_defaults_are_the_schema_defaults(entry: str, schema: Any) -> None:
    """So a configuration that is written in Python means the same as the command line's."""
    composed = load_config(schema, container(entry=entry))
    plain = schema(model=composed.model, task=composed.task)
    for name in schema.model_fields:
        assert getattr(composed, name) == getattr(plain, name), name
    assert composed.model == type(composed.model)()


@pytest.mark.parametrize("entry", ["extract", "train"])
def test_yaml_spells_out_every_key(entry: str) -> None:
    schema: Any = {"extract": ExtractConfig, "train": TrainConfig}[entry]
    written = container(entry=entry)
    assert load_config(schema, written).model_dump(mode="json") == written


@pytest.mark.parametrize("model", ["gpt2_mini", "smollm2_135m", "gpt2"])
@pytest.mark.parametrize("task", options("task"))
def test_model_and_task_pairs(model: str, task: str) -> None:
    chosen = {"model": model, "task": task}
    composed = {**container(), **{group: with_option(group, name)[group] for group, name in chosen.items()}}
    if fits(model, task):
        load_config(ExtractConfig, composed)
    else:
        with pytest.raises(ValueError, match="choose model="):
            load_config(ExtractConfig, composed)


def test_a_plain_override_of_an_unknown_key_is_refused_by_hydra() -> None:
    with pytest.raises(ConfigCompositionException, match=r"search\.n_node"):
        container("search.n_node=3")


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        (("model.path=models/gpt2-a/",), "gpt2-a"),
        (("model.path=EleutherAI/pythia-70m",), "pythia-70m"),
        (("model.path=models/gpt2-a", "model.name=mine"), "mine"),
    ],
)
def test_a_model_without_a_label_is_named_after_its_path(chosen: tuple[str, ...], name: str) -> None:
    assert load_config(ExtractConfig, container("model=hf", "task=ioi", *chosen)).model.name == name
