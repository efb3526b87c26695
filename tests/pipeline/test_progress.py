"""Rates and time left are those of the part that runs, also where there is no terminal."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from hagd.pipeline import progress as module
from hagd.pipeline.progress import StageProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def test_a_part_has_its_own_rate(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with StageProgress("search", Console(file=io.StringIO())) as progress:
        for done in range(1, 41):
            clock.now += 1
            progress.part("gates", done, 40)
        for done in range(1, 4):
            clock.now += 20
            progress.part("pruning", done, 4)
    assert "gates: 16 of 40, 1.0/s, 24 s left" in caplog.text
    assert "pruning: 1 of 4, 20.0 s each, 60 s left" in caplog.text
    assert "pruning: 3 of 4, 20.0 s each, 20 s left" in caplog.text


def test_a_line_every_quarter_of_a_minute_at_most(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with StageProgress("means", Console(file=io.StringIO())) as progress:
        for done in range(1, 601):
            clock.now += 0.1
            progress(done, 600)
    assert 3 <= len(caplog.records) <= 4 and all(record.message.startswith("means: ") for record in caplog.records)


def test_a_terminal_has_a_bar(clock: Clock) -> None:
    shown = io.StringIO()
    with StageProgress("means", Console(file=shown, force_terminal=True, width=100)) as progress:
        clock.now += 8
        progress(2, 6)
        progress.end()
    assert "2/6" in shown.getvalue() and "4.0 s each" in shown.getvalue()
