"""Features ranked in eight bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hagd.transcoders.sparse import selection
from hagd.transcoders.sparse.chunks import by_chunks
from hagd.transcoders.sparse.selection import top_k
from hagd.transcoders.sparse.support import Support

K = 32


def case(seed: int = 0, n_tokens: int = 400, m: int = 512, d: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.nn.functional.normalize(torch.randn(m, d, generator=g), dim=1)
    return torch.randn(n_tokens, d, generator=g), weight, 0.3 * torch.randn(m, generator=g)


def in_eight_bits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat(list(by_chunks(x, weight, bias, torch.int8, Tensor.clone)))


def right(x: Tensor, weight: Tensor, bias: Tensor, by: str) -> float:
    """Share of the pairs of the exact top k that are found."""
    exact = (x.double() @ weight.double().T + bias).topk(K).indices
    support, _ = top_k(x, weight, bias, K, by)  # type: ignore[arg-type]
    found = torch.zeros(len(x), len(weight), dtype=torch.bool)
    found[support.token, support.index] = True
    return float(found.gather(1, exact).float().mean())


def test_the_product_is_off_by_what_rounding_takes() -> None:
    """Units are a 127th of a row's largest entry, and what is rounded off is evenly spread over one."""
    x, weight, bias = case()
    error = in_eight_bits(x, weight, bias) - (x.double() @ weight.double().T + bias)
    units = [rows.abs().amax(1).square().mean() / 127**2 / 12 for rows in (x, weight)]
    expected = (units[0] * weight.square().sum(1).mean() + units[1] * x.square().sum(1).mean()).sqrt()
    assert error.std() == pytest.approx(float(expected), rel=0.1)
    assert error.mean().abs() < 0.05 * error.std()


def test_whole_numbers_are_exact() -> None:
    """Where a row's largest is 127 and columns are as large in both, nothing is rounded."""
    g = torch.Generator().manual_seed(0)
    signs = [torch.randint(0, 2, shape, generator=g) * 2.0 - 1 for shape in ((20, 16), (48, 16))]
    bias = torch.randn(48, generator=g)
    torch.testing.assert_close(in_eight_bits(*signs, bias), signs[0] @ signs[1].T + bias)


def test_a_quarter_more_and_full_precision_find_what_bfloat16_alone_misses() -> None:
    x, weight, bias = case()
    assert right(x, weight, bias, "int8") > 0.9999 > 0.999 > right(x, weight, bias, "bfloat16")
    pre = x @ weight.T + bias
    support, values = top_k(x, weight, bias, K, "int8")
    torch.testing.assert_close(values, pre[support.token, support.index])
    assert values.dtype == torch.float32 and len(values) == K * len(x)


def test_columns_of_very_different_sizes_are_evened() -> None:
    x, weight, bias = case()
    columns = torch.logspace(-2, 2, x.shape[1])
    assert right(x * columns, weight / columns, bias, "int8") > 0.9999


def test_a_column_that_few_tokens_use_is_not_all_that_is_left_of_them() -> None:
    x, weight, bias = case(n_tokens=2048)
    x[:, 5] = 0
    x[[3, 7], 5] = 1
    assert right(x[:64], weight, bias, "int8") > 0.999  # among 64 tokens, and among all
    exact = (x.double() @ weight.double().T + bias)[[3, 7]].topk(K).indices
    support, _ = top_k(x, weight, bias, K, "int8")
    for place, token in enumerate((3, 7)):
        found = support.index[token * K : (token + 1) * K].tolist()
        assert len(set(found) & set(exact[place].tolist())) >= K - 1


@pytest.mark.parametrize(("k", "expected"), [(4, 20), (64, 80), (200, 250), (500, 512)])
def test_a_quarter_more_are_looked_at_and_at_least_sixteen(
    k: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[int] = []
    plain = selection.gather_dot

    def looking(x: Tensor, support: Support, *rest: Tensor) -> Tensor:
        looked_at.append(len(support.index) // len(x))
        return plain(x, support, *rest)

    monkeypatch.setattr(selection, "gather_dot", looking)
    top_k(*case(n_tokens=3), k, "int8")
    assert looked_at == [expected]


def test_a_gpu_gets_sizes_that_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 16 rows, and multiples of eight."""
    product, shapes = torch._int_mm, []

    def noting(a: Tensor, b: Tensor) -> Tensor:
        shapes.append((*a.shape, *b.shape))
        return product(a, b)

    monkeypatch.setattr(torch, "_int_mm", noting)
    x, weight, bias = case(n_tokens=3, m=50, d=13)
    pre = in_eight_bits(x, weight, bias)
    assert shapes == [(17, 16, 16, 56)]
    torch.testing.assert_close(pre, x @ weight.T + bias, atol=0.1, rtol=0)


def test_tokens_and_features_of_nothing() -> None:
    x, weight, bias = case()
    x[3], weight[5], bias[5] = 0, 0, -9
    assert right(x, weight, bias, "int8") > 0.9999
    x[:], bias[:] = 0, torch.arange(len(bias))
    assert right(x, weight, bias, "int8") == 1


def test_nan_is_left_to_be_found() -> None:
    for place in range(2):
        operands = case()
        operands[place][7, 2] = torch.nan
        _, values = top_k(*operands, K, "int8")
        assert values.isnan().any()


def test_fewer_features_than_would_be_looked_at() -> None:
    x, weight, bias = case(m=40)
    assert right(x, weight, bias, "int8") == 1
    assert len(top_k(x[:1], weight, bias, 40, "int8")[1]) == 40


def test_double_precision_stays_it() -> None:
    operands = [each.double() for each in case()]
    support, values = top_k(operands[0], operands[1], operands[2], K, "int8")
    pre = operands[0] @ operands[1].T + operands[2]
    torch.testing.assert_close(values, pre[support.token, support.index], rtol=1e-12, atol=1e-12)
