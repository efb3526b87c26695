"""Sparse products against dense ones, and their derivatives against finite differences."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hagd.transcoders.sparse import products
from hagd.transcoders.sparse.products import decode, decode_and_lengths, gather_dot, row_norms, sum_by_feature
from hagd.transcoders.sparse.support import Support

D = 3


def random_pairs(seed: int, n_tokens: int, m: int, density: float) -> tuple[Support, Tensor, Tensor]:
    """A support, unsorted within a token; values `[n]`; both as a dense `[B, m]` matrix of values."""
    g = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n_tokens, m, generator=g) < density
    rows = [torch.randperm(m, generator=g)[:0].tolist() for _ in range(n_tokens)]
    for t in range(n_tokens):
        active = chosen[t].nonzero()[:, 0]
        rows[t] = active[torch.randperm(len(active), generator=g)].tolist()
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    index = torch.tensor([j for row in rows for j in row], dtype=torch.long)
    values = torch.randn(len(index), generator=g, dtype=torch.float64)
    dense = torch.zeros(n_tokens, m, dtype=torch.float64)
    for t in range(n_tokens):
        for place in range(int(offsets[t]), int(offsets[t + 1])):
            dense[t, index[place]] = values[place]
    return Support(index, offsets, m), values, dense


def matrices(seed: int, n_tokens: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows `[B, d]`, a weight `[m, d]` and a bias `[m]`."""
    g = torch.Generator().manual_seed(seed + 1)
    return tuple(torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n_tokens, D), (m, D), (m,)))  # type: ignore[return-value]


PAIRS = {
    "some": (5, 7, 0.4),
    "all": (4, 3, 1.1),
    "none": (3, 4, 0.0),
    "few": (6, 9, 0.06),
    "one token": (1, 6, 0.5),
    "one feature": (5, 1, 0.5),
}
EVERY_PATTERN = pytest.mark.parametrize("pattern", list(PAIRS))


@given(
    seed=st.integers(0, 1000),
    n_tokens=st.integers(1, 6),
    m=st.integers(1, 8),
    density=st.sampled_from([0, 0.2, 0.6, 2]),
)
@settings(max_examples=50, deadline=None)
def test_products_are_those_of_dense_matrices(seed: int, n_tokens: int, m: int, density: float) -> None:
    support, values, dense = random_pairs(seed, n_tokens, m, density)
    a, weight, bias = matrices(seed, n_tokens, m)
    assert support.n_tokens == n_tokens and len(support.token) == len(values)
    torch.testing.assert_close(decode(values, support, weight), dense @ weight)
    torch.testing.assert_close(sum_by_feature(values, support, a), dense.T @ a)
    expected = (a @ weight.T + bias)[support.token, support.index]
    torch.testing.assert_close(gather_dot(a, support, weight, bias), expected)


def test_the_patterns_have_empty_tokens_and_empty_features() -> None:
    support, _, dense = random_pairs(0, *PAIRS["few"])
    used = torch.zeros_like(dense, dtype=torch.bool)
    used[support.token, support.index] = True
    assert (~used.any(1)).any() and (~used.any(0)).any() and used.any()
    assert not used[-1].any() or not used[0].any(), "also at an end"


@EVERY_PATTERN
def test_gradients_of_decode(pattern: str) -> None:
    support, values, _ = random_pairs(0, *PAIRS[pattern])
    _, weight, _ = matrices(0, support.n_tokens, support.m)
    inputs = (values.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda v, w: decode(v, support, w), inputs)


@EVERY_PATTERN
def test_gradients_of_decode_and_lengths(pattern: str) -> None:
    """Of both results, and of either alone."""
    support, values, dense = random_pairs(0, *PAIRS[pattern])
    _, weight, _ = matrices(0, support.n_tokens, support.m)
    inputs = (values.requires_grad_(), weight.requires_grad_())
    out, lengths = decode_and_lengths(values, support, weight)
    torch.testing.assert_close((out, lengths), (dense @ weight, weight.norm(dim=1)))
    for chosen in (slice(None), slice(1)):
        assert torch.autograd.gradcheck(lambda v, w, c=chosen: decode_and_lengths(v, support, w)[c], inputs)


def test_a_row_of_nothing_has_a_norm_without_gradient() -> None:
    support, values, _ = random_pairs(0, *PAIRS["some"])
    weight = torch.zeros(support.m, D, dtype=torch.float64, requires_grad=True)
    for lengths in (decode_and_lengths(values, support, weight)[1], row_norms(weight)):
        assert torch.equal(torch.autograd.grad(lengths.sum(), weight)[0], torch.zeros_like(weight))


def test_gradients_of_row_norms() -> None:
    weight = matrices(0, 3, 5)[1].requires_grad_()
    torch.testing.assert_close(row_norms(weight), weight.norm(dim=1))
    assert torch.autograd.gradcheck(row_norms, (weight,))


@EVERY_PATTERN
def test_gradients_of_gather_dot(pattern: str) -> None:
    support, _, _ = random_pairs(0, *PAIRS[pattern])
    inputs = tuple(each.requires_grad_() for each in matrices(0, support.n_tokens, support.m))
    assert torch.autograd.gradcheck(lambda a, w, b: gather_dot(a, support, w, b), inputs)


