from __future__ import annotations

import io
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from rich.console import Console
from torch import Tensor

from hagd.config.run import TrainerConfig
from hagd.errors import ConfigError, NumericalError
from hagd.training import progress
from hagd.training.fit import fit
from hagd.training.loader import StepLoader
from hagd.training.loss_watch import BY_PART
from tests.training.toy import Toy, toy_loader, train

N_STEPS = 40
TOY = Path(__file__).with_name("toy.py")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights of a training that nothing interrupted."""
    return train(tmp_path_factory.mktemp("reference"), N_STEPS).state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


class Crash(Toy):
    """Fails within step `at`, after its batch was drawn."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: tuple[int, Tensor], batch_idx: int) -> dict[str, Tensor]:
        if batch[0] == self.at:
            raise RuntimeError("power cut")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("at", [3, 7, 20, 39])
def test_a_crash_within_any_step_resumes_bit_for_bit(tmp_path: Path, reference: dict[str, Tensor], at: int) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "c", N_STEPS, Crash(at))
    resumed = train(tmp_path / "c", N_STEPS)
    assert resumed.seen == list(range(at - at % 7, N_STEPS))
    assert same(resumed.state_dict(), reference)


def test_it_resumes_again_and_again(tmp_path: Path, reference: dict[str, Tensor]) -> None:
    for at in (9, 16, 30):
        with pytest.raises(RuntimeError, match="power cut"):
            train(tmp_path / "c", N_STEPS, Crash(at))
    assert same(train(tmp_path / "c", N_STEPS).state_dict(), reference)


def test_the_precision_of_products_is_that_of_the_training_alone(tmp_path: Path) -> None:
    class Precise(Toy):
        def training_step(self, batch: tuple[int, Tensor], batch_idx: int) -> dict[str, Tensor]:
            found.append(torch.get_float32_matmul_precision())
            return super().training_step(batch, batch_idx)

    found: list[str] = []
    before = torch.get_float32_matmul_precision()
    fit(Precise(), toy_loader(2), TrainerConfig(matmul_precision="high"), 2, tmp_path)
    assert found == ["high"] * 2 and torch.get_float32_matmul_precision() == before == "highest"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_killed_process_resumes_bit_for_bit(
    tmp_path: Path, reference: dict[str, Tensor], how: signal.Signals, code: int
) -> None:
    folder = tmp_path / "c"
    env = os.environ | {"PYTHONPATH": str(TOY.parents[2])}
    process = subprocess.Popen([sys.executable, str(TOY), str(folder), str(N_STEPS), "0.1"], env=env)
    deadline = time.monotonic() + 120
    while not (folder / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.25)
    process.send_signal(how)
    assert process.wait(timeout=60) == code
    resumed = train(folder, N_STEPS)
    assert 7 <= resumed.seen[0] < N_STEPS and resumed.seen == list(range(resumed.seen[0], N_STEPS))
    assert same(resumed.state_dict(), reference)


@pytest.mark.parametrize("raises", [False, True], ids=["default handler", "handler that raises"])
def test_a_signal_saves_at_once(tmp_path: Path, reference: dict[str, Tensor], raises: bool) -> None:
    class Signalled(Toy):
        def training_step(self, batch: tuple[int, Tensor], batch_idx: int) -> dict[str, Tensor]:
            if batch[0] == 10:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    def leave(*_: Any) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, leave if raises else signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / "c", N_STEPS, Signalled())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 143
    resumed = train(tmp_path / "c", N_STEPS)
    assert resumed.seen[0] == 11
    assert same(resumed.state_dict(), reference)


def test_a_finished_training_leaves_nothing_behind(tmp_path: Path) -> None:
    train(tmp_path / "c", 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "text", "other model"])
def test_a_damaged_checkpoint_starts_over(
    tmp_path: Path, reference: dict[str, Tensor], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "c", N_STEPS, Crash(20))
    last = tmp_path / "c" / "last.ckpt"
    match damage:
        case "truncated":
            last.write_bytes(last.read_bytes()[:2000])
        case "text":
            last.write_text("not a checkpoint")
        case _:
            torch.save({"state_dict": {"net.0.weight": torch.zeros(3, 3)}}, last)
    resumed = train(tmp_path / "c", N_STEPS)
    assert "training starts from the beginning" in caplog.text
    assert resumed.seen[0] == 0
    assert same(resumed.state_dict(), reference)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path: Path, value: float) -> None:
    class Diverges(Toy):
        def training_step(self, batch: tuple[int, Tensor], batch_idx: int) -> dict[str, Tensor]:
            result = super().training_step(batch, batch_idx)
            return result | {"loss": result["loss"] * (value if batch[0] >= 13 else 1)}

    message = (
        r"transcoder: the loss is not finite at step 14 of 40; the last good checkpoint is .*last\.ckpt \(step 7\); "
    )
    with pytest.raises(NumericalError, match=message):
        train(tmp_path / "c", N_STEPS, Diverges(), stage="transcoder")
    assert train(tmp_path / "c", N_STEPS).seen[0] == 7


