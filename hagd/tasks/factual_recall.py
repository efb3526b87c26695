"""Complete a relation: `The capital of France is` → Paris."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hagd.config.task import FactualRecall
from hagd.errors import TaskError
from hagd.tasks.countries import COUNTRIES
from hagd.tasks.data_files import matching_files, read_json
from hagd.tasks.examples import Example, assemble, next_token_example
from hagd.tasks.records import TaskData
from hagd.tasks.splits import split_groups, split_sizes
from hagd.tasks.tokenise import Encoded, encode, fill, first_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = {
    "capital": (
        "The capital city of {} is",
        "The capital of {} is the city of",
        "The country of {} has its capital in the city of",
    ),
    "language": ("People in {} speak", "Most people in {} speak", "The official language of {} is"),
    "continent": (
        "The country of {} is on the continent of",
        "The nation of {} lies on the continent of",
        "We live in {}, on the continent of",
    ),
}

SHIFTED_TEMPLATES = {
    "capital": ("In {}, the capital is the city of", "The government of {} sits in the city of"),
    "language": ("Everyone in {} speaks", "The main language of {} is"),
    "continent": ("The people of {} live on the continent of", "The borders of {} are on the continent of"),
}
"""In no split. Their slots are among those of `TEMPLATES`."""

LRE_FORMAT = 'expected a JSON object with "prompt_templates" ("… {} …") and "samples" of "subject" and "object"'


@dataclass(frozen=True)
class Relation:
    """Templates with one `{}` each, and the accepted objects of each subject."""

    templates: tuple[str, ...]
    objects: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Fact:
    """One prompt: a subject in a template."""

    subject: str
    template: int
    encoded: Encoded
    answers: tuple[int, ...]


def build(config: FactualRecall, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """The first token of the object follows the prompt.

    Slots: `subject` (last token of the subject), `subject_rest` (its earlier tokens), `before1`, `before2`, …
    counting template tokens backwards from the subject, `after1`, … forwards from it, and `last`. The first token
    of a prompt, which language models treat like no other, is `first` unless it is the subject's last.
    No subject is in two splits. The counterfactual is a prompt of the same split, template and token length with
    another answer, the distractor; prompts without one are left out. Sizes are upper bounds: when the relation is
    smaller it is divided in proportion. Chance is that of a uniform draw from the tokenizer's vocabulary.

    Raises:
        TaskError: unreadable relation file, or too few prompts.
    """
    relation = _read_lre(config.data_files) if config.data_files else _built_in(config.relation)
    rng = random.Random(seed)
    sizes = split_sizes(config)
    splits = {}
    for name, facts in _split(config, relation, tokenizer, rng).items():
        splits[name] = _examples(facts, rng)
        random.Random(f"{seed} {name}").shuffle(splits[name])  # the first prompts of a split are a sample of it
        if not splits[name]:
            raise TaskError(
                f"{_source(config)}: none of the {len(facts)} prompts of the {name} split has a counterfactual "
                f"(another prompt of the same template and token length with another answer) there; raise "
                f"task.n_{name}={sizes[name]} or give more data"
            )
    return assemble(name=config.name, splits=splits, accuracy="argmax", chance=1 / len(tokenizer))


def build_shifted(config: FactualRecall, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Example]:
    """Subjects of the validation split in `SHIFTED_TEMPLATES`, shuffled; of a built-in relation."""
    rng = random.Random(seed)
    relation = _built_in(config.relation)
    subjects = dict.fromkeys(fact.subject for fact in _split(config, relation, tokenizer, rng)["validation"])
    shifted = replace(relation, templates=SHIFTED_TEMPLATES[config.relation])
    examples = _examples([fact for subject in subjects for fact in _facts(subject, shifted, tokenizer)], rng)
    rng.shuffle(examples)
    return examples[: config.n_validation]


def _split(
    config: FactualRecall, relation: Relation, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> dict[str, list[Fact]]:
    sizes = split_sizes(config)
    groups = _by_subject(relation, tokenizer, sum(sizes.values()), rng)
    return split_groups(groups, sizes, _source(config))


def _source(config: FactualRecall) -> str:
    return f"task.data_files={config.data_files}" if config.data_files else f"task.relation={config.relation}"


def _built_in(relation: str) -> Relation:
    objects: dict[str, dict[str, tuple[str, ...]]] = {
        "capital": {c.name: (c.capital,) for c in COUNTRIES},
        "language": {c.name: c.languages for c in COUNTRIES},
        "continent": {c.name: (c.continent,) for c in COUNTRIES},
    }
    return Relation(TEMPLATES[relation], objects[relation])


def _read_lre(pattern: str) -> Relation:
    """Relation files of "Linearity of Relation Decoding" (Hernandez et al. 2023, arXiv 2308.09124)."""
    templates: list[str] = []
    objects: dict[str, list[str]] = defaultdict(list)
    for path in matching_files(pattern):
        content: Any = read_json(path)
        try:
            templates += content["prompt_templates"]
            for sample in content["samples"]:
                objects[_unescape(sample["subject"])].append(_unescape(sample["object"]))
        except (KeyError, TypeError) as error:
            raise TaskError(f"task.data_files={path}: {LRE_FORMAT}, found {type(error).__name__} {error}") from None
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise TaskError(f"task.data_files={pattern}: {LRE_FORMAT}, found the templates {wrong}")
    return Relation(tuple(templates), {subject: tuple(found) for subject, found in objects.items()})


def _unescape(text: str) -> str:
    """Some published files escape accents twice, which leaves a literal `\\u00e1` in the text."""
    return re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)


def _by_subject(
    relation: Relation, tokenizer: PreTrainedTokenizerBase, wanted: int, rng: random.Random
) -> list[list[Fact]]:
    """One group a subject, at least `wanted` prompts in all if there are so many.

    Sorted by subject length, so that dealing them in turn gives every split its share of each length and most
    prompts find a counterfactual as long as they are.
    """
    subjects = list(relation.objects)
    rng.shuffle(subjects)
    subjects = subjects[: -(-wanted // len(relation.templates))]
    groups = [_facts(subject, relation, tokenizer) for subject in subjects]
    return sorted(groups, key=lambda group: len(group[0].encoded))


def _facts(subject: str, relation: Relation, tokenizer: PreTrainedTokenizerBase) -> list[Fact]:
    """A prompt a template."""
    answers = tuple(dict.fromkeys(first_token(tokenizer, f" {found}") for found in relation.objects[subject]))
    texts = (fill(template.replace("{}", "{subject}"), {"subject": subject}) for template in relation.templates)
    return [Fact(subject, i, encode(tokenizer, text), answers) for i, text in enumerate(texts)]


def _examples(facts: list[Fact], rng: random.Random) -> list[Example]:
    alike: dict[tuple[int, int], list[Fact]] = defaultdict(list)
    for fact in facts:
        alike[fact.template, len(fact.encoded)].append(fact)

    def examples() -> Iterator[Example]:
        for fact in facts:
            others = alike[fact.template, len(fact.encoded)]
            partners = [other for other in others if not set(other.answers) & set(fact.answers)]
            if partners:
                partner = rng.choice(partners)
                tokens, counterfactual = fact.encoded.tokens, partner.encoded.tokens
                yield next_token_example(tokens, counterfactual, _slots(fact.encoded), fact.answers, partner.answers)

    return list(examples())


def _slots(encoded: Encoded) -> tuple[str, ...]:
    positions = [i for i, role in enumerate(encoded.roles) if role == "subject"]
    first, last = positions[0], positions[-1]
    names = [f"before{first - i}" for i in range(first)]
    names += ["subject_rest"] * (last - first) + ["subject"]
    names += [f"after{i - last}" for i in range(last + 1, len(encoded))]
    if last > 0:
        names[0] = "first"
    if last < len(encoded) - 1:
        names[-1] = "last"
    return tuple(names)
