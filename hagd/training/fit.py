"""One way to train: Lightning with exact resume, clean interruption and no chatter."""

from __future__ import annotations

import logging
import shutil
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hagd.config.run import TrainerConfig
from hagd.errors import ConfigError
from hagd.training.loader import StepLoader

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.strategies import Strategy

    from hagd.training.checkpoints import StepCheckpoint

log = logging.getLogger(__name__)


def fit(
    module: LightningModule,
    loader: StepLoader[Any],
    trainer_config: TrainerConfig,
    n_steps: int,
    checkpoint_dir: Path,
    loggers: Sequence[Logger] = (),
    metrics: tuple[str, ...] = ("loss",),
    *,
    stage: str = "training",
    seed: int = 0,
    gradient_clip: float | None = None,
    tokens: int | None = None,
    joint: bool = False,
) -> None:
    """Train `module` in place for `n_steps` optimiser steps.

    A training that was killed continues from `checkpoint_dir` with the same result, bit for bit on a CPU. The
    folder is removed after success: the caller stores the result. The global random state and the precision of matrix
    products are left as they were.

    Args:
        module: its training step returns a dict with `loss` and further detached scalars to show and log, and may add
            `loss_by_part` (`hagd.training.loss_watch`); its `configure_optimizers` must not read
            `trainer.estimated_stepping_batches`, which would break resuming.
        loader: one batch a step.
        trainer_config: where it runs.
        n_steps: optimiser steps in all, those before an interruption included.
        checkpoint_dir: holds `last.ckpt` while training; nothing else may live there. It must be named after
            everything that decides the result (configuration, data, seed): a checkpoint of the same weight shapes
            is continued whatever settings wrote it.
        loggers: Lightning loggers that receive `stage/metric`.
        metrics: names in the training step's dict that the progress bar shows.
        stage: what is trained, for messages.
        seed: decides randomness inside the module (dropout, sampled gates).
        gradient_clip: largest gradient norm (None = no clipping).
        tokens: a step's, if progress is to be shown in tokens a second.
        joint: `module` is divided over processes as `trainer_config.strategy` says (`layers`, `fsdp`); any other one
            shares the tokens of a batch instead.

    Raises:
        ConfigError: Lightning refuses the settings of `trainer_config` on this machine, or a part of a divided module's
            checkpoint is damaged or missing.
        NumericalError: the loss, or that of a part, is not finite or diverges; names step, part and last checkpoint.
        ProcessEndedError: another process of the training was killed or failed; names the last checkpoint.
        SystemExit: 143 after SIGTERM; a checkpoint is saved first, unless the loss is above its limit.
        KeyboardInterrupt: after Ctrl-C; the last regular checkpoint is kept.
    """
    from hagd.training.checkpoints import StepCheckpoint
    from hagd.training.termination import explained_when_another_process_ends

    with _quiet(), _own_state(trainer_config.matmul_precision):
        saving = StepCheckpoint(checkpoint_dir, trainer_config.checkpoint_every, seed)
        callbacks = _callbacks(saving, stage, metrics, tokens)
        trainer = _trainer(trainer_config, n_steps, checkpoint_dir, loggers, callbacks, gradient_clip, joint)
        checkpoint = _resumed(checkpoint_dir, module, stage)
        with _stopped_as_elsewhere(), explained_when_another_process_ends(stage, saving, checkpoint):
            trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
        if trainer.is_global_zero:
            shutil.rmtree(checkpoint_dir, ignore_errors=True)


def refuse_missing_devices(trainer_config: TrainerConfig) -> None:
    """To be asked before anything long is done for a training.

    Raises:
        ConfigError: Lightning refuses the settings on this machine.
    """
    with _quiet():
        _trainer(trainer_config, 1, Path(), (), [], None, joint=True)


def _resumed(folder: Path, module: LightningModule, stage: str) -> Path | None:
    """The checkpoint from which the training continues, if there is one; the log says so."""
    from hagd.training.checkpoints import usable_checkpoint

    checkpoint = usable_checkpoint(folder, module)
    if checkpoint:
        log.info("%s: continues from %s", stage, checkpoint)
    return checkpoint


def _callbacks(saving: StepCheckpoint, stage: str, metrics: tuple[str, ...], tokens: int | None) -> list[Callback]:
    """The watch for bad losses comes before the checkpoint, so that a bad state is never saved."""
    from hagd.training.loss_watch import LossWatch
    from hagd.training.progress import TrainingProgress
    from hagd.training.termination import StopTogether

    return [LossWatch(stage, saving.every, saving), saving, TrainingProgress(stage, metrics, tokens), StopTogether()]


@contextmanager
def _own_state(matmul_precision: str) -> Iterator[None]:
    """Random state and precision of matrix products are what they were before, afterwards; of GPUs that of the current
    one, since to ask the others would take memory on each for every process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _stopped_as_elsewhere() -> Iterator[None]:
    """Lightning's ways of saying that a signal came, as Python's own."""
    from pytorch_lightning.utilities.exceptions import SIGTERMException

    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit as stop:  # Lightning turns Ctrl-C into exit code 1 and ignores it from then on
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, on_interrupt)
        raise KeyboardInterrupt from None


def _trainer(
    config: TrainerConfig,
    n_steps: int,
    checkpoint_dir: Path,
    loggers: Sequence[Logger],
    callbacks: list[Callback],
    gradient_clip: float | None,
    joint: bool,
) -> Trainer:
    """Lightning's trainer.

    Raises:
        ConfigError: it cannot follow the settings on this machine.
    """
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Trainer

    try:
        return Trainer(
            max_steps=n_steps,
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=_strategy(config, joint),
            precision=config.precision,
            plugins=_environment(config),
            callbacks=callbacks,
            logger=list(loggers) or False,
            gradient_clip_val=gradient_clip,
            default_root_dir=checkpoint_dir,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(
            "trainer: expected settings that this machine can follow, found "
            f"accelerator={config.accelerator}, devices={config.devices}, "
            f"strategy={config.strategy} ({error}); choose trainer=cpu, trainer=gpu or trainer=ddp"
        ) from error


def _strategy(config: TrainerConfig, joint: bool) -> str | Strategy:
    """Trainings that cannot be divided share their tokens instead."""
    if config.strategy not in ("layers", "fsdp"):
        return config.strategy
    if not joint:
        return "ddp"
    if config.strategy == "fsdp":
        from hagd.training.divided_weights import DividedWeightsStrategy

        return DividedWeightsStrategy()
    from hagd.training.own_layers import OwnLayersStrategy

    return OwnLayersStrategy()


def _environment(config: TrainerConfig) -> list[Any]:
    """One process needs no cluster environment; under SLURM, requeueing is the job launcher's business."""
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    if config.devices == 1 and config.num_nodes == 1:
        return [LightningEnvironment()]
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence, by name, what Lightning says in every training; anything else still gets through."""
    lightning = logging.getLogger("pytorch_lightning")
    level = lightning.level
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*GPU available but not used.*",
            ".*LeafSpec.*",
            ".*returned a view tensor.*",  # FSDP2 fears operations in place; there are none on what layers return
        ):
            warnings.filterwarnings("ignore", message=message)
        lightning.setLevel(logging.WARNING)
        try:
            yield
        finally:
            lightning.setLevel(level)
