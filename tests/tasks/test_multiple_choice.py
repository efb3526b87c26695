from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from hagd.config.task import HellaSwag, WinoGrande
from hagd.errors import TaskError
from hagd.tasks.build import build_task
from hagd.tasks.records import PADDING, TaskData

Check = Callable[[TaskData], None]
Lines = Callable[[str, list[dict[str, Any]]], str]
SIZES = {"n_discovery": 2, "n_selection": 2, "n_validation": 2}


def text(tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor, slots: torch.Tensor | None = None) -> str:
    known = tokens[slots != PADDING] if slots is not None else tokens[tokens != PADDING]
    words = [str(tokenizer.convert_ids_to_tokens(token)) for token in known.flatten().tolist()]
    return "".join(words).replace("▁", " ").replace("Ġ", " ").strip()


def all_prompts(task: TaskData) -> list[tuple[Any, int]]:
    return [(split, row) for split in (task.discovery, task.selection, task.validation) for row in range(len(split))]


def test_winogrande(tokenizer: PreTrainedTokenizerBase, check_task: Check, winogrande_file: str) -> None:
    sizes = {"n_discovery": 9, "n_selection": 9, "n_validation": 9}
    task = build_task(WinoGrande(data_files=winogrande_file, **sizes), tokenizer, 0)
    check_task(task)
    assert (task.accuracy, task.length_normalised, task.chance) == ("choice", False, 0.5)
    assert set(task.slot_names) == {"first", "context", "option", "continuation", "last"}
    correct = {"box was too large": 0, "bag was too small": 0, "Anna was proud": 0, "Peter was thankful": 0}
    for split, row in all_prompts(task):
        right, wrong = (text(tokenizer, split.tokens[row, o], split.slots[row, o]) for o in (0, 1))
        rests = [text(tokenizer, split.answers[row, o]) for o in (0, 1)]
        assert rests[0] == rests[1], "both options are scored on the same words"
        for ending in correct:
            name, _, rest = ending.partition(" ")
            if rests[0].startswith(rest):
                correct[ending] += 1
                assert f"{name} {rest}" in right and f"{name} {rest}" not in wrong
        at = split.scored[row, 0][split.scored[row, 0] != PADDING]
        assert torch.equal(split.tokens[row, 0, at[1:]], split.answers[row, 0, : len(at) - 1, 0])
        if (split.slots[row, 0] != PADDING).sum() == (split.slots[row, 1] != PADDING).sum():
            assert torch.equal(split.counterfactual[row], split.tokens[row].flip(0)), "the sentence with the other name"
    assert set(correct.values()) == {1}


def test_winogrande_twins_share_a_split(plain_tokenizer: PreTrainedTokenizerBase, winogrande_file: str) -> None:
    for seed in range(5):
        task = build_task(
            WinoGrande(data_files=winogrande_file, n_selection=512, n_validation=512), plain_tokenizer, seed
        )
        home = []
        for split in (task.discovery, task.selection, task.validation):
            texts = " ".join(text(plain_tokenizer, split.answers[row, 0]) for row in range(len(split)))
            home += [name for name in ("too large", "too small") if name in texts] and [texts]
        assert len(home) == 1 and "too large" in home[0] and "too small" in home[0]


def test_hellaswag(tokenizer: PreTrainedTokenizerBase, check_task: Check, hellaswag_file: str) -> None:
    task = build_task(HellaSwag(data_files=hellaswag_file, **SIZES), tokenizer, 0)
    check_task(task)
    assert (task.accuracy, task.length_normalised, task.chance) == ("choice", True, 0.25)
    right = {text(tokenizer, split.answers[row, 0]) for split, row in all_prompts(task)}
    assert right == {
        "and cries.",
        "to her friend.",
        "the piano well.",
        "to the town on the hill.",
        "a song with a friend.",
        "and eats it all.",
    }
    fed = " ".join(text(tokenizer, split.tokens[row], split.slots[row]) for split, row in all_prompts(task))
    assert "[" not in fed and "A man cuts the. onion" in fed


def test_long_items_are_left_out(plain_tokenizer: PreTrainedTokenizerBase, winogrande_file: str) -> None:
    sizes = {"n_discovery": 9, "n_selection": 9, "n_validation": 9}
    task = build_task(WinoGrande(data_files=winogrande_file, max_length=15, **sizes), plain_tokenizer, 0)
    assert sum(len(split) for split in (task.discovery, task.selection, task.validation)) == 8
    with pytest.raises(TaskError, match=r"with at most task\.max_length=5 tokens: too few usable prompts"):
        build_task(WinoGrande(data_files=winogrande_file, max_length=5), plain_tokenizer, 0)


def test_a_lone_item_has_no_counterfactual(plain_tokenizer: PreTrainedTokenizerBase, hellaswag_file: str) -> None:
    config = HellaSwag(data_files=hellaswag_file, n_discovery=2, n_selection=1, n_validation=2)
    with pytest.raises(TaskError, match=r"task\.n_selection: .* another item .* found 0 other items; raise"):
        build_task(config, plain_tokenizer, 0)


def test_malformed_rows(plain_tokenizer: PreTrainedTokenizerBase, lines: Lines) -> None:
    row = {"sentence": "Anna beat Tom so _ won", "option1": "Anna", "option2": "Tom", "answer": ""}
    with pytest.raises(TaskError, match=r"row 1 must have answer 1 or 2 .* found answer ''.*labelled split"):
        build_task(WinoGrande(data_files=lines("a.jsonl", [row])), plain_tokenizer, 0)
    row = {"activity_label": "x", "ctx": "y", "endings": ["a", "b"], "label": "0"}
    with pytest.raises(TaskError, match="row 1 must have 4 endings"):
        build_task(HellaSwag(data_files=lines("b.jsonl", [row])), plain_tokenizer, 0)
    row = {"activity_label": "x", "ctx": "y", "endings": ["a", "b", "c", None], "label": 0}
    with pytest.raises(TaskError, match="row 1 must have 4 endings"):
        build_task(HellaSwag(data_files=lines("c.jsonl", [row])), plain_tokenizer, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["WinoGrande", "HellaSwag"])
def test_unreachable_hub_says_what_to_do(name: str) -> None:
    """In a process of its own, because `datasets` reads its offline switch on import."""
    script = (
        f"from hagd.config.task import {name}\nfrom hagd.tasks.data_files import load_rows\n"
        f"from hagd.errors import TaskError\nc = {name}(dataset='nobody/nothing')\n"
        "try:\n    load_rows(None, c.dataset, None, c.split, {'a': str, 'b': str})\n"
        "except TaskError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.startswith("task.dataset=nobody/nothing: HF_HUB_OFFLINE is set; ")
    assert "set task.data_files=… to local JSON lines with the columns a, b" in found.stdout
    assert len(found.stdout.splitlines()) == 1
