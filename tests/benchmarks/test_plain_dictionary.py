import pytest
import torch
from captured import Captured, SitePlace
from plain_dictionary import PlainDictionary, cross_entropy, explained, spliced
from transformers import LlamaConfig, LlamaForCausalLM

from hagd.models.language_model import LanguageModel


def dictionary(d: int, m: int, k: int, *, skip: bool) -> PlainDictionary:
    g = torch.Generator().manual_seed(0)
    shapes = ((m, d), (m,), (m, d), (d,), (d, d))
    W_enc, b_enc, W_dec, b_dec, W_skip = (torch.randn(shape, generator=g) for shape in shapes)
    return PlainDictionary(W_enc, b_enc, W_dec, b_dec, W_skip if skip else None, k)


@pytest.mark.parametrize("skip", [False, True])
def test_figures_equal_the_dense_definition(skip):
    n, k = 5000, 7  # more than one chunk
    plain = dictionary(6, 40, k, skip=skip)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 6, generator=g), torch.randn(n, 6, generator=g) + 3
    pre = x.double() @ plain.W_enc.double().T + plain.b_enc.double()
    kth = pre.sort(dim=1, descending=True).values[:, k - 1 : k]
    f = torch.where(pre >= kth, pre, 0.0).clamp(min=0)
    recon = f @ plain.W_dec.double() + plain.b_dec.double()
    if plain.W_skip is not None:
        recon += x.double() @ plain.W_skip.double().T
    found = explained(plain, Captured(x, y, 0.0, 0.0))
    fvu = float((y - recon).square().sum() / (y - y.mean(0)).square().sum())
    assert found.fvu == pytest.approx(fvu, rel=1e-5)
    assert found.l0 == pytest.approx(float((f > 0).sum() / n), rel=1e-6)
    assert found.dead == pytest.approx(float(((f > 0).sum(0) == 0).float().mean()), abs=1e-6)


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    return LanguageModel(LlamaForCausalLM(config))


@pytest.mark.parametrize("site", ["mlp", "resid"])
def test_splicing_replaces_ordinary_tokens_only(lm, site):
    tokens = torch.randint(50, (10, 12), generator=torch.Generator().manual_seed(0))
    clean = cross_entropy(lm, tokens)
    place, anything = SitePlace(site, 1), torch.zeros(0)
    with spliced(lm, place, Captured(anything, anything, 0.0, 0.0), torch.zeros_like):
        assert torch.equal(cross_entropy(lm, tokens), clean)  # every token counts as massive
    unlimited = Captured(anything, anything, float("inf"), float("inf"))
    with spliced(lm, place, unlimited, torch.zeros_like):
        assert not torch.allclose(cross_entropy(lm, tokens), clean, rtol=1e-3)
    exact = lm.mlp(1).forward if site == "mlp" else torch.clone  # past the hook
    with spliced(lm, place, unlimited, exact):
        torch.testing.assert_close(cross_entropy(lm, tokens), clean, rtol=1e-5, atol=1e-6)
    assert torch.equal(cross_entropy(lm, tokens), clean)


@pytest.mark.parametrize("scored", [1, 11])
def test_cross_entropy_is_that_of_the_whole_forward_pass(lm, scored):
    tokens = torch.randint(50, (10, 12), generator=torch.Generator().manual_seed(0))
    log_p = lm.model(tokens).logits.double().log_softmax(-1)
    expected = [[-float(log_p[n, t - 1, tokens[n, t]]) for t in range(scored, 12)] for n in range(10)]
    torch.testing.assert_close(cross_entropy(lm, tokens, scored), torch.tensor(expected), rtol=1e-5, atol=1e-5)
