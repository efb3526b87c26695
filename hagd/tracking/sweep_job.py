"""A job as one of a sweep's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SweepJob:
    """What the W&B run of a job in a sweep is called by.

    Attributes:
        sweep: name of the sweep; the group of its runs.
        swept: what the job has of the keys that the sweep varies, `key=value`.
    """

    sweep: str
    swept: tuple[str, ...] = ()

    def name(self, of_job: str) -> str:
        """`of_job`, which tells model and seed, and the other keys that vary."""
        others = (part for part in self.swept if part.partition("=")[0] not in ("model", "seed"))
        return " ".join((of_job, *others))
