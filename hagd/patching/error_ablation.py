"""The model without the errors of some dictionaries, everything else running as it is.

Shape legend: N prompts, C options, A scored positions, V vocabulary, T positions, d = d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from hagd.activations.capture import site_module
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import Prompts


def logits_without_errors(patched: PatchedModel, prompts: Prompts, layers: Collection[int], *, zero: bool) -> Tensor:
    """Logits `[N, C, A, V]` at the scored positions with all features kept and errors ablated: `y ← y − ε + ε̃`.

    Features are computed on this run. So are the errors of the layers that are not ablated, from what reaches them.

    Args:
        patched: the model, its dictionaries and the mean errors by slot.
        prompts: N prompts.
        layers: those whose errors are ablated.
        zero: `ε̃` is zero instead of its mean in the slot.
    """
    n, c = prompts.tokens.shape[:2]
    tokens, slots, scored = (each.flatten(0, 1) for each in (prompts.tokens, prompts.slots, prompts.scored))
    features: list[Tensor] = []
    with ExitStack() as stack:
        for index, layer in enumerate(patched.transcoders.layers):
            mean = patched.means.errors[index][slots.clamp(min=0)]
            instead = None if layer not in layers else mean.new_zeros(()) if zero else mean
            module = site_module(patched.lm, patched.transcoders.site, layer)
            stack.callback(module.register_forward_hook(_hook(patched, index, features, instead)).remove)
        logits = patched.lm.logits_at(tokens, scored)
    patched.evaluations += n
    return logits.unflatten(0, (n, c))


def _hook(patched: PatchedModel, index: int, features: list[Tensor], instead: Tensor | None) -> Callable[..., Any]:
    """`features` collects those of one forward pass; with `instead` None the layer is left alone."""
    transcoders = patched.transcoders

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        y = output if isinstance(output, Tensor) else output[0]
        x = (inputs[0] if transcoders.site == "mlp" else y).to(patched.lm.device)
        features[index:] = [transcoders.transcoders[index].encode(x)]
        if instead is None:
            return output
        replaced = (transcoders.reconstruct(index, features, x) + instead).to(y.device, y.dtype)
        return replaced if isinstance(output, Tensor) else (replaced, *output[1:])

    return hook
