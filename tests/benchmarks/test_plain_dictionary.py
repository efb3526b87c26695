import pytest
import torch
from plain_dictionary import PlainDictionary, cross_entropy, explained, spliced
from smollm2_activations import Captured, SitePlace
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
    logits = lm.model(tokens).logits[:, :-1]
    assert clean == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())), rel=1e-5
    )
    place, anything = SitePlace(site, 1), torch.zeros(0)
    with spliced(lm, place, Captured(anything, anything, 0.0, 0.0), torch.zeros_like):
        assert cross_entropy(lm, tokens) == clean  # every token counts as massive
    unlimited = Captured(anything, anything, float("inf"), float("inf"))
    with spliced(lm, place, unlimited, torch.zeros_like):
        assert cross_entropy(lm, tokens) != clean
    exact = lm.mlp(1).forward if site == "mlp" else torch.clone  # past the hook
    with spliced(lm, place, unlimited, exact):
        assert cross_entropy(lm, tokens) == pytest.approx(clean, rel=1e-6)
    assert cross_entropy(lm, tokens) == clean
