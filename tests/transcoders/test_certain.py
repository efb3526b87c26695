"""The exact top k, and all above a threshold, by way of a product in bfloat16, against those of the full product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from hagd.transcoders.sparse import certain, selection
from hagd.transcoders.sparse.certain import certain_above, certain_top_k
from hagd.transcoders.sparse.cpu_library import library
from hagd.transcoders.sparse.selection import above, top_k, top_of_batch

ROUGH, FINE = 1000, 8
"""Whole numbers up to 1,000 are not among the bfloat16, those up to 8 are."""

property_test = hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True, params=["NumPy", "compiled"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What chooses among rounded pre-activations; both for matrices of any size."""
    if request.param == "compiled" and library() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(certain, "compiled", lambda m, *_: request.param == "compiled")


def whole(n_tokens: int, m: int, d: int, x: int, weight: int, bias: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Whole numbers up to the given ones, of which every sum is exact in float32."""
    g = torch.Generator().manual_seed(seed)
    sizes = (((n_tokens, d), x), ((m, d), weight), ((m,), bias))
    return tuple(torch.randint(-most, most + 1, shape, generator=g).float() for shape, most in sizes)


def agrees(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    """Asserts that what is decided is right, and returns which tokens are."""
    pre = x @ weight.T + bias
    values, index, left_open = certain_top_k(x, weight, bias, k)
    done = ~left_open
    assert torch.equal(values[done].sort(descending=True).values, pre[done].topk(k).values)
    assert torch.equal(pre[done].gather(1, index[done]), values[done])
    assert all(len(set(row)) == k for row in index[done].tolist())
    return done


def of_inputs() -> tuple[Tensor, ...]:
    """1,000 is a bfloat16, 1,001 is rounded to it; the bias takes off what they share."""
    x, weight, _ = whole(300, 256, 1, 1, FINE, 0)
    return 1000 + x, weight, (20 * FINE - 1000 * weight[:, 0]).bfloat16().float()


def around_zero() -> tuple[Tensor, ...]:
    """Where numbers and integers of the same bits are of different orders."""
    x, weight, _ = of_inputs()
    around = torch.rand(256, generator=torch.Generator().manual_seed(0)) * 64 - 56
    return x, weight, (around - 1000 * weight[:, 0]).bfloat16().float()


def of_inputs_and_the_bias() -> tuple[Tensor, ...]:
    x, weight, _ = of_inputs()
    return x, weight, whole(1, 256, 1, 1, 1, 40)[2] + 200 - 1000 * weight[:, 0]


def of_weights() -> tuple[Tensor, ...]:
    _, weight, _ = whole(300, 256, 1, 1, 1, 0)
    return torch.full((300, 1), 4.0), 1000 + weight, torch.full((256,), -3968.0)


def of_the_bias() -> tuple[Tensor, ...]:
    _, _, bias = whole(300, 256, 1, 1, 1, 6)
    return torch.ones(300, 1), torch.full((256, 1), -992.0), 1000 + bias


CASES = {
    "of inputs": of_inputs(),
    "of inputs, around zero": around_zero(),
    "of weights": of_weights(),
    "of the bias": of_the_bias(),
    "of inputs and the bias": of_inputs_and_the_bias(),
    "of what is stored": whole(300, 256, 100, FINE, FINE, 0),
    "of inputs, many": whole(300, 256, 100, ROUGH, FINE, 0),
    "of weights, many": whole(300, 256, 100, FINE, ROUGH, 0),
    "of all": whole(300, 256, 16, ROUGH, ROUGH, ROUGH),
}
ROUNDING = pytest.mark.parametrize("case", list(CASES))


@ROUNDING
def test_products_are_off_by_no_more_than_is_said(case: str) -> None:
    """With one column by half of it and more: nothing that is said can be left out."""
    x, weight, bias = CASES[case]
    off, error = bounds(x, weight, bias)
    assert (error <= off).all()
    assert (error / off).max() > (0.45 if x.shape[1] == 1 or case == "of what is stored" else 0.05)


def bounds(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, m]`: what the rounded products are said to be off by at most, and what they are off by."""
    pre, error, length = certain._product(x, (encoder := certain._rounded(weight, bias)))
    token, feature = (each.ravel() for each in np.indices(pre.shape))
    value = pre.float().numpy().ravel()
    off = certain._off(encoder, feature, error[token], length[token], value)
    return torch.from_numpy(off).view_as(pre), (pre.double() - (x.double() @ weight.double().T + bias)).abs()


@ROUNDING
@pytest.mark.parametrize("k", [3, 40])
def test_all_that_can_be_among_the_largest_are_looked_at(case: str, k: int) -> None:
    """Those whose largest possible pre-activation reaches the k-th of the least possible ones, and no others."""
    x, weight, bias = CASES[case]
    off, _ = bounds(x, weight, bias)
    rounded = certain._rounded(weight, bias)
    pre = certain._product(x, rounded)[0].float()
    possible = pre + off >= (pre - off).topk(k).values[:, -1:]
    features, counts = certain._possible(x, rounded, k)
    start = 0
    for token, count in enumerate(counts):
        if count:
            assert features[start : start + count].tolist() == possible[token].nonzero()[:, 0].tolist()
        start += count
    crowded = possible.sum(1) > certain._MOST * k / 2
    near_zero = pre.topk(k).values[:, -1] < 3 * off.amax(1)
    assert (torch.from_numpy(counts > 0) | crowded | near_zero).all(), "no others are left open"


@ROUNDING
def test_no_rounding_misleads(case: str) -> None:
    """The k largest by the rounded product alone are others on some tokens."""
    x, weight, bias = CASES[case]
    agrees(x, weight, bias, k=30)
    pre = x @ weight.T + bias
    rounded = (x.bfloat16() @ weight.bfloat16().T + bias.bfloat16()).topk(30).indices
    assert (pre.gather(1, rounded).amin(1) < pre.topk(30).values[:, -1]).any()


@given(
    seed=st.integers(0, 1000),
    n_tokens=st.integers(1, 9),
    m=st.integers(1, 80),
    k=st.integers(1, 40),
    d=st.integers(1, 6),
    sizes=st.tuples(*3 * [st.sampled_from([0, 1, FINE, ROUGH])]),
)
@property_test
def test_what_is_decided_is_right(
    seed: int, n_tokens: int, m: int, k: int, d: int, sizes: tuple[int, int, int]
) -> None:
    """Ties, few positive pre-activations and features all alike among them."""
    assert len(agrees(*whole(n_tokens, m, d, *sizes, seed), k=min(k, m))) == n_tokens


@pytest.mark.parametrize("spread", [0.0, 3.0], ids=["alike", "of all sizes"])
def test_ordinary_tokens_are_decided_and_few_features_looked_at(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(600, 128, generator=g), torch.randn(2048, 128, generator=g)
    x *= torch.exp(spread * torch.randn(128, generator=g)) * torch.exp(spread * torch.randn(600, 1, generator=g))
    looked_at: list[int] = []
    plain = certain.gather_dot
    monkeypatch.setattr(certain, "gather_dot", lambda x, s, *rest: looked_at.append(len(s.index)) or plain(x, s, *rest))
    _, index, left_open = certain_top_k(x, weight, torch.zeros(2048), 32)
    exact = (x.double() @ weight.double().T).topk(32).indices
    assert torch.equal(index[~left_open].sort().values, exact[~left_open].sort().values)
    assert left_open.float().mean() < 0.02
    assert 32 <= looked_at[0] / 600 < 2 * 32


def test_what_is_left_open() -> None:
    """NaN, infinities, nothing surely positive, and hundreds of features that rounding does not tell apart."""
    x, weight, bias = whole(7, 1024, 16, FINE, FINE, 0)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    x[2] = 0
    x[3] = -torch.inf
    alike = weight.clone()
    alike[:] = alike[0] + torch.arange(1024)[:, None] * 2.0**-14
    assert certain_top_k(x, weight, bias, 4)[2].tolist() == [True] * 4 + [False] * 3
    assert certain_top_k(x, weight, bias - 1e4, 4)[2].all()
    assert certain_top_k(x.abs() + 1, alike.abs() + 1, bias, 4)[2].all()
    weight[5] = torch.nan
    assert certain_top_k(x, weight, bias, 4)[2].all()


def test_where_bounds_say_little_no_more_than_a_chunk_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with one feature of an outlying norm."""
    products: list[int] = []
    plain = certain._product
    monkeypatch.setattr(certain, "_product", lambda x, encoder: products.append(len(x)) or plain(x, encoder))
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3 * certain._CHUNK + 5, 64, generator=g), torch.randn(1024, 64, generator=g)
    assert certain_top_k(x, weight, torch.zeros(1024), 16)[2].float().mean() < 0.05
    assert products == [*3 * [certain._CHUNK], 5]
    products.clear()
    weight[3] *= 30
    values, index, left_open = certain_top_k(x, weight, torch.zeros(1024), 16)
    assert values.shape == index.shape == (len(x), 16) and left_open[certain._CHUNK :].all()
    assert products == [certain._CHUNK]


@given(
    seed=st.integers(0, 1000),
    counts=st.lists(st.sampled_from([0, 3, 4, 7]), min_size=1, max_size=6).filter(any),
    levels=st.sampled_from([1, 2, 5, 1000]),
)
@property_test
def test_the_first_of_the_same_are_taken_and_nan_is_the_largest(seed: int, counts: list[int], levels: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(levels, size=sum(counts)).astype(np.float32)
    values[rng.random(len(values)) < 0.1] = np.nan
    expected, start = [], 0
    for count in counts:
        part = np.where(np.isnan(values[start : start + count]), np.inf, values[start : start + count])
        expected += sorted(start + np.argsort(-part, kind="stable")[:3])
        start += count
    assert certain._top_of_segments(values, np.array(counts), 3).tolist() == expected


@pytest.mark.parametrize("native", [True, False])
def test_large_dictionaries_take_it_where_bfloat16_is_fast(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same result; what it leaves open is computed in full."""
    asked: list[int] = []
    plain = selection.certain_top_k

    def asking(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        asked.append(len(x))
        return plain(x, *rest)

    monkeypatch.setattr(selection, "certain_top_k", asking)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    x, weight, bias = whole(600, 1024, 16, ROUGH, FINE, FINE)
    x[7], x[300] = 0, torch.nan
    pre = x @ weight.T + bias
    support, values = top_k(x, weight, bias, 8)
    assert asked == ([600] if native else [])
    expected = pre.topk(8).values
    torch.testing.assert_close(values.view(600, 8).sort(descending=True).values, expected, equal_nan=True)
    torch.testing.assert_close(values, pre[support.token, support.index], equal_nan=True)
    top_k(x[: selection._WORTHWHILE - 1], weight, bias, 8)
    top_k(x, weight[:1000], bias[:1000], 8)
    top_k(x.double(), weight.double(), bias.double(), 8)
    assert asked == ([600] if native else [])


def limits(pre: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """A threshold for all that about such a share exceeds, and one a feature around it, on pre-activations and between
    them."""
    one = pre.flatten().sort(descending=True).values[int(share * pre.numel())].clamp(min=1)
    spread = torch.randint(-1, 2, (pre.shape[1],), generator=torch.Generator().manual_seed(seed)) / 2
    return one, one + spread


@ROUNDING
@pytest.mark.parametrize("each", [False, True], ids=["for all", "a feature"])
def test_all_that_exceed_a_threshold_are_found(case: str, each: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is looked at are those that rounding lets exceed it, no others."""
    x, weight, bias = CASES[case]
    pre = x @ weight.T + bias
    threshold = limits(pre, 0.01, 0)[each]
    looked_at: list[Tensor] = []
    plain = certain.gather_dot
    monkeypatch.setattr(certain, "gather_dot", lambda x, s, *rest: looked_at.append(s.index) or plain(x, s, *rest))
    monkeypatch.setattr(certain, "_MOST_SHARE", 0)
    found = certain_above(x, weight, bias, threshold)
    off, _ = bounds(x, weight, bias)
    if found is None:
        assert (threshold - 1.1 * off.amax() <= 0).float().mean() > 0.2, "bounds say nothing"
        return
    support, values = found
    above_it = pre > threshold
    assert support.index.tolist() == above_it.nonzero()[:, 1].tolist()
    assert torch.equal(support.offsets.diff(), above_it.sum(1))
    assert torch.equal(values, pre[above_it])
    rounded = certain._product(x, certain._rounded(weight, bias))[0].float()
    assert looked_at[0].tolist() == (rounded + off > threshold).nonzero()[:, 1].tolist()


@given(
    seed=st.integers(0, 1000),
    n_tokens=st.integers(1, 9),
    m=st.integers(1, 80),
    d=st.integers(1, 6),
    sizes=st.tuples(*3 * [st.sampled_from([0, 1, FINE, ROUGH])]),
    share=st.sampled_from([0.0, 0.01, 0.3]),
    each=st.booleans(),
)
@property_test
def test_no_threshold_misleads(
    seed: int, n_tokens: int, m: int, d: int, sizes: tuple[int, int, int], share: float, each: bool
) -> None:
    x, weight, bias = whole(n_tokens, m, d, *sizes, seed)
    pre = x @ weight.T + bias
    threshold = limits(pre, share, seed)[each]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certain, "_MOST_SHARE", 0)
        found = certain_above(x, weight, bias, threshold)
    assert found is not None
    support, values = found
    assert torch.equal(torch.stack([support.token, support.index], 1), (pre > threshold).nonzero())
    assert torch.equal(values, pre[pre > threshold])


def test_thresholds_that_are_left_to_the_full_product() -> None:
    """NaN, infinities, near zero, and where too many are above."""
    x, weight, bias = whole(300, 256, 100, FINE, FINE, 0)
    limit = limits(x @ weight.T, 0.01, 0)[0]
    assert certain_above(x, weight, bias, limit) is not None
    assert certain_above(x, weight, bias, limit.expand(256)) is not None
    assert certain_above(x, weight, bias, torch.tensor(0.0)) is None
    assert certain_above(x, weight, bias, limit / 1000) is None
    assert certain_above(x, weight, bias, -limit) is None
    assert certain_above(x, weight, bias, limits(x @ weight.T, 0.2, 0)[0]) is None
    few = torch.where(torch.arange(256) < 8, -limit, limit)
    assert (found := certain_above(x, weight, bias, few)) is not None
    assert torch.equal(found[1], (pre := x @ weight.T + bias)[pre > few])
    for wrong in (torch.nan, torch.inf):
        for matrix in (x, weight):
            kept = matrix[299 % len(matrix), 3].clone()
            matrix[299 % len(matrix), 3] = wrong
            assert certain_above(x, weight, bias, limit) is None
            assert certain_above(x, weight, bias, limit.expand(256)) is None
            matrix[299 % len(matrix), 3] = kept


@pytest.mark.parametrize("native", [True, False])
def test_thresholds_of_large_dictionaries_take_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same result, for JumpReLU and BatchTopK alike."""
    asked: list[bool] = []
    plain = selection.certain_above

    def asking(*inputs: Tensor) -> object:
        found = plain(*inputs)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(selection, "certain_above", asking)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    x, weight, bias = whole(600, 1024, 16, FINE, ROUGH, FINE)
    pre = x @ weight.T + bias
    for threshold in limits(pre, 0.02, 0):
        support, values = above(x, weight, bias, threshold)
        assert torch.equal(torch.stack([support.token, support.index], 1), (pre > threshold).nonzero())
        assert torch.equal(values, pre[pre > threshold])
    support, values = top_of_batch(x, weight, bias, 8)
    assert torch.equal(values.sort().values, pre.flatten().topk(600 * 8).values.sort().values)
    assert torch.equal(pre[support.token, support.index], values)
    assert asked == (3 * [True] if native else [])
