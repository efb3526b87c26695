"""The compiled sums against dense products in double precision, and the same bits from any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hagd.config.transcoder import TranscoderConfig
from hagd.transcoders.objective import StackedTranscoders
from hagd.transcoders.sparse import cpu_products, device_kernels, products
from hagd.transcoders.sparse.cpu_library import library
from hagd.transcoders.sparse.products import decode, gather_dot, squared_error, sum_by_feature, weighted_total
from hagd.transcoders.sparse.support import Support
from tests.transcoders.test_products import EVERY_PATTERN, PAIRS, random_pairs

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

WIDTHS = (1, 15, 16, 130)
"""Less and more than a vector and than a slab of columns, or a whole one."""


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices too."""
    monkeypatch.setattr(device_kernels, "_LARGE", 1)


def pairs(pattern: str, seed: int = 0) -> tuple[Support, Tensor, Tensor]:
    """A support, values `[n]` in float32, and both as a dense float64 matrix `[B, m]`."""
    support, values, dense = random_pairs(seed, *PAIRS[pattern])
    return support, values.float(), dense.float().double()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_is(found: Tensor, exact: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@EVERY_PATTERN
@pytest.mark.parametrize("d", WIDTHS)
def test_products_are_those_of_dense_matrices(threads: int, pattern: str, d: int) -> None:
    support, values, dense = pairs(pattern)
    a, weight, bias = normal(1, support.n_tokens, d), normal(2, support.m, d), normal(3, support.m)
    assert products.product_kernels(support.m, values, weight) is cpu_products
    assert_is(decode(values, support, weight), dense @ weight.double())
    assert_is(sum_by_feature(values, support, a), dense.T @ a.double())
    pre = a.double() @ weight.double().T + bias
    assert_is(gather_dot(a, support, weight, bias), pre[support.token, support.index])


@EVERY_PATTERN
@pytest.mark.parametrize("d", WIDTHS)
def test_squared_error_and_its_gradients_are_those_of_dense_products(threads: int, pattern: str, d: int) -> None:
    support, values, dense = pairs(pattern)
    weight, bias, target = normal(2, support.m, d), normal(3, d), normal(4, support.n_tokens, d)
    given = [each.requires_grad_() for each in (values, weight, bias)]
    squared, lengths, error = squared_error(values, support, weight, bias, target)
    (3 * squared + lengths.sum()).backward()

    dense_values, W, b = (each.double().requires_grad_() for each in (dense, weight.detach(), bias.detach()))
    miss = dense_values @ W + b - target
    (3 * miss.square().sum() + W.norm(dim=1).sum()).backward()
    assert_is(error, miss.detach())
    assert_is(squared.detach()[None], miss.square().sum().detach()[None])
    expected = (dense_values.grad[support.token, support.index], W.grad, b.grad)  # type: ignore[index]
    for found, exact in zip(given, expected, strict=True):
        torch.testing.assert_close(found.grad.double(), exact, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]


@EVERY_PATTERN
def test_totals_and_their_gradients_are_those_of_dense_products(pattern: str) -> None:
    support, values, dense = pairs(pattern)
    by_feature = normal(5, support.m).requires_grad_()
    weighted_total(values.requires_grad_(), support, by_feature).backward()
    assert_is(by_feature.grad, dense.sum(0))  # type: ignore[arg-type]
    assert_is(values.grad, by_feature.detach().double()[support.index])  # type: ignore[arg-type]


def test_columns_of_another_matrix(threads: int) -> None:
    """Rows that are apart, and whose numbers are."""
    support, values, dense = pairs("some")
    wide, tall = normal(1, support.m, 40), normal(2, 24, support.n_tokens)
    assert_is(decode(values, support, wide[:, 3:27]), dense @ wide[:, 3:27].double())
    assert_is(sum_by_feature(values, support, tall.T), dense.T @ tall.T.double())
    expected = (tall.T.double() @ wide[:, 3:27].double().T)[support.token, support.index]
    assert_is(gather_dot(tall.T, support, wide[:, 3:27], torch.zeros(support.m)), expected)


def test_pairs_are_ordered_as_by_a_stable_sort() -> None:
    support, _, _ = random_pairs(0, 40, 30, 0.3)
    order, token, starts = support.by_feature
    assert order.tolist() == support.index.sort(stable=True).indices.tolist()
    assert token.tolist() == support.token[order].tolist()
    assert starts.tolist() == [int((support.index < j).sum()) for j in range(30)]


def test_bits_are_the_same_with_any_number_of_threads() -> None:
    """Tokens are so many that torch's own sums would take several threads, too."""
    n_tokens = 40_000
    index = torch.randint(90, (2 * n_tokens,), generator=torch.Generator().manual_seed(0))
    support = Support(index, torch.arange(0, 2 * n_tokens + 1, 2), 90)
    values, a, weight, bias = normal(0, 2 * n_tokens), normal(1, n_tokens, 20), normal(2, 90, 20), normal(3, 90)
    before = torch.get_num_threads()

    def all_sums(n_threads: int) -> list[Tensor]:
        torch.set_num_threads(n_threads)
        sums = decode(values, support, weight), sum_by_feature(values, support, a), gather_dot(a, support, weight, bias)
        return [*sums, *squared_error(values, support, weight, torch.zeros(20), a)]

    try:
        first = all_sums(1)
        for n_threads in (2, 3, 7):
            assert all(map(torch.equal, first, all_sums(n_threads)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_training_step_is_that_of_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without heads, so that decoder, error and the values' derivatives are one; targets may come in any precision."""
    x, y = normal(0, 1, 50, 24), normal(1, 1, 50, 24).to(dtype)

    def step() -> list[Tensor]:
        stacked = StackedTranscoders(TranscoderConfig(k=5, expansion=4, lambda_prediction=0.0), 1, 24, seed=0)
        losses = stacked.losses(x, y, 0)
        losses.total.backward()
        gradients = [parameter.grad for parameter in stacked.parameters() if parameter.grad is not None]
        return [losses.total.detach(), losses.fvu_by_layer, *gradients]

    fused = []
    plain = cpu_products.segment_errors
    monkeypatch.setattr(cpu_products, "segment_errors", lambda *given: (fused.append(1), plain(*given))[1])
    compiled = step()
    monkeypatch.setattr(device_kernels, "library", lambda: None)
    for found, expected in zip(compiled, step(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert fused == [1]


def test_what_does_not_belong_together_is_refused() -> None:
    support, values, _ = pairs("some")
    a, weight = normal(1, support.n_tokens, 8), normal(2, support.m, 8)
    for wrong in (
        lambda: decode(values[:-1], support, weight),
        lambda: gather_dot(a[:-1], support, weight, torch.zeros(support.m)),
        lambda: cpu_products.row_dots(a, support.index.int(), support.offsets, weight),
    ):
        with pytest.raises(AssertionError):
            wrong()


def test_pairs_that_are_apart_in_memory() -> None:
    support, values, dense = pairs("some")
    apart = [torch.stack([each, each + 1], dim=1)[:, 0] for each in (support.index, support.offsets)]
    weight = normal(2, support.m, 8)
    other = torch.stack([values, values + 1], dim=1)[:, 0]
    assert_is(decode(other, Support(apart[0], apart[1], support.m), weight), dense @ weight.double())


def test_what_is_small_or_not_in_float32_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert products.product_kernels(1024, torch.zeros(1)) is cpu_products
    assert products.product_kernels(1023, torch.zeros(1)) is None
    for dtype in (torch.float64, torch.bfloat16):
        assert products.product_kernels(1024, torch.zeros(1), torch.zeros(1, dtype=dtype)) is None
