"""Four mechanisms compiled to GPT-2: their prompts, and which nodes they consist of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hagd.models.language_model import LanguageModel
from hagd.patching.means import head_means, slot_means
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import Prompts, TaskData
from tests.ground_truth.compiled import (
    Layer,
    Neuron,
    Stream,
    compile_gpt2,
    decoys,
    exact_transcoders,
    looking_at,
    looking_back,
    matching,
)

N_DISCOVERY, N_OTHER, N_DECOYS = 96, 48, 40


@dataclass(frozen=True)
class Mechanism:
    """A compiled model with a task.

    Attributes:
        patched: with its heads as nodes.
        members: bool in the shape of the gates: mechanism nodes whose activation differs between prompts.
    """

    patched: PatchedModel
    task: TaskData
    members: Tensor


def modular_lookup() -> Mechanism:
    """`a + b mod 7`: two heads fetch a and b, a table of 49 neurons adds, and a readout that saturates says no.

    The readout of the right answer is switched off, so that in the clean run no gradient reaches the table.
    """
    p, last = 7, 2
    stream = Stream({"token": p + 1, "position": 3, "a": p, "b": p, "sum": p, "junk": 4, "out": p + 1})
    one_hot = torch.eye(p)
    table = [
        Neuron(stream.vector(a=one_hot[a], b=one_hot[b]), -1.5, stream.vector(sum=6 * one_hot[(a + b) % p]))
        for a in range(p)
        for b in range(p)
    ]
    saying_no = [Neuron(stream.vector(sum=-one_hot[c]), 1.0, stream.vector(out=-torch.eye(p + 1)[c])) for c in range(p)]
    first = Layer(
        [
            looking_at(stream, [0], "token", "a"),
            looking_at(stream, [1], "token", "b"),
            looking_at(stream, [0, 1], "token", "junk", decoy=True),
        ],
        table + decoys(stream, ("token", "a", "b"), N_DECOYS, 0),
    )
    second = Layer([], saying_no + decoys(stream, ("a", "sum", "junk"), N_DECOYS, 1), stream.vector(out=_minus_last(p)))

    def draw(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([torch.randint(p, (n, 2), generator=g), torch.full((n, 1), p)], dim=1)
        return tokens, (tokens[:, :2].sum(1) % p)[:, None]

    lm = compile_gpt2(stream, [first, second], p + 1, "modular_lookup")
    return _mechanism(lm, [first, second], draw, scored=(last,), used={last})


def induction() -> Mechanism:
    """… x y … x → y: one head notes each token's predecessor, the next finds x's successor and copies it."""
    n, v = 5, 7
    length, last = n + 2, n + 1
    stream = Stream({"token": v + 1, "position": length, "before": v + 1, "found": v + 1, "junk": 4, "out": v + 1})
    one_hot = torch.eye(v + 1)
    reading = [Neuron(stream.vector(found=one_hot[c]), -0.5, stream.vector(out=2 * one_hot[c])) for c in range(v)]
    first = Layer(
        [looking_back(stream, "token", "before"), looking_at(stream, range(length), "token", "junk", decoy=True)],
        decoys(stream, ("token", "before"), N_DECOYS, 2),
    )
    second = Layer(
        [
            matching(stream, "token", "before", "token", "found"),
            looking_at(stream, range(1, length), "before", "junk", decoy=True),
        ],
        reading + decoys(stream, ("token", "found", "junk"), N_DECOYS, 3),
    )

    def draw(m: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        symbols = torch.rand(m, v, generator=g).argsort(1)[:, :n]
        at = torch.randint(n - 1, (m, 1), generator=g)
        tokens = torch.cat([torch.full((m, 1), v), symbols, symbols.gather(1, at)], dim=1)
        return tokens, symbols.gather(1, at + 1)

    lm = compile_gpt2(stream, [first, second], v + 1, "induction")
    successors = set(range(2, n + 1))
    return _mechanism(lm, [first, second], draw, scored=(last,), used={last}, heads_used={(0, 0): successors})


def counting() -> Mechanism:
    """How many ones there are: one head averages, two neurons a step turn the mean into a count."""
    n = 6
    size = 3 + n + 1  # 0, 1, =, and a token for each count
    stream = Stream({"token": size, "position": n + 1, "count": size, "junk": 4, "out": size})
    one_hot = torch.eye(size)
    steps = []
    for j in range(1, n + 1):
        change = 2 * (one_hot[3 + j] - one_hot[3 + j - 1])
        read = stream.vector(count=one_hot[1])
        steps += [Neuron(read, 0.75 - j, stream.vector(out=change)), Neuron(read, 0.25 - j, stream.vector(out=-change))]
    layer = Layer(
        [
            looking_at(stream, range(n), "token", "count", scale=float(n)),
            looking_at(stream, range(n + 1), "position", "junk", decoy=True),
        ],
        steps + decoys(stream, ("token", "position", "count"), N_DECOYS, 4),
        stream.vector(out=one_hot[3]),
    )

    def draw(m: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        count = torch.randint(n + 1, (m, 1), generator=g)
        ones = torch.rand(m, n, generator=g).argsort(1) < count
        return torch.cat([ones.long(), torch.full((m, 1), 2)], dim=1), 3 + count

    lm = compile_gpt2(stream, [layer], size, "counting")
    return _mechanism(lm, [layer], draw, scored=(n,), used={n})


def sorting() -> Mechanism:
    """Three of five symbols in order: a head gathers them, neurons find the one of each rank, a head fetches it."""
    n, s = 3, 5
    length = 2 * n
    stream = Stream(
        {"token": s + 1, "position": length, "seen": s, "want": s + 1, "found": s + 1, "junk": 4, "out": s + 1}
    )
    one_hot = torch.eye(s + 1)
    ranking = []
    for i in range(n):
        for symbol in range(s):
            below = torch.zeros(s)
            below[: symbol + 1] = 1
            read = stream.vector(seen=below, position=20 * torch.eye(length)[n + i])
            write = 2 * (one_hot[symbol] - (one_hot[symbol + 1] if symbol + 1 < s else 0))
            ranking += [
                Neuron(read, 0.75 - (i + 1) - 20, stream.vector(want=write)),
                Neuron(read, 0.25 - (i + 1) - 20, stream.vector(want=-write)),
            ]
    reading = [Neuron(stream.vector(found=one_hot[c]), -0.5, stream.vector(out=2 * one_hot[c])) for c in range(s)]
    first = Layer(
        [
            looking_at(stream, range(n), "token", "seen", scale=float(n)),
            looking_at(stream, range(length), "position", "junk", decoy=True),
        ],
        ranking + decoys(stream, ("token", "seen", "position"), N_DECOYS, 5),
    )
    second = Layer(
        [
            matching(
                stream, "want", "token", "token", "found", lead=6.0
            ),  # graded, so that every neuron of a rank matters
            looking_at(stream, range(length), "seen", "junk", decoy=True),
        ],
        reading + decoys(stream, ("token", "want", "junk"), N_DECOYS, 6),
    )

    def draw(m: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        symbols = torch.rand(m, s, generator=g).argsort(1)[:, :n]
        ordered = symbols.sort(1).values
        tokens = torch.cat([symbols, torch.full((m, 1), s), ordered[:, :-1]], dim=1)
        return tokens, ordered

    lm = compile_gpt2(stream, [first, second], s + 1, "sorting")
    outputs = tuple(range(n, length))
    return _mechanism(lm, [first, second], draw, scored=outputs, used=set(outputs))


MECHANISMS: dict[str, Callable[[], Mechanism]] = {
    "modular_lookup": modular_lookup,
    "induction": induction,
    "counting": counting,
    "sorting": sorting,
}


def _minus_last(p: int) -> Tensor:
    """The token that is never an answer starts behind all others."""
    return torch.cat([torch.zeros(p), torch.full((1,), -1.0)])


def _mechanism(
    lm: LanguageModel,
    layers: list[Layer],
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    scored: tuple[int, ...],
    used: set[int],
    heads_used: dict[tuple[int, int], set[int]] | None = None,
) -> Mechanism:
    g = torch.Generator().manual_seed(0)
    splits = [_prompts(draw, n, scored, g) for n in (N_DISCOVERY, N_OTHER, N_OTHER)]
    length = splits[0].tokens.shape[-1]
    names = tuple(f"t{position}" for position in range(length))
    task = TaskData(lm.name, names, "argmax", False, 1 / lm.vocab_size, (), None, *splits)
    transcoders, discovery = exact_transcoders(lm), task.discovery
    n_layers = tuple(range(lm.n_layers))
    patched = PatchedModel(
        lm,
        transcoders,
        slot_means(lm, transcoders, discovery, length, batch=64),
        head_means(lm, n_layers, discovery, length, batch=64),
    )
    features = torch.zeros(lm.n_layers, length, transcoders.m, dtype=torch.bool)
    heads = torch.zeros(lm.n_layers, length, patched.layout.n_heads, dtype=torch.bool)
    varying = patched.features(discovery.tokens[:, 0])[0].std(dim=1) > 1e-2  # [L, T, m]
    for index, layer in enumerate(layers):
        for number, neuron in enumerate(layer.neurons):
            features[index, sorted(used), number] = not neuron.decoy
        for number, head in enumerate(layer.heads):
            where = (heads_used or {}).get((index, number), used)
            heads[index, sorted(where), number] = not head.decoy
    members = patched.layout.join((features & varying).float(), heads.float()).bool()
    return Mechanism(patched, task, members)


def _prompts(
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]], n: int, scored: tuple[int, ...], g: torch.Generator
) -> Prompts:
    tokens, answers = draw(n, g)
    other, wrong = draw(n, g)
    while (same := (wrong == answers).all(1)).any():
        other[same], wrong[same] = draw(int(same.sum()), g)
    return Prompts(
        tokens=tokens[:, None],
        counterfactual=other[:, None],
        slots=torch.arange(tokens.shape[1]).expand_as(tokens)[:, None],
        scored=torch.tensor(scored).expand(n, -1)[:, None],
        answers=answers[:, None, :, None],
        distractors=torch.where(wrong == answers, -1, wrong)[:, None, :, None],
    )
