"""Indirect object identification (Wang et al. 2022, arXiv 2211.00593)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hagd.config.task import IOI
from hagd.tasks.examples import Example, assemble, next_token_example
from hagd.tasks.records import TaskData
from hagd.tasks.splits import seeded, split_codes, split_sizes
from hagd.tasks.tokenise import aligned_words, encode, fill, first_token, slot_names, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = (
    "When {first} and {second} went to the {place}, {S2} gave a {object} to",
    "After {first} and {second} went to the {place}, {S2} gave a {object} to",
    "When {first} and {second} came to the {place}, {S2} gave a {object} to",
    "After {first} and {second} came to the {place}, {S2} offered a {object} to",
    "While {first} and {second} stayed at the {place}, {S2} gave a {object} to",
    "While {first} and {second} sat in the {place}, {S2} gave a {object} to",
)
"""All of the same structure, so that a slot means the same in each."""

NAMES = words(
    "Mary John Tom James Dan Martin Amy Scott Paul Laura Mark Kate Sarah David Anna Jack Peter Emma Robert Lisa "
    "Michael Alice George Jane Henry Susan Thomas Rachel William Helen Charles Karen Daniel Julia Edward Linda "
    "Steven Maria Kevin Emily Simon Ruth Adam Claire"
)
PLACES = words("store garden restaurant school hospital office house station library museum park kitchen")
OBJECTS = words("ring drink book computer letter key phone camera ball present map ticket")


def build(config: IOI, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """The name that is not repeated completes the sentence; slots IO, S1, S2, place, object, end, t1, t2, ….

    The two names come in either order (ABBA, BABA). The counterfactual names the other person in S2, so that its
    answer, the distractor, is the subject; a prompt and its mirror image never both occur. Chance is that of a
    uniform draw from the tokenizer's vocabulary.

    Raises:
        TaskError: the tokenizer knows too few names as single tokens, or too few distinct prompts exist.
    """
    lists = {"names": NAMES, "places": PLACES, "objects": OBJECTS}
    kept = aligned_words(tokenizer, config.name, lists, at_least=4)
    names, places, objects = kept["names"], kept["places"], kept["objects"]
    generator = seeded(seed)
    radices = (len(TEMPLATES), len(names), len(names) - 1, len(places), len(objects))
    codes = split_codes(split_sizes(config), radices, "choose a model whose tokenizer knows more names", generator)
    token_of = {name: first_token(tokenizer, f" {name}") for name in names}

    def example(code: list[int], subject_first: bool) -> Example:
        template, first, second, place, thing = code
        pair = (names[first], names[second + (second >= first)])
        subject, other = pair if subject_first else pair[::-1]
        template_text = TEMPLATES[template].replace("{first}", "{S1}" if subject_first else "{IO}")
        template_text = template_text.replace("{second}", "{IO}" if subject_first else "{S1}")
        filled = {"S1": subject, "IO": other, "place": places[place], "object": objects[thing]}
        clean = encode(tokenizer, fill(template_text, {**filled, "S2": subject}))
        mirrored = encode(tokenizer, fill(template_text, {**filled, "S2": other}))
        answer, distractor = token_of[other], token_of[subject]
        return next_token_example(clean.tokens, mirrored.tokens, slot_names(clean, "end"), [answer], [distractor])

    splits = {}
    for split, rows in codes.items():
        orders = torch.randint(2, (len(rows),), generator=generator).tolist()
        splits[split] = [example(row, bool(order)) for row, order in zip(rows.tolist(), orders, strict=True)]
    return assemble(name=config.name, splits=splits, accuracy="argmax", chance=1 / len(tokenizer))
