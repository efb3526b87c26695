"""A stage for which there is not enough memory ends with one line that names the keys that make it smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hagd.errors import OutOfMemoryError
from hagd.models.out_of_memory import is_out_of_memory
from hagd.pipeline.memory_limit import SMALLER_SEARCH

_ADVICE = {
    "lm": "lower task.training.batch_size or model.d_model",
    "prompts": "choose a smaller model or shorter prompts",
    "transcoders": "lower transcoder.batch_size, transcoder.expansion or transcoder.activations.memory_mb",
    "graph": "lower graph.edge_prompts, graph.batch_size or transcoder.expansion",
    "search": f"lower {SMALLER_SEARCH}",
    "validation": "lower validation.batch_size",
    "report": "lower report.effect_prompts",
    "shift": "lower validation.batch_size",
    "dark_matter": "lower validation.batch_size",
    "prompt_graph": "lower graph.max_features, or set graph.memory_limit_mb, with which its memory is computed first",
}
"""What makes a stage smaller; of others, `_OTHERS` does."""

_OTHERS = "lower graph.batch_size or transcoder.expansion"


@contextmanager
def explained_when_out_of_memory(stage: str) -> Iterator[None]:
    """Within, an allocation that fails is an `OutOfMemoryError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OutOfMemoryError(
            f"{stage}: expected enough memory, found none left ({said}); {_ADVICE.get(stage, _OTHERS)}, or take a "
            "machine with more"
        ) from error
