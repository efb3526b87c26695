"""Small tokenizers of the two common layouts, and a check that every task must pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hagd.tasks import factual_recall, greater_than, ioi, subject_verb_agreement
from hagd.tasks.countries import COUNTRIES
from hagd.tasks.records import PADDING, Prompts, TaskData

WINOGRANDE = [
    ("The box did not fit in the bag because the _ was too large.", "box", "bag", "1"),
    ("The box did not fit in the bag because the _ was too small.", "box", "bag", "2"),
    ("Anna beat Tom at chess , so _ was proud.", "Anna", "Tom", "1"),
    ("Paul helped New Peter with the car , so _ was thankful.", "Paul", "New Peter", "2"),
    ("Scott met New Peter in the garden because _ had the key.", "Scott", "New Peter", "1"),
    ("Daniel asked New Peter for help, but _ had no time.", "Daniel", "New Peter", "2"),
    ("Julia gave Emily the book after _ had asked for it.", "Julia", "Emily", "2"),
    ("Mary liked the cat more than Jane , so _ fed it.", "Mary", "Jane", "1"),
    ("Kate ran from Lisa , since _ was angry at all of them and shouted.", "Kate", "Lisa", "2"),
]
HELLASWAG = [
    ("Cooking", "A man cuts the [title] onion", ["and cries.", "and flies to the moon.", "sings.", "or not"], "0"),
    ("Sports", "A woman throws the ball", ["at night.", "to her friend.", "into the sea of milk.", "or not"], "1"),
    ("Music", "A boy plays", ["the table with a fork.", "the soup.", "the piano [substeps] well.", "or not"], "2"),
    ("Travel", "They take the train", ["from the roof.", "to the fish.", "or sea", "to the town on the hill."], 3),
    ("Music", "A girl sings", ["a song with a friend.", "the soup.", "to the roof of the sea.", "or not"], "0"),
    ("Cooking", "A woman cuts the soup", ["or not", "with a friend.", "into milk.", "and eats it all."], "3"),
]


def corpus() -> Iterable[str]:
    for module in (ioi, greater_than, subject_verb_agreement):
        for value in vars(module).values():
            for text in value if isinstance(value, tuple) else [value]:
                if isinstance(text, str):
                    yield from (text.replace("{", " ").replace("}", " "), f"x {text.replace(':', ' ')}")
    words = subject_verb_agreement
    for noun in (*words.SUBJECTS, *words.ATTRACTORS, *words.SHIFTED_SUBJECTS, *words.SHIFTED_ATTRACTORS):
        yield f"x {noun}s x {noun}es"
    yield from (f"x {verb}" for pair in subject_verb_agreement.VERBS for verb in pair)
    for templates in (*factual_recall.TEMPLATES.values(), *factual_recall.SHIFTED_TEMPLATES.values()):
        yield from (template.replace("{}", " ") for template in templates)
    yield from (f"x {country.name} {country.capital} {country.continent}" for country in COUNTRIES)
    yield from (f"x {language}" for country in COUNTRIES for language in country.languages)
    yield from (f"x {sentence} {first} {second}" for sentence, first, second, _ in WINOGRANDE)
    yield from (f"{label}: {text} {' '.join(endings)}" for label, text, endings, _ in HELLASWAG)
    yield "0 1 2 3 4 5 6 7 8 9 The The the x"


def trained(pre_tokenizer: Any, decoder: Any, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.train_from_iterator(corpus(), trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    return tokenizer


def byte_level() -> PreTrainedTokenizerBase:
    """As SmolLM2: a word with its leading space, a token a digit, nothing added."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    layout = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return PreTrainedTokenizerFast(tokenizer_object=trained(layout, decoders.ByteLevel(), ["<unk>"]), unk_token="<unk>")


def metaspace() -> PreTrainedTokenizerBase:
    """As Llama 2, with an end token on top: `▁word` also at the start, BOS in front, EOS behind."""
    layout = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]
    )
    tokenizer = trained(layout, decoders.Metaspace(), ["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


LAYOUTS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {"byte_level": byte_level, "metaspace": metaspace}


@pytest.fixture(scope="session", params=LAYOUTS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return LAYOUTS[request.param]()


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerBase:
    return byte_level()


@pytest.fixture
def winogrande_file(tmp_path: Path) -> str:
    columns = ("sentence", "option1", "option2", "answer")
    return write_lines(tmp_path / "winogrande.jsonl", [dict(zip(columns, row, strict=True)) for row in WINOGRANDE])


@pytest.fixture
def hellaswag_file(tmp_path: Path) -> str:
    columns = ("activity_label", "ctx", "endings", "label")
    return write_lines(tmp_path / "hellaswag.jsonl", [dict(zip(columns, row, strict=True)) for row in HELLASWAG])


@pytest.fixture
def lines(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], str]:
    return lambda name, rows: write_lines(tmp_path / name, rows)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def check_task() -> Callable[[TaskData], None]:
    return well_formed


def well_formed(task: TaskData) -> None:
    splits = [split for split in (task.train, task.discovery, task.selection, task.validation) if split is not None]
    seen: set[tuple[int, ...]] = set()
    for prompts in splits:
        assert len(prompts) > 0
        _check_prompts(task, prompts)
        keys = [tuple(tokens.flatten().tolist()) for tokens in _unpadded(prompts)]
        assert len(set(keys)) == len(keys), "a prompt occurs twice in a split"
        assert not seen & set(keys), "a prompt is in two splits"
        seen |= set(keys)
    assert set(task.discovery.slots.unique().tolist()) - {PADDING} == set(range(len(task.slot_names)))


def _unpadded(prompts: Prompts) -> Iterable[torch.Tensor]:
    return (tokens[slots != PADDING] for tokens, slots in zip(prompts.tokens, prompts.slots, strict=True))


def _check_prompts(task: TaskData, prompts: Prompts) -> None:
    n, options, width = prompts.tokens.shape
    assert prompts.counterfactual.shape == prompts.slots.shape == (n, options, width)
    assert prompts.answers.shape[:3] == prompts.distractors.shape[:3] == prompts.scored.shape
    used = prompts.slots != PADDING
    length = used.sum(-1)
    assert torch.equal(used, torch.arange(width) < length[..., None]), "every token has a slot, padding is right"
    assert prompts.slots.max() < len(task.slot_names)
    scored = prompts.scored != PADDING
    assert scored.any(-1).all()
    assert torch.equal(prompts.scored.max(-1).values, length - 1), "nothing is fed after the last scored position"
    assert torch.equal((prompts.answers != PADDING).any(-1), scored)
    same = prompts.answers[..., :, None] == prompts.distractors[..., None, :]
    assert not (same & (prompts.answers[..., :, None] != PADDING)).any(), "an answer is also a distractor"
    assert ((prompts.tokens != prompts.counterfactual) & used).any(-1).all()
    if options == 1:
        assert torch.equal((prompts.distractors != PADDING).any(-1), scored)
    else:
        assert (prompts.distractors == PADDING).all()
