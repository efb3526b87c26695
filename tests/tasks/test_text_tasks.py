"""Tasks made of text, on small tokenizers of both common layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from hagd.config.task import IOI, FactualRecall, GreaterThan, SubjectVerbAgreement
from hagd.errors import TaskError
from hagd.tasks.build import build_task
from hagd.tasks.countries import COUNTRIES
from hagd.tasks.records import PADDING, Prompts, TaskData
from hagd.tasks.splits import fewer_than_wanted
from hagd.tasks.subject_verb_agreement import VERBS

Check = Callable[[TaskData], None]
Lines = Callable[[str, list[dict[str, Any]]], str]
SIZES = {"n_discovery": 30, "n_selection": 10, "n_validation": 20}
seeds = given(seed=st.integers(0, 10_000))
few = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Reader:
    """Texts of one prompt's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: TaskData, prompts: Prompts, row: int) -> None:
        self.tokenizer = tokenizer
        n = int((prompts.slots[row, 0] != PADDING).sum())
        self.slots = [task.slot_names[slot] for slot in prompts.slots[row, 0, :n]]
        self.tokens = self.read(prompts.tokens[row, 0, :n])
        self.counterfactual = self.read(prompts.counterfactual[row, 0, :n])
        self.answers = self.read(prompts.answers[row, 0, 0])
        self.distractors = self.read(prompts.distractors[row, 0, 0])

    def read(self, tokens: torch.Tensor) -> list[str]:
        return [str(self.tokenizer.decode([token])).strip(" Ġ") for token in tokens.tolist() if token != PADDING]

    def at(self, slot: str) -> str:
        return self.tokens[self.slots.index(slot)]


def readers(tokenizer: PreTrainedTokenizerBase, task: TaskData) -> list[Reader]:
    splits = (task.discovery, task.selection, task.validation)
    return [Reader(tokenizer, task, prompts, row) for prompts in splits for row in range(len(prompts))]


@seeds
@few
def test_ioi(tokenizer: PreTrainedTokenizerBase, check_task: Check, seed: int) -> None:
    task = build_task(IOI(**SIZES), tokenizer, seed)
    check_task(task)
    assert [len(task.discovery), len(task.selection), len(task.validation)] == [30, 10, 20]
    read = readers(tokenizer, task)
    for prompt in read:
        assert prompt.at("S1") == prompt.at("S2") == prompt.distractors[0]
        assert prompt.at("IO") == prompt.answers[0] != prompt.at("S1")
        changed = [i for i, (a, b) in enumerate(zip(prompt.tokens, prompt.counterfactual, strict=True)) if a != b]
        assert changed == [prompt.slots.index("S2")]
        assert prompt.counterfactual[changed[0]] == prompt.at("IO")
        assert prompt.slots[-1] == "end" and prompt.tokens[-1] == "to"
    orders = {prompt.slots.index("IO") < prompt.slots.index("S1") for prompt in read}
    assert orders == {True, False}
    prompts = {tuple(prompt.tokens) for prompt in read}
    assert not prompts & {tuple(prompt.counterfactual) for prompt in read}, "a mirror image is a prompt too"


@seeds
@few
def test_greater_than_with_digit_tokens(tokenizer: PreTrainedTokenizerBase, check_task: Check, seed: int) -> None:
    task = build_task(GreaterThan(**SIZES), tokenizer, seed)
    check_task(task)
    for prompt in readers(tokenizer, task):
        decade = int(prompt.at("year1"))
        assert sorted(map(int, prompt.answers)) == list(range(decade + 1, 10))
        assert sorted(map(int, prompt.distractors)) == list(range(decade))
        start = [i for i, slot in enumerate(prompt.slots) if slot.startswith("year")]
        assert [prompt.counterfactual[i] for i in start] == ["0", "1"]
        assert prompt.tokens[-1] == prompt.at("century2") and prompt.slots[-1] == "last"


def test_greater_than_with_two_digit_tokens(check_task: Check) -> None:
    tokenizer = pairs_of_digits()
    task = build_task(GreaterThan(**SIZES), tokenizer, 0)
    check_task(task)
    assert {"century", "year", "noun", "last"} <= set(task.slot_names)
    for prompt in readers(tokenizer, task):
        start = int(prompt.at("year"))
        assert sorted(map(int, prompt.answers)) == list(range(start + 1, 100))
        assert sorted(map(int, prompt.distractors)) == list(range(start + 1))
        assert prompt.counterfactual[prompt.slots.index("year")] == "01"