def test_a_known_result_is_given_back_with_the_same_gradients() -> None:
    support, values, _ = random_pairs(0, *PAIRS["some"])
    inputs = tuple(each.requires_grad_() for each in matrices(0, support.n_tokens, support.m))
    plain = gather_dot(inputs[0], support, inputs[1], inputs[2])
    known = plain.detach() + 1
    found = gather_dot(inputs[0], support, inputs[1], inputs[2], known)
    assert torch.equal(found, known)
    expected = torch.autograd.grad(plain @ values, inputs)
    torch.testing.assert_close(torch.autograd.grad(found @ values, inputs), expected)
    with torch.no_grad():
        found.zero_()
    assert (known != 0).all(), "what was known is not shared"


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    support, values, _ = random_pairs(0, *PAIRS["some"])
    inputs = [values, matrices(0, support.n_tokens, support.m)[1]]
    inputs[1 - frozen].requires_grad_()
    decode(inputs[0], support, inputs[1]).sum().backward()
    assert inputs[frozen].grad is None and inputs[1 - frozen].grad is not None


def test_pairs_by_feature() -> None:
    support, _, _ = random_pairs(3, *PAIRS["some"])
    order, token, offsets = support.by_feature
    ends = [*offsets[1:].tolist(), len(order)]
    for j, (start, end) in enumerate(zip(offsets.tolist(), ends, strict=True)):
        assert (support.index[order[start:end]] == j).all()
        assert torch.equal(token[start:end], support.token[order[start:end]])
        assert token[start:end].tolist() == sorted(token[start:end].tolist())
    more_than_16_bits, _, _ = replace(support, m=2**16 + 1).by_feature
    assert torch.equal(more_than_16_bits, order)


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 4, 99])
def test_parts_are_consecutive_tokens(n_tokens: int) -> None:
    support, _, _ = random_pairs(0, *PAIRS["few"])
    parts = support.parts(n_tokens)
    assert max(part.n_tokens for part in parts) == -(-6 // len(parts)) <= n_tokens, "nearly the same number each"
    assert torch.equal(torch.cat([part.index for part in parts]), support.index)
    assert torch.equal(torch.cat([part.offsets.diff() for part in parts]), support.offsets.diff())
    assert all(same is part for same, part in zip(support.parts(n_tokens), parts, strict=True)), "ordered once"


@pytest.mark.parametrize("n_tokens", [2, 99])
def test_a_support_is_freed_with_its_last_use(n_tokens: int) -> None:
    """Without waiting for the collector of garbage: training steps would pile up until then."""
    support, _, _ = random_pairs(0, *PAIRS["few"])
    assert all(len(part.by_feature) for part in support.parts(n_tokens))
    gone = weakref.ref(support)
    gc.disable()
    try:
        del support
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("least", [1, 3])
@EVERY_PATTERN
def test_products_in_parts_that_the_cache_holds(pattern: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with matrices larger than the cache: `gather_dot` to the bit, sums over tokens up to rounding."""
    support, values, dense = random_pairs(0, *PAIRS[pattern])
    a, weight, bias = (each.float() for each in matrices(0, support.n_tokens, support.m))
    whole = gather_dot(a, support, weight, bias)
    sizes = []
    parts = Support.parts
    monkeypatch.setattr(Support, "parts", lambda self, n_tokens: sizes.append(n_tokens) or parts(self, n_tokens))
    for name, value in {"_CACHED": 0, "_CACHED_ROWS": 1, "_FEWEST_TOKENS": 2, "_LEAST_PAIRS": least}.items():
        monkeypatch.setattr(products, name, value)
    assert torch.equal(gather_dot(a, support, weight, bias), whole)
    many = int(len(support.index) >= support.m)
    assert len(sizes) == many, "with fewer pairs than rows nothing is met twice"
    torch.testing.assert_close(sum_by_feature(values.float(), support, a), dense.float().T @ a)
    enough = least * support.m * support.n_tokens // max(1, len(support.index))
    assert sizes[many:] == [max(2, enough)]
    inputs = tuple(each.double().requires_grad_() for each in (a, weight, bias))
    assert torch.autograd.gradcheck(lambda a, w, b: gather_dot(a, support, w, b), inputs)
    inputs = (values.clone().requires_grad_(), inputs[1])
    assert torch.autograd.gradcheck(lambda v, w: decode(v, support, w), inputs)


def test_dots_by_feature_add_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows as long as those of models, where a sum has many orders."""
    support, _, _ = random_pairs(0, 40, 30, 0.3)
    g = torch.Generator().manual_seed(0)
    a, weight, bias = (torch.randn(*shape, generator=g) for shape in ((40, 1000), (30, 1000), (30,)))
    whole = gather_dot(a, support, weight, bias)
    monkeypatch.setattr(products, "_CACHED", 0)
    assert torch.equal(gather_dot(a, support, weight, bias), whole)


def test_sums_in_parts_are_not_all_held(monkeypatch: pytest.MonkeyPatch) -> None:
    support, values, dense = random_pairs(0, 40, 30, 0.3)
    a = matrices(0, 40, 30)[0]
    alive: list[weakref.ref[Tensor]] = []
    most: list[int] = []
    plain = products._segment_sums

    def counted(*inputs: Tensor) -> Tensor:
        alive.append(weakref.ref(sums := plain(*inputs)))
        most.append(sum(each() is not None for each in alive))
        return sums

    monkeypatch.setattr(products, "_segment_sums", counted)
    for name, value in {"_CACHED": 0, "_CACHED_ROWS": 1, "_FEWEST_TOKENS": 5, "_LEAST_PAIRS": 0}.items():
        monkeypatch.setattr(products, name, value)
    torch.testing.assert_close(sum_by_feature(values, support, a), dense.T @ a)
    assert len(alive) == 8 and max(most) <= 3
