"""Jobs under other launchers: ends of workers, requeueing, several processes a job."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from hagd.cli.paths import conf_dir
from tests.cli.jobs import command, environment, run_command, run_here, tiny_overrides
from tests.cli.test_interruption import overrides, results


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)
    return found


@contextmanager
def started(runs: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A sweep that is running; whatever it started is over after the block."""
    below: list[psutil.Process] = []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command("-m", *arguments), cwd=runs, env=environment(), text=True, **pipes) as sweep:
        try:
            yield sweep
        finally:
            if sweep.poll() is None:
                below = psutil.Process(sweep.pid).children(recursive=True)
                sweep.kill()
            for process in below:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def sweep_jobs(runs: Path) -> list[dict[str, Any]]:
    (sweep,) = (runs / "sweeps").iterdir()
    jobs: list[dict[str, Any]] = json.loads((sweep / "sweep.json").read_text())
    return jobs


def test_the_slurm_launcher_asks_for_a_process_a_device() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    chosen = [
        "hydra/launcher=slurm",
        "trainer=ddp",
        "trainer.devices=4",
        "trainer.num_nodes=2",
        "hydra.sweep.dir=sweep",
    ]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose("train", chosen, return_hydra_config=True)
    node = composed.hydra.launcher
    assert (node.nodes, node.tasks_per_node, node.gpus_per_node) == (2, 4, 4)
    assert node.max_num_timeout > 0 and node.signal_delay_s >= 120 and node.additional_parameters.requeue
    assert node._target_.endswith(".SlurmLauncher")


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_slurm_must_know_the_number_of_devices(
    tmp_path: Path, trainer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    chosen = ["hydra/launcher=slurm", f"trainer={trainer}", "seed=0,1", f"paths.runs={tmp_path}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"), pytest.raises(SystemExit) as stop:
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.multirun("train", lambda _: pytest.fail("ran"), chosen, with_log_configuration=False)
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "error: trainer.devices: expected a number under hydra/launcher=slurm, found auto; set trainer.devices=N\n"
    )


@pytest.mark.slow
def test_workers_of_a_killed_joblib_sweep_end_and_their_training_continues(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    chosen = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1", "task.training.steps=100000"]
    with started(tmp_path, *overrides(tmp_path), *chosen) as sweep:
        until(lambda: len(list((tmp_path / "artifacts" / "work").glob("lm-*/checkpoints/last.ckpt"))) == 2)
        workers = psutil.Process(sweep.pid).children(recursive=True)
        assert len(workers) >= 2
        sweep.kill()
        sweep.communicate()
        until(lambda: not any(worker.is_running() for worker in workers), 30)
    assert len(list((tmp_path / "artifacts" / "work").glob("lm-*/checkpoints/last.ckpt"))) == 2


@pytest.mark.slow
def test_submitit_requeues_a_job_after_a_checkpoint(tmp_path: Path) -> None:
    """The signal that SLURM sends before a time limit, here to a job of the local launcher."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    every = 1000
    settings = [*tiny_overrides(tmp_path), "task.training.steps=2500", f"trainer.checkpoint_every={every}"]
    with started(tmp_path, *settings, "hydra/launcher=submitit_local", "tracking=offline") as sweep:
        file = until(lambda: next((tmp_path / "artifacts" / "work").glob("lm-*/checkpoints/last.ckpt"), None))
        first = file.stat().st_mtime_ns
        task(sweep).send_signal(signal.SIGUSR2)
        until(lambda: file.stat().st_mtime_ns > first)
        assert torch.load(file, weights_only=True)["global_step"] % every, "saved at once, not when it was due"
        shown, errors = sweep.communicate(timeout=200)
    assert sweep.returncode == 0 and "1 of 1 jobs done" in shown, errors
    (folder,) = (tmp_path / "sweeps").iterdir()
    assert "Requeued job" in "".join(log.read_text() for log in folder.rglob("*_log.err"))
    assert "continues from" in (folder / "0" / "extract.log").read_text()
    plain = run_here(tmp_path / "plain", *settings, f"paths.runs={tmp_path / 'other'}")
    assert results(json.loads((folder / "0" / "metrics.json").read_text())) == results(plain)


def task(sweep: subprocess.Popen[str]) -> psutil.Process:
    """The process in which Submitit runs the only job."""
    children = psutil.Process(sweep.pid).children(recursive=True)
    (found,) = (child for child in children if "submitit.core._submit" in child.cmdline())
    return found


@pytest.mark.slow
def test_two_processes_share_every_training_of_a_sweep(tmp_path: Path) -> None:
    """Gloo on the CPU, started by Lightning within jobs of Submitit's local launcher."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    two = ["hydra/launcher=submitit_local", "trainer.devices=2", "trainer.strategy=ddp", "seed=0,1"]
    done = run_command(tmp_path, "-m", *tiny_overrides(tmp_path), "stage=transcoder", *two, entry="train.py")
    assert done.returncode == 0, done.stderr
    assert [job["status"] for job in sweep_jobs(tmp_path)] == ["done", "done"]
    assert len(list((tmp_path / "sweeps").rglob("train_ddp_process_1.log"))) == 2
    assert not (tmp_path / "train").exists(), "the second process is part of the job"
