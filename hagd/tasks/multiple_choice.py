"""Items with several continuations, compared by their log-likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle

from hagd.errors import TaskError
from hagd.tasks.examples import Example, Option
from hagd.tasks.tokenise import BOS, Encoded


@dataclass(frozen=True)
class Item:
    """One question: its options with the correct one first, and the role of the tokens that are scored."""

    options: tuple[Encoded, ...]
    scored_role: str


def choice_examples(items: Sequence[Item], split: str) -> list[Example]:
    """Examples of one split.

    The last token of an option is predicted but not fed. Slots are the roles, except `first` for the first token
    (language models treat that position like no other) and `last` for the last one fed.

    The counterfactual of an option is the item's next option of the same token length that is fed other tokens (for
    WinoGrande the sentence with the other name). If there is none it is text of the following items of the split,
    as many as needed, cut at the same length. Distractors are unused: options compete with each other.

    Raises:
        TaskError: an option needs text of other items and there is none.
    """
    examples = []
    for index, item in enumerate(items):
        donors = [other.options[0] for other in (*items[index + 1 :], *items[:index])]
        examples.append(tuple(_option(item, number, donors, split) for number in range(len(item.options))))
    return examples


def _option(item: Item, number: int, donors: Sequence[Encoded], split: str) -> Option:
    encoded = item.options[number]
    length = len(encoded) - 1
    roles = [str(role) for role in encoded.roles[:length]]
    # Written in this order so that a one-token prompt, which is both, counts as the last.
    slots = ["first", *roles[1:]][:length]
    slots[-1] = "last"
    targets = [i for i, role in enumerate(encoded.roles) if role == item.scored_role and i > 0]
    fed = encoded.tokens[:length]
    rotated = (*item.options[number + 1 :], *item.options[:number])
    alike = (other.tokens for other in rotated if len(other) == len(encoded))
    counterfactual = next(
        (tokens[:length] for tokens in chain(alike, _joined(donors, length)) if tokens[:length] != fed), None
    )
    if counterfactual is None:
        raise TaskError(
            f"task.n_{split}: the {split} split needs another item whose text can serve as counterfactual, found "
            f"{len(donors)} other items; raise task.n_{split} or give more data"
        )
    return Option(
        tokens=fed,
        counterfactual=counterfactual,
        slots=tuple(slots),
        scored=tuple(i - 1 for i in targets),
        answers=tuple((encoded.tokens[i],) for i in targets),
        distractors=((),) * len(targets),
    )


def _joined(donors: Sequence[Encoded], length: int) -> Iterator[tuple[int, ...]]:
    """Text of consecutive donors, at least `length` tokens, starting at each donor in turn."""
    for start, first in enumerate(donors):
        tokens = list(first.tokens)
        following = cycle((*donors[start + 1 :], *donors[: start + 1]))
        while len(tokens) < length:
            donor = next(following)
            tokens += [t for t, role in zip(donor.tokens, donor.roles, strict=True) if role != BOS]
        yield tuple(tokens)
