"""Selections in chunks against those from all pre-activations at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from hagd.transcoders.sparse import chunks, device_kernels, top_of_rows
from hagd.transcoders.sparse.selection import above, batch_threshold, top_k, top_of_batch
from hagd.transcoders.sparse.support import Support

EXTREMES = (-float("inf"), -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0078125, 3e38, float("inf"))

property_test = hypothesis_settings(max_examples=60, deadline=None)


def whole_numbers(seed: int, n_tokens: int, m: int, d: int = 3, largest: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers: products are exact in any order and in any precision, and many are the same."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((n_tokens, d), (m, d), (m,))
    return tuple(torch.randint(-largest, largest + 1, shape, generator=g).float() for shape in shapes)  # type: ignore[return-value]


def reals(seed: int, n_tokens: int, m: int, d: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((n_tokens, d), (m, d), (m,))
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def all_pre(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias


def mask(support: Support) -> Tensor:
    """Boolean `[B, m]`; every pair must be there once."""
    out = torch.zeros(support.n_tokens, support.m, dtype=torch.bool)
    out[support.token, support.index] = True
    assert int(out.sum()) == len(support.index)
    return out


@given(
    seed=st.integers(0, 1000),
    n_tokens=st.integers(1, 9),
    m=st.integers(1, 70),
    k=st.integers(1, 70),
    ties=st.booleans(),
    large=st.sampled_from([1, 1000]),
)
@property_test
def test_top_k_is_that_of_torch(seed: int, n_tokens: int, m: int, k: int, ties: bool, large: int) -> None:
    """Of entries that are the same, any may be taken."""
    k = min(k, m)
    x, weight, bias = whole_numbers(seed, n_tokens, m) if ties else reals(seed, n_tokens, m)
    pre = all_pre(x, weight, bias)
    expected = pre.topk(k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_kernels, "_LARGE", large)
        patch.setattr(top_of_rows, "_DIRECT", 8)
        support, values = top_k(x, weight, bias, k)
    assert support.offsets.tolist() == list(range(0, n_tokens * k + 1, k))
    assert mask(support).sum(1).tolist() == [k] * n_tokens
    torch.testing.assert_close(values, pre[support.token, support.index], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values.view(n_tokens, k).sort(descending=True).values, expected.values)
    if not ties:
        assert torch.equal(mask(support), torch.zeros_like(pre).scatter(1, expected.indices, 1).bool())


@pytest.mark.parametrize("shift", [0.0, -3.0, -20.0], ids=["signs", "few positive", "negative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "k"), [(64, 4), (64, 5), (60, 4), (36, 4), (36, 10), (30, 7), (33, 4), (16, 1), (16, 16), (4608, 64)]
)
def test_stages_find_what_one_finds(
    m: int, k: int, dtype: torch.dtype, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the largest entries all in one group or all in different ones."""
    monkeypatch.setattr(top_of_rows, "_DIRECT", 8)
    pre = (torch.randn(40, m, generator=torch.Generator().manual_seed(0)) + shift).to(dtype)
    for row, size in enumerate(size for size in (16, 8, 4, 2) if m % size == 0):
        pre[3 * row, row % (m // size) :: m // size] += 5
        pre[3 * row + 1, : m // size] += 5
    for stages in (top_of_rows.two_stage, top_of_rows._partitioned):
        values, index = stages(pre, k)
        assert torch.equal(values.sort(descending=True).values, pre.topk(k).values)
        assert torch.equal(pre.gather(1, index), values)
        assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_left_to_be_found(dtype: torch.dtype) -> None:
    """A diverged training must not look like one that goes on."""
    pre = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0)).to(dtype)
    pre[1] = torch.nan
    pre[3, 7] = torch.nan
    values, _ = top_of_rows._partitioned(pre, 4)
    assert values[1].isnan().all() and values[3].isnan().sum() == 1
    assert torch.equal(values[::2].sort(descending=True).values, pre[::2].topk(4).values)
    assert top_of_rows._partitioned(pre[1:2], 4)[0].isnan().all()
    assert top_of_rows._partitioned(pre[3:], 4)[0].isnan().sum() == 1
    negative = pre[2:3].clone()
    negative[0, 9] = torch.tensor(-64, dtype=torch.int16).view(torch.bfloat16)  # NaN with a sign
    assert top_of_rows._partitioned(negative, 4)[0].isnan().sum() == 1


def test_more_columns_than_places_in_half_a_word() -> None:
    """No group size divides 98,305; of 131,072 columns nearly all reach the bound."""
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 98_305, generator=g).bfloat16()
    same = torch.ones(1, 2**17, dtype=torch.bfloat16)
    same[0, torch.randperm(2**17, generator=g)[:40]] = 2
    for pre in (wide, same):
        values, index = top_of_rows._partitioned(pre, 64)
        assert torch.equal(values.sort(descending=True).values, pre.topk(64).values)
        assert torch.equal(pre.gather(1, index), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    seed=st.integers(0, 1000), levels=st.lists(st.sampled_from(EXTREMES), min_size=1, max_size=6), k=st.integers(1, 9)
)
@property_test
def test_rows_of_few_values_have_their_largest(dtype: torch.dtype, seed: int, levels: list[float], k: int) -> None:
    """Ties at the bound of the groups' maxima and at the k-th place, infinities and both zeros among them."""
    chosen = torch.randint(len(levels), (5, 64), generator=torch.Generator().manual_seed(seed))
    pre = torch.tensor(levels, dtype=dtype)[chosen]
    pre[0] = torch.arange(64.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_of_rows, "_DIRECT", 8)
        values, index = top_of_rows._partitioned(pre, k)
    assert torch.equal(values.sort(descending=True).values, pre.topk(k).values)
    assert torch.equal(pre.gather(1, index), values)
    assert all(len(set(row)) == k for row in index.tolist())


