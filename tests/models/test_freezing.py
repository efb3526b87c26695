"""The frozen linear model against one that is wired by hand around cached patterns and scales."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hagd.models import freezing
from hagd.models.freezing import frozen_linear
from hagd.models.language_model import LanguageModel
from tests.builders import VOCABULARY, random_model, randomise
from tests.reference import Frozen, run

TOKENS = torch.randint(VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(0))


def llama_family(name: str, **options: Any) -> LanguageModel:
    import transformers

    options |= {"head_dim": 4} if name in ("Gemma", "Qwen3") else {}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **{"attn_implementation": "eager", **options},
    )
    lm = LanguageModel(getattr(transformers, f"{name}ForCausalLM")(config))
    randomise(lm)
    lm.model.to(torch.float64)
    return lm


MODELS: dict[str, Callable[[], LanguageModel]] = {
    "gpt2": lambda: random_model("gpt2", length=5, dtype=torch.float64),
    "gpt_neox": lambda: random_model("gpt_neox", length=5, dtype=torch.float64),
    "llama": lambda: random_model("llama", length=5, dtype=torch.float64),
    **{name.lower(): lambda name=name: llama_family(name) for name in ("Gemma", "Mistral", "Qwen2", "Qwen3")},
}


@pytest.fixture(scope="module", params=list(MODELS))
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return MODELS[request.param]()


def test_forward_values_do_not_change(lm: LanguageModel) -> None:
    with torch.no_grad():
        clean = lm.model(TOKENS).logits
        with frozen_linear(lm):
            frozen = lm.model(TOKENS).logits
        torch.testing.assert_close(frozen, clean, rtol=1e-5, atol=1e-5)
        assert torch.equal(lm.model(TOKENS).logits, clean), "the model behaves as before afterwards"
        torch.testing.assert_close(Frozen(lm, TOKENS)().logits, clean, rtol=1e-5, atol=1e-5)


MIXED = {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("name", "options"), [("Mistral", {}), ("Qwen2", MIXED), ("Qwen3", MIXED)], ids=["Mistral", "Qwen2", "Qwen3"]
)
def test_a_window_shorter_than_the_prompt_is_kept(name: str, options: dict[str, Any], attention: str) -> None:
    lm = llama_family(name, sliding_window=2, attn_implementation=attention, **options)
    everything = llama_family(name, sliding_window=99, attn_implementation=attention, **options)
    with torch.no_grad():
        clean = lm.model(TOKENS).logits
        assert (everything.model(TOKENS).logits - clean).abs().max() > 0.1, "the window matters here"
        with frozen_linear(lm):
            torch.testing.assert_close(lm.model(TOKENS).logits, clean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_norms_in_half_precision_are_as_exact_as_their_last_rounding(name: str) -> None:
    lm = MODELS[name]()
    x = torch.randn(8, 5, lm.d_model, generator=torch.Generator().manual_seed(0)).bfloat16()
    lm.model.bfloat16()
    with torch.no_grad(), frozen_linear(lm):
        found = [norm(x).double() for norm in lm.norms()]
    lm.model.double()
    for norm, value in zip(lm.norms(), found, strict=True):
        expected = norm(x.double())
        assert ((value - expected).abs() <= expected.abs() * 2.0**-8 + 1e-6).all()


def test_scores_in_half_precision_are_not_rounded() -> None:
    """They are large here, so that rounding them would change the pattern by several percent."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (3 * torch.randn(1, 2, 6, 8, generator=g).bfloat16() for _ in range(3))
    (_, found), (_, expected) = (
        freezing._attention_with_constant_pattern(nn.Identity(), *(x.to(dtype) for x in (q, k, v)), None)
        for dtype in (torch.bfloat16, torch.float64)
    )
    assert ((found.double() - expected).abs() <= expected * 2.0**-8 + 1e-4).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_is_given_back_as_it_was_also_after_an_error(attention: str) -> None:
    lm = random_model()
    lm.model.config._attn_implementation = attention
    with pytest.raises(KeyError), frozen_linear(lm):
        assert lm.model.config._attn_implementation != attention
        raise KeyError
    assert lm.model.config._attn_implementation == attention
    assert not any(module._forward_hooks for module in lm.model.modules())


def gradient_at_embedding(lm: LanguageModel, weights: Tensor) -> Tensor:
    """Of `(weights · logits)`, through everything but the MLPs, whose outputs are constants."""
    leaves: list[Tensor] = []

    def leaf(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[0]

    def constant(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output.detach()

    with ExitStack() as stack:
        stack.enter_context(frozen_linear(lm))
        stack.callback(lm.embedding.register_forward_hook(leaf).remove)
        for layer in range(lm.n_layers):
            stack.callback(lm.mlp(layer).register_forward_hook(constant).remove)
        output = (lm.model(TOKENS).logits * weights).sum()
    (gradient,) = torch.autograd.grad(output, leaves)
    return gradient


def test_gradients_are_the_finite_changes_of_the_linear_model(lm: LanguageModel) -> None:
    """A perturbation as large as the embedding itself: what is not linear would show."""
    g = torch.Generator().manual_seed(1)
    shape = (*TOKENS.shape, lm.d_model)
    weights = torch.randn(*TOKENS.shape, VOCABULARY, generator=g, dtype=torch.float64)
    frozen = Frozen(lm, TOKENS)
    gradient = gradient_at_embedding(lm, weights)
    a, b = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))

    def f(nudge: Tensor) -> Tensor:
        return frozen(nudge=nudge).logits

    nothing = torch.zeros(shape, dtype=torch.float64)
    torch.testing.assert_close(f(a) + f(b) - f(nothing) - f(a + b), torch.zeros_like(f(a)), rtol=0, atol=1e-9)
    for nudge in (a, b, 10 * a):
        change = ((f(nudge) - f(nothing)) * weights).sum()
        assert change.abs() > 1e-2
        torch.testing.assert_close((gradient * nudge).sum(), change, rtol=1e-5, atol=1e-5)


def test_without_freezing_the_model_is_not_linear(lm: LanguageModel) -> None:
    """The test above can fail: patterns and scales do matter here."""
    g = torch.Generator().manual_seed(1)
    a = torch.randn(*TOKENS.shape, lm.d_model, generator=g, dtype=torch.float64)
    outputs = run(lm, TOKENS).mlp_out

    def f(nudge: Tensor) -> Tensor:
        return run(lm, TOKENS, lambda layer, read, written: outputs[layer], nudge=nudge).logits

    assert (f(a) + f(-a) - 2 * f(torch.zeros_like(a))).abs().max() > 1e-2