class Parts(Toy):
    """Two parts, of which one explodes from a step on, finite and without the whole following."""

    parts = ("layer 4", "layer 9")

    def __init__(self, at: int, value: float) -> None:
        super().__init__()
        self.at, self.value = at, value

    def training_step(self, batch: tuple[int, Tensor], batch_idx: int) -> dict[str, Tensor]:
        bad = self.value if batch[0] >= self.at else 0.5
        return super().training_step(batch, batch_idx) | {BY_PART: torch.tensor([0.5, bad])}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (math.nan, "the loss of layer 9 is not finite at step 6 of 40; there is no checkpoint yet"),
        (1e6, r"the loss of layer 9 has diverged to 1e\+06 at step 25 of 40; there is no checkpoint yet"),
    ],
)
def test_the_part_that_fails_is_named(tmp_path: Path, value: float, says: str) -> None:
    with pytest.raises(NumericalError, match=f"transcoder: {says}; lower the stage's learning_rate$"):
        train(tmp_path / "c", N_STEPS, Parts(5, value), stage="transcoder")


def test_a_loss_that_fails_in_low_precision_advises_the_full_one(tmp_path: Path) -> None:
    trainer = TrainerConfig(precision="bf16-mixed")
    with pytest.raises(NumericalError, match=r"or set trainer\.precision=32-true$"):
        fit(Parts(0, math.nan), toy_loader(2), trainer, 2, tmp_path)


def test_nothing_is_saved_while_a_part_is_above_its_limit(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"step 29 of 40; the last good checkpoint is .* \(step 7\)"):
        train(tmp_path / "c", N_STEPS, Parts(9, 1e6))  # checkpoints are due at steps 14, 21 and 28


def test_a_loss_that_comes_back_goes_on(tmp_path: Path) -> None:
    class Spike(Toy):
        def training_step(self, batch: tuple[int, Tensor], batch_idx: int) -> dict[str, Tensor]:
            result = super().training_step(batch, batch_idx)
            return result | {"loss": result["loss"] * (1e6 if batch[0] % 20 else 1)}

    assert train(tmp_path / "c", N_STEPS, Spike()).seen == list(range(N_STEPS))


def test_the_random_state_outside_is_untouched(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(tmp_path / "c", 5)
    assert torch.equal(torch.rand(3), expected)


def test_gradient_clipping_changes_the_result(tmp_path: Path) -> None:
    free = train(tmp_path / "a", 5).state_dict()
    clipped = train(tmp_path / "b", 5, gradient_clip=1e-12).state_dict()
    assert not same(free, clipped)


def test_loggers_receive_every_metric(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    train(tmp_path / "c", 60, loggers=[logger], stage="toy")
    logger.save()
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert set(header.split(",")) == {"step", "toy/loss", "toy/size", "toy/memory_mb"}
    assert len(rows) == 2


def test_without_terminal_the_last_step_is_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hagd"):
        train(tmp_path / "c", 9, metrics=("loss", "size"), stage="toy")
    (line,) = [record.getMessage() for record in caplog.records if "step 9 of 9" in record.getMessage()]
    assert line.startswith("toy: ") and "loss " in line and "size " in line


def test_time_left_goes_on_beyond_a_day(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class QuarterHours(Crash):
        def training_step(self, batch: tuple[int, Tensor], batch_idx: int) -> dict[str, Tensor]:
            clock.now += 900
            return super().training_step(batch, batch_idx)

    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    with caplog.at_level(logging.INFO, logger="hagd"), pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "c", 202, QuarterHours(1))
    assert "step 1 of 202, 0.0/s, 50:15:00 left" in caplog.text


def test_on_a_terminal_there_is_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()

    def terminal(**_: Any) -> Console:
        return Console(file=screen, force_terminal=True, width=120)

    monkeypatch.setattr(progress, "Console", terminal)
    train(tmp_path / "c", 9, stage="toy")
    assert "9/9" in screen.getvalue() and "loss" in screen.getvalue()


def test_nothing_is_said_by_lightning(tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: Any) -> None:
    with caplog.at_level(logging.INFO):
        train(tmp_path / "c", 5)
    assert [record.name for record in caplog.records] == ["hagd.training.progress"]
    assert [str(warning.message) for warning in recwarn.list] == []


def test_ctrl_c_is_a_keyboard_interrupt_and_resumes(tmp_path: Path, reference: dict[str, Tensor]) -> None:
    class Interrupted(Toy):
        def training_step(self, batch: tuple[int, Tensor], batch_idx: int) -> dict[str, Tensor]:
            if batch[0] == 10:
                os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(batch, batch_idx)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "c", N_STEPS, Interrupted())
    assert signal.getsignal(signal.SIGINT) is handler  # a second Ctrl-C still works
    resumed = train(tmp_path / "c", N_STEPS)
    assert resumed.seen[0] == 7
    assert same(resumed.state_dict(), reference)


@pytest.mark.parametrize("change", [{"accelerator": "abacus"}, {"strategy": "hope"}, {"accelerator": "gpu"}])
def test_a_machine_that_cannot_do_it(tmp_path: Path, change: dict[str, str]) -> None:
    if change == {"accelerator": "gpu"} and torch.cuda.is_available():
        pytest.skip("needs a machine without GPU")
    with pytest.raises(ConfigError, match=rf"trainer: expected .*{next(iter(change.values()))}.*choose trainer=cpu"):
        fit(Toy(), StepLoader(lambda step: (step, torch.zeros(1)), 1), TrainerConfig(**change), 1, tmp_path / "c")