def test_many_tokens_are_encoded_chunk_after_chunk() -> None:
    x, weight, bias = reals(0, 2 * chunks._CHUNK + 77, 24)
    pre = all_pre(x, weight, bias)
    support, values = top_k(x, weight, bias, 3)
    assert torch.equal(mask(support), pre >= pre.topk(3).values[:, -1:])
    torch.testing.assert_close(values, pre[support.token, support.index])
    support, values = above(x, weight, bias, torch.tensor(1.0))
    assert torch.equal(mask(support), pre > 1)
    torch.testing.assert_close(values, pre[pre > 1])
    support, values = top_of_batch(x, weight, bias, 3)
    wanted = pre.flatten().topk(3 * len(x)).values
    torch.testing.assert_close(values.sort(descending=True).values, wanted)
    assert batch_threshold(x, weight, bias, 3).item() == pytest.approx(wanted[-1].item())


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize(
    ("available", "low"), [(True, True), (True, False), (False, True)], ids=["oneDNN", "in float32", "without"]
)
def test_large_dictionaries_are_multiplied_by_another_library(
    available: bool, low: bool, dtype: torch.dtype, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is there, in bfloat16 where it can."""
    low = low and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: low)
    multiply, multiplied = chunks.linear, []
    monkeypatch.setattr(chunks, "linear", lambda x, *others: (multiplied.append(len(x)), multiply(x, *others))[1])
    chunk = chunks._CACHED_CHUNK if dtype == torch.float32 else chunks._CHUNK
    x, weight, bias = (each.to(dtype) for each in reals(0, 2 * chunk + 5, device_kernels._LARGE, d=40))
    pre = torch.cat(list(chunks.by_chunks(x, weight, bias, dtype, Tensor.clone)))
    torch.testing.assert_close(pre.double(), all_pre(x.double(), weight.double(), bias.double()), rtol=off, atol=off)
    used = available and (low or dtype == torch.float32)
    assert multiplied == ([chunk, chunk, 5] if used else [])
    if dtype == torch.bfloat16:
        assert torch.equal(multiply(x, weight, bias), torch.addmm(bias, x, weight.T)) or not used
    else:
        _, values = top_k(x, weight, bias, 8)
        torch.testing.assert_close(values.view(len(x), 8).sort(descending=True).values, pre.topk(8).values)


@given(seed=st.integers(0, 1000), n_tokens=st.integers(1, 9), m=st.integers(2, 70), k=st.integers(1, 20))
@property_test
def test_low_precision_ranks_and_full_precision_decides(seed: int, n_tokens: int, m: int, k: int) -> None:
    """1, 1 + 1/64, …, which bfloat16 tells apart: the same pairs as exactly, and exactly their values."""
    k = min(k, m)
    g = torch.Generator().manual_seed(seed)
    levels = 1 + torch.stack([torch.randperm(m, generator=g) for _ in range(n_tokens)]).float() / 64
    x, weight, bias = torch.eye(n_tokens), levels.T.contiguous(), torch.zeros(m)
    support, values = top_k(x, weight, bias, k, "bfloat16")
    exact, _ = top_k(x, weight, bias, k)
    assert torch.equal(mask(support), mask(exact))
    assert values.dtype == torch.float32
    assert torch.equal(values, levels[support.token, support.index])


def test_values_are_those_of_the_full_precision_product() -> None:
    x, weight, bias = (each.float() for each in reals(0, 50, 64))
    support, values = top_k(x, weight, bias, 8, "bfloat16")
    pre = all_pre(x, weight, bias)
    torch.testing.assert_close(values, pre[support.token, support.index])
    assert (pre - all_pre(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).float()).abs().max() > 5e-3


def test_recall_in_low_precision() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=g)
    weight = torch.nn.functional.normalize(torch.randn(512, 64, generator=g), dim=1)
    bias = torch.zeros(512)
    exact, found = (mask(top_k(x, weight, bias, 32, by)[0]) for by in ("exact", "bfloat16"))
    assert (exact & found).sum() / exact.sum() > 0.985


@given(
    seed=st.integers(0, 1000),
    n_tokens=st.integers(1, 9),
    m=st.integers(1, 30),
    ties=st.booleans(),
    threshold=st.sampled_from([-100.0, 0.0, 2.0, 100.0, None]),
)
@property_test
def test_above_is_what_exceeds_the_threshold(
    seed: int, n_tokens: int, m: int, ties: bool, threshold: float | None
) -> None:
    """One threshold, or each feature's own; an entry that equals it does not exceed it."""
    x, weight, bias = whole_numbers(seed, n_tokens, m) if ties else reals(seed, n_tokens, m)
    bound = bias.flip(0).clone() if threshold is None else torch.tensor(threshold, dtype=x.dtype)
    support, values = above(x, weight, bias, bound)
    pre = all_pre(x, weight, bias)
    assert torch.equal(mask(support), pre > bound)
    assert support.index.tolist() == (pre > bound).nonzero()[:, 1].tolist()
    torch.testing.assert_close(values, pre[pre > bound], rtol=1e-12, atol=1e-12)


@given(
    seed=st.integers(0, 1000),
    n_tokens=st.integers(1, 200),
    m=st.integers(1, 24),
    k=st.integers(1, 24),
    shift=st.sampled_from([0.0, -2.0, -4.0, -20.0, 5.0]),
    ties=st.booleans(),
)
@property_test
def test_top_of_batch_is_the_top_of_all_pairs(
    seed: int, n_tokens: int, m: int, k: int, shift: float, ties: bool
) -> None:
    """Also where fewer than B · k are positive, or none; never more, whatever the ties."""
    k = min(k, m)
    x, weight, bias = whole_numbers(seed, n_tokens, m) if ties else reals(seed, n_tokens, m)
    bias = bias + shift
    pre = all_pre(x, weight, bias)
    best = pre.flatten().topk(k * n_tokens).values
    support, values = top_of_batch(x, weight, bias, k)
    assert support.n_tokens == n_tokens and support.offsets[-1] == len(support.index)
    torch.testing.assert_close(values.sort(descending=True).values, best[best > 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values, pre[support.token, support.index], rtol=1e-12, atol=1e-12)
    if not ties:
        assert torch.equal(mask(support), (pre >= best[-1]) & (pre > 0))


def test_the_bound_of_a_sample_is_lowered_until_enough_pass() -> None:
    """Every second of 128 tokens is sampled; those are the only ones with large pre-activations."""
    x, weight, bias = reals(0, 128, 24)
    x[1::2] *= 1e-3
    bias.zero_()
    pre = all_pre(x, weight, bias)
    best = pre.flatten().topk(7 * 128).values
    first_bound = batch_threshold(x[::2], weight, bias, 7 + 3)
    assert best[-1] > 0 and first_bound > 0 and (pre > first_bound).sum() < 7 * 128
    support, values = top_of_batch(x, weight, bias, 7)
    torch.testing.assert_close(values.sort(descending=True).values, best)
    assert mask(support)[1::2].any()


def test_infinite_pre_activations_are_the_largest() -> None:
    """And the search for a bound below them ends, so that a training that diverges can stop."""
    x, weight, bias = reals(0, 8, 24)
    bias[:4] = torch.inf
    support, values = top_of_batch(x, weight, bias, 2)
    assert len(values) == 16 and values.isinf().all() and (support.index < 4).all()


def test_the_threshold_of_a_batch_is_what_k_a_token_reach() -> None:
    x, weight, bias = reals(0, 30, 12)
    pre = all_pre(x, weight, bias)
    bound = batch_threshold(x, weight, bias, 3)
    assert (pre >= bound - 1e-12).sum() == 90
    assert batch_threshold(x, weight, bias - 100, 3) == 0


@pytest.mark.parametrize("select", ["top_k", "above", "top_of_batch"])
def test_selections_carry_no_gradient(select: str) -> None:
    x, weight, bias = (each.requires_grad_() for each in reals(0, 6, 8))
    _, values = {
        "top_k": lambda: top_k(x, weight, bias, 2),
        "above": lambda: above(x, weight, bias, torch.zeros(())),
        "top_of_batch": lambda: top_of_batch(x, weight, bias, 2),
    }[select]()
    assert not values.requires_grad