def pairs_of_digits() -> PreTrainedTokenizerBase:
    """As GPT-2 cuts most years: ` 17` and `32`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from hagd.tasks.greater_than import NOUNS

    texts = ["The", *(f"Ġ{word}" for word in ("lasted", "from", "the", "year", "to", *NOUNS)), "x", "Ġ"]
    texts += [f"{i:02d}" for i in range(100)] + [f"Ġ{i:02d}" for i in range(100)]
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0} | {text: i + 1 for i, text in enumerate(texts)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d\d| ?[A-Za-z]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@seeds
@few
def test_generated_agreement(tokenizer: PreTrainedTokenizerBase, check_task: Check, seed: int) -> None:
    task = build_task(SubjectVerbAgreement(**SIZES), tokenizer, seed)
    check_task(task)
    singular, plural = (sorted(verb[number] for verb in VERBS) for number in (0, 1))
    lengths = set()
    for prompt in readers(tokenizer, task):
        subject = prompt.at("subject")
        is_plural = subject.endswith("s") or subject in {"men", "women", "children"}
        assert sorted(prompt.answers) == (plural if is_plural else singular)
        assert sorted(prompt.distractors) == (singular if is_plural else plural)
        changed = [i for i, (a, b) in enumerate(zip(prompt.tokens, prompt.counterfactual, strict=True)) if a != b]
        assert changed == [prompt.slots.index("subject")]
        lengths.add(len(prompt.tokens))
    assert len(lengths) == 2, "with and without attractor"
    first = [int((slots != PADDING).sum()) for slots in task.discovery.slots[:20, 0]]
    assert len(set(first)) == 2 and first != sorted(first, reverse=True), "the first prompts are no sample"


def test_agreement_from_files(tokenizer: PreTrainedTokenizerBase, check_task: Check, lines: Lines) -> None:
    rows = []
    for noun in ("boy", "girl", "king", "guard", "actor", "friend"):
        for middle in (" near the cars", " behind the dogs"):
            one, many = f"The {noun}{middle}", f"The {noun}s{middle}"
            for verb in VERBS[:2]:
                answers = {"clean_answer": f" {verb[0]}", "patch_answer": f" {verb[1]}"}
                rows.append({"clean_prefix": one, "patch_prefix": many, **answers})
                answers = {"clean_answer": f" {verb[1]}", "patch_answer": f" {verb[0]}"}
                rows.append({"clean_prefix": many, "patch_prefix": one, **answers})
    task = build_task(SubjectVerbAgreement(data_files=lines("a.json", rows), **SIZES), tokenizer, 0)
    check_task(task)
    sizes = [len(split) for split in (task.discovery, task.selection, task.validation)]
    assert sum(sizes) == 24, "rows with one prefix are one prompt"
    assert sizes[0] > sizes[2] > sizes[1] > 0
    for split in (task.discovery, task.selection, task.validation):
        prompts = {tuple(row) for row in split.tokens[:, 0].tolist()}
        assert prompts == {tuple(row) for row in split.counterfactual[:, 0].tolist()}, "a pair was torn apart"
    for prompt in readers(tokenizer, task):
        is_plural = prompt.at("subject").endswith("s")
        assert sorted(prompt.answers) == (["are", "have"] if is_plural else ["has", "is"])


def test_agreement_pairs_that_share_a_prefix_stay_together(
    tokenizer: PreTrainedTokenizerBase, check_task: Check, lines: Lines
) -> None:
    """Each subject stands beside two others, in two rows."""
    rows = []
    for one, many in (("boy", "girls"), ("king", "guards"), ("actor", "friends"), ("doctor", "drivers")):
        for middle in (" near the cars", " behind the dogs"):
            pairs = ((one, many), (many, one), (one, f"{one}s"), (f"{one}s", one))
            for clean, patch in pairs:
                verbs = [VERBS[0][noun.endswith("s")] for noun in (clean, patch)]
                rows.append(
                    {"clean_prefix": f"The {clean}{middle}", "patch_prefix": f"The {patch}{middle}"}
                    | {"clean_answer": f" {verbs[0]}", "patch_answer": f" {verbs[1]}"}
                )
    task = build_task(SubjectVerbAgreement(data_files=lines("a.json", rows), **SIZES), tokenizer, 0)
    check_task(task)
    seen: list[set[tuple[int, ...]]] = []
    for split in (task.discovery, task.selection, task.validation):
        clean = [tuple(row) for row in split.tokens[:, 0].tolist()]
        assert len(set(clean)) == len(clean) > 0, "one prompt a prefix"
        seen.append({*clean, *map(tuple, split.counterfactual[:, 0].tolist())})
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert sum(map(len, seen)) == 24


@pytest.mark.parametrize("relation", ["capital", "language", "continent"])
@seeds
@few
def test_factual_recall(tokenizer: PreTrainedTokenizerBase, check_task: Check, relation: str, seed: int) -> None:
    task = build_task(
        FactualRecall(relation=relation, n_discovery=60, n_selection=30, n_validation=60), tokenizer, seed
    )
    check_task(task)
    facts = {c.name.replace(" ", ""): {c.capital, *c.languages, c.continent} for c in COUNTRIES}
    subjects: list[set[str]] = []
    for prompts in (task.discovery, task.selection, task.validation):
        subjects.append(set())
        order: list[str] = []
        for prompt in (Reader(tokenizer, task, prompts, row) for row in range(len(prompts))):
            at = [i for i, slot in enumerate(prompt.slots) if slot.startswith("subject")]
            country, other = ("".join(text[i] for i in at) for text in (prompt.tokens, prompt.counterfactual))
            assert all(any(fact.startswith(answer) for fact in facts[country]) for answer in prompt.answers)
            assert all(any(fact.startswith(wrong) for fact in facts[other]) for wrong in prompt.distractors)
            fixed = [i for i in range(len(prompt.slots)) if i not in at]
            assert all(prompt.tokens[i] == prompt.counterfactual[i] for i in fixed), "another template"
            assert prompt.slots[0] == "first" and prompt.slots[-1] == "last"
            subjects[-1] |= {country, other}
            order.append(country)
        changes = sum(one != other for one, other in pairwise(order))
        assert changes >= len(set(order)), "prompts of a subject stand together: the first ones are no sample"
    assert not (subjects[0] & subjects[1] or subjects[0] & subjects[2] or subjects[1] & subjects[2])


def test_countries_are_distinct() -> None:
    assert len(COUNTRIES) >= 60
    assert len({country.name for country in COUNTRIES}) == len(COUNTRIES)
    assert len({country.capital for country in COUNTRIES}) == len(COUNTRIES)
    assert {country.continent for country in COUNTRIES} == {
        "Europe", "Asia", "Africa", "North America", "South America", "Oceania",
    }  # fmt: skip
    assert all(country.languages and country.name not in country.capital for country in COUNTRIES)


def lre_file(path: Path, **changes: Any) -> str:
    samples = [{"subject": c.name, "object": c.capital} for c in COUNTRIES[:24]]
    content = {"prompt_templates": ["The capital city of {} is"], "samples": samples} | changes
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_relation_file(tokenizer: PreTrainedTokenizerBase, check_task: Check, tmp_path: Path) -> None:
    config = FactualRecall(
        data_files=lre_file(tmp_path / "capital.json"), n_discovery=50, n_selection=25, n_validation=25
    )
    task = build_task(config, tokenizer, 0)
    check_task(task)
    assert [len(split) for split in (task.discovery, task.selection, task.validation)] == [12, 6, 6]
    fewer = "discovery: 12 of 50 prompts, selection: 6 of 25 prompts, validation: 6 of 25 prompts; the others have no"
    assert f"task factual_recall: {fewer}" in str(fewer_than_wanted(config, task))
    assert fewer_than_wanted(config.model_copy(update=dict.fromkeys(SIZES, 6)), task) is None


def test_accents_that_were_escaped_twice(plain_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    samples = [{"subject": c.name, "object": c.capital.replace("é", "\\u00e9")} for c in COUNTRIES]
    config = FactualRecall(data_files=lre_file(tmp_path / "x.json", samples=samples), n_discovery=80)
    task = build_task(config, plain_tokenizer, 0)
    assert all("\\" not in "".join(prompt.answers) for prompt in readers(plain_tokenizer, task))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"samples": [{"subject": "France"}]}, "KeyError 'object'"),
        ({"prompt_templates": ["no field"]}, "no field"),
        ({"samples": [{"subject": "France", "object": "Paris"}]}, "too few usable prompts"),
        ({"samples": [{"subject": c.name, "object": "Paris"} for c in COUNTRIES]}, "has a counterfactual"),
    ],
)
def test_bad_relation_files(
    plain_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, changes: dict[str, Any], found: str
) -> None:
    config = FactualRecall(data_files=lre_file(tmp_path / "bad.json", **changes))
    with pytest.raises(TaskError, match=found):
        build_task(config, plain_tokenizer, 0)


@pytest.mark.parametrize(
    "config", [IOI(**SIZES), GreaterThan(**SIZES), SubjectVerbAgreement(**SIZES), FactualRecall(**SIZES)]
)
def test_same_seed_same_prompts(plain_tokenizer: PreTrainedTokenizerBase, config: IOI) -> None:
    first, second, other = (build_task(config, plain_tokenizer, seed) for seed in (3, 3, 4))
    assert first.slot_names == second.slot_names
    for one, two in zip(vars(first.discovery).values(), vars(second.discovery).values(), strict=True):
        assert one is two is None or torch.equal(one, two)
    assert not torch.equal(first.discovery.tokens[:20, :, :4], other.discovery.tokens[:20, :, :4])


@pytest.mark.parametrize("config", [IOI(), GreaterThan(), SubjectVerbAgreement(), FactualRecall()])
def test_text_needs_a_tokenizer(config: IOI) -> None:
    with pytest.raises(TaskError, match=f"task={config.name} .* needs a model with a tokenizer"):
        build_task(config, None, 0)
