"""One Weights & Biases run per job: offline unless asked, quiet, marked failed when the job fails.

Importing W&B takes longer than the start of a small job; a job that does not track never imports it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hagd.config.run import TrackingConfig
from hagd.errors import ConfigError

if TYPE_CHECKING:
    from pytorch_lightning.loggers import WandbLogger
    from wandb import Artifact

STEP = "step"
"""Metric that plots use as their x-axis. W&B's own step must never go back, which stages in turn would do."""


class Run:
    """What the pipeline uses of a W&B run; without one (None) every call is accepted and nothing is kept."""

    def __init__(self, run: Any | None, mode: str = "disabled", upload_mb: int | None = None) -> None:
        self._run = run
        self._mode = mode
        self._upload_mb = upload_mb
        self._has_step: set[str] = set()

    @property
    def id(self) -> str:
        return "untracked" if self._run is None else str(self._run.id)

    @property
    def url(self) -> str | None:
        """Page of an online run; None offline."""
        return self._run.url if self._run is not None and self._mode == "online" else None

    @property
    def dir(self) -> Path | None:
        """Folder that holds the run's `.wandb` file; None when disabled."""
        return None if self._run is None else Path(self._run.dir).parent

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log `metrics`, plotted over `step` when it is given; each metric may count its own steps."""
        if self._run is None:
            return
        if step is None:
            self._run.log(dict(metrics))
            return
        for name in metrics.keys() - self._has_step:
            self._run.define_metric(name, step_metric=STEP)
            self._has_step.add(name)
        self._run.log({**metrics, STEP: step})

    def configure(self, config: Mapping[str, Any]) -> None:
        """Add values to the configuration that W&B shows, or replace them."""
        if self._run is not None:
            self._run.config.update(dict(config), allow_val_change=True)

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Final figures, one value a name; shown in W&B's table of runs."""
        if self._run is not None:
            self._run.summary.update(dict(figures))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table. A column may mix numbers, text and None."""
        if self._run is None:
            return
        import wandb

        data = [list(row) for row in rows]
        self._run.log({name: wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})

    def figure(self, name: str, png_path: Path) -> None:
        """Log an image file; its content is copied into the run."""
        if self._run is None:
            return
        import wandb

        self._run.log({name: wandb.Image(str(png_path))})

    def html(self, name: str, path: Path) -> None:
        """Log a self-contained HTML page; its content is copied into the run."""
        if self._run is None:
            return
        import wandb

        self._run.log({name: wandb.Html(str(path), inject=False)})

    def artifact(self, name: str, type: str, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Log a file or folder as a W&B artifact. Its files are referred to, not copied: they must stay in place.

        Of one larger than `tracking.upload_mb` W&B gets where its files are and their checksums, and no content.
        """
        if self._run is not None:
            self._run.log_artifact(_artifact(name, type, path, metadata, self._upload_mb))

    def use(self, name: str, type: str, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Note an artifact, given as to `artifact`, as an input: W&B draws lineage from it.

        W&B's `use_artifact` refuses to work offline. This is what it does with an artifact that no server has seen: the
        artifact is logged with the request to use it, which `wandb sync` carries out later. One whose content is there
        already is found by its digest.
        """
        if self._run is not None:
            artifact = _artifact(name, type, path, metadata, self._upload_mb)
            self._run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    def lightning_loggers(self) -> list[WandbLogger]:
        """One logger for a Lightning trainer that writes into this run, over the trainer's own global step."""
        if self._run is None:
            return []
        from pytorch_lightning.loggers import WandbLogger

        self._run.define_metric("trainer/global_step")
        self._run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return [WandbLogger(experiment=self._run)]


def _artifact(name: str, type: str, path: Path, metadata: Mapping[str, Any] | None, upload_mb: int | None) -> Artifact:
    import wandb

    artifact = wandb.Artifact(name, type=type, metadata=None if metadata is None else dict(metadata))
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    too_large = upload_mb is not None and sum(file.stat().st_size for file in files) > upload_mb * 2**20
    for file in files:
        relative = file.name if path.is_file() else str(file.relative_to(path))
        if too_large:
            artifact.add_reference(file.absolute().as_uri(), name=relative)
            continue
        artifact.add_file(str(file), name=relative, policy="immutable", skip_cache=True)
    return artifact


@contextmanager
def tracked_run(
    tracking: TrackingConfig,
    *,
    name: str,
    group: str | None,
    job_type: str,
    config: Mapping[str, Any],
    directory: Path,
    packages: bool = True,
) -> Iterator[Run]:
    """A W&B run for the duration of the block; an exception that leaves the block marks it as failed.

    Args:
        tracking: mode, project, entity, group and tags.
        name: shown in W&B.
        group: used unless `tracking.group` is set; the sweep's name.
        job_type: `extract` or `train`.
        config: the resolved configuration as a plain container.
        directory: root of all results; every run's files go below its folder `wandb`.
        packages: W&B lists the installed packages in the run, which takes it half a second.

    Raises:
        ConfigError: an online run cannot be started (no login, no network).
    """
    if tracking.mode == "disabled":
        yield Run(None)
        return
    import wandb

    directory.mkdir(parents=True, exist_ok=True)
    # Tables are kept here until `wandb sync`; the default is the home folder, which a cluster may not share.
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        os.environ.setdefault(variable, str(directory.absolute() / "wandb" / "local"))
    try:
        run = wandb.init(
            mode=tracking.mode,
            project=tracking.project,
            entity=tracking.entity,
            group=tracking.group or group,
            tags=tracking.tags,
            name=name,
            job_type=job_type,
            config=dict(config),
            dir=str(directory),
            settings=_settings(packages),
        )
    except wandb.Error as error:
        raise ConfigError(
            f"tracking.mode: W&B could not start a run with mode {tracking.mode} ({error}); run `wandb login` and "
            "check the network, or set tracking.mode=offline and upload later with `wandb sync`"
        ) from error
    try:  # W&B's own context manager would print the traceback of errors whose message says it all
        yield Run(run, tracking.mode, tracking.upload_mb)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _settings(packages: bool) -> Any:
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",  # the terminal and the log file belong to the job
        reinit="create_new",  # one run a job, also where a launcher reuses its workers
        x_disable_stats=True,  # no sampling thread beside the computation
        x_save_requirements=packages,
        x_transaction_log_flush_interval=0.5,  # a kill loses half a second, not fifteen
    )
