"""A search that holds more memory than it may is stopped, and says how much it held."""

from __future__ import annotations

from collections.abc import Callable

from hagd.artifacts.manifest import peak_rss_mb
from hagd.errors import MemoryLimitError

SMALLER_SEARCH = "graph.batch_size, search.gate_batch or graph.n_max"
"""Keys that decide what a search holds."""

Report = Callable[[str, int, int], None]


def within(limit_mb: int | None, report: Report) -> Report:
    """`report`, which a search calls after every step, with a look at the memory."""
    if limit_mb is None:
        return report

    def checked(part: str, done: int, total: int) -> None:
        report(part, done, total)
        refuse_beyond(limit_mb)

    return checked


def refuse_beyond(limit_mb: int | None) -> None:
    """Compare the peak of this stage's resident memory with the limit.

    Raises:
        MemoryLimitError: it was larger.
    """
    if limit_mb is None:
        return
    peak = peak_rss_mb()
    if peak > limit_mb:
        raise MemoryLimitError(
            f"search.memory_limit_mb: expected a search of at most {limit_mb} MB, found {peak:.0f} MB; raise it, or "
            f"lower {SMALLER_SEARCH}",
            peak,
            limit_mb,
        )
