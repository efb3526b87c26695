"""Runs stages: a stage runs only when its result is not stored yet, after those whose results it reads."""

from __future__ import annotations

import hashlib
import logging
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hagd.artifacts.codec import RECORD_FILE, DamagedArtifactError, load_record
from hagd.artifacts.keys import stage_key
from hagd.artifacts.store import ArtifactStore, Stored
from hagd.config.model import MiniModel, PackagedModel, PretrainedModel
from hagd.config.run import StagesConfig
from hagd.errors import ConfigError
from hagd.models.language_model import LanguageModel
from hagd.models.records import TrainedLM
from hagd.patching.patched_model import PatchedModel
from hagd.pipeline.measurements import compared_config
from hagd.pipeline.out_of_memory import explained_when_out_of_memory
from hagd.pipeline.progress import StageProgress
from hagd.pipeline.stage_list import STAGES
from hagd.pipeline.stage_runs import StageRuns, log_stage
from hagd.search.scorer.records import TrainedScorer
from hagd.search.scorer.shipped import SHIPPED
from hagd.tasks.splits import fewer_than_wanted
from hagd.tracking.wandb_run import Run

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class Pipeline:
    """All stages of one configuration; `get` gives a stage's result, computing what is missing.

    Attributes:
        config: the whole configuration.
        used: stage → its stored result, for every stage that was asked for so far.
    """

    def __init__(
        self,
        config: StagesConfig,
        console: Console,
        runs: StageRuns | None = None,
    ) -> None:
        self.config: StagesConfig = config
        self.console = console
        self.stage_runs = runs
        self.runs = Path(config.paths.runs)
        self.store = ArtifactStore(self.runs / "artifacts")
        self.used: dict[str, Stored[Any]] = {}
        self._keys: dict[str, str] = {}
        self._runs: dict[str, Run | None] = {}

    def get(self, name: str) -> Any:
        """The record of a stage."""
        if name not in self.used:
            stage, key = STAGES[name], self.key(name)
            if not self.store.contains(name, key):
                for parent in self.parents(name):
                    self.get(parent)
            with ExitStack() as computing:
                self.used[name] = self.store.get_or_compute(
                    name,
                    key,
                    stage.record,
                    lambda work: self._compute(name, work, computing),
                    self._provenance(name),
                    stage.trains,
                )
                if (run := self._runs.pop(name, None)) is not None:
                    # A damaged result is made again without bringing up all that it reads.
                    read = [(parent, self.used[parent]) for parent in self.parents(name) if parent in self.used]
                    if name == "comparison":
                        read.append(("search", self.compared.used["search"]))
                    log_stage(run, name, self.used[name], read)
            self._report(name)
        return self.used[name].record

    def key(self, name: str) -> str:
        """Content address of a stage's result; what it names in files is read once."""
        if name not in self._keys:
            stage = STAGES[name]
            parents = {parent: self.key(parent) for parent in self.parents(name)}
            self._keys[name] = stage_key(name, stage.version, stage.config(self), parents, self.config.seed)
        return self._keys[name]

    def waits(self, name: str) -> bool:
        """Whether a stage's result is missing and another process is computing it, or something that it reads."""
        if self.store.contains(name, key := self.key(name)):
            return False
        return self.store.busy(name, key) or any(self.waits(parent) for parent in self.parents(name))

    def parents(self, name: str) -> tuple[str, ...]:
        """Stages that a stage reads: `lm` for mini models only, `head_means` where heads are nodes."""
        there = {"lm": isinstance(self.config.model, MiniModel), "head_means": self.config.graph.heads}
        return tuple(parent for parent in STAGES[name].parents if there.get(parent, True))

    @cached_property
    def lm(self) -> LanguageModel:
        """The language model, loaded when first needed."""
        model = self.config.model
        if isinstance(model, MiniModel):
            from hagd.models.mini import mini_from_state

            trained: TrainedLM = self.get("lm")
            return mini_from_state(model, trained.vocab_size, trained.n_positions, trained.state)
        from hagd.models.load import load_model

        streaming = self.config.transcoder.activations.layer_streaming
        return load_model(model, self.runs / "models", tokenizer=self.tokenizer, layer_streaming=streaming)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """That of the model, which a task may need before the weights are read; None for mini models."""
        model = self.config.model
        if isinstance(model, MiniModel):
            return None
        from hagd.models.load import load_tokenizer

        return load_tokenizer(model, self.runs / "models")

    @cached_property
    def scorer(self) -> Path | None:
        """The folder of the meta-learned scorer that the search starts from.

        Raises:
            ConfigError: `search.scorer` names no scorer, or a damaged one.
        """
        name = self.config.search.scorer
        if name is None:
            return None
        folder, found = SHIPPED.get(name, Path(name)), name
        if (folder / RECORD_FILE).is_file():
            try:
                load_record(TrainedScorer, folder)
                return folder
            except DamagedArtifactError as error:
                found = f"{name} ({error.__cause__})"
        raise ConfigError(
            f"search.scorer: expected null, one of {', '.join(SHIPPED)}, or a folder with a trained scorer, "
            f"found {found}; train one with: python train.py stage=gnn"
        )

    @cached_property
    def patched(self) -> PatchedModel:
        """The model with its dictionaries and ablation values."""
        device = self.lm.device
        heads = self.get("head_means").to(device) if self.config.graph.heads else None
        return PatchedModel(self.lm, self.get("transcoders").to(device), self.get("means").to(device), heads)

    @cached_property
    def compared(self) -> Pipeline:
        """The extraction that `comparison` asks to compare with."""
        return self.beside(compared_config(self.config))

    def beside(self, config: StagesConfig) -> Pipeline:
        """A pipeline of another configuration, for the same job: what it computes is tracked in the same group."""
        runs = None if self.stage_runs is None else replace(self.stage_runs, config=config)
        return Pipeline(config, self.console, runs)

    @cached_property
    def model_identity(self) -> dict[str, Any]:
        """What decides a pretrained model's weights: its configuration and, for a folder, its files."""
        model = self.config.model
        identity = model.model_dump(mode="json")
        if isinstance(model, PackagedModel) and model.device_map is None:
            del identity["device_map"]  # results from before it could be set keep their address
        if isinstance(model, PretrainedModel) and (folder := Path(model.path).expanduser()).is_dir():
            files = sorted(file for file in folder.iterdir() if file.is_file())
            listing = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            identity["files"] = hashlib.sha256(repr(listing).encode()).hexdigest()
        return identity

    def loggers(self, stage: str) -> list[Logger]:
        """Where the training of a stage that is being computed logs."""
        return [] if self.stage_runs is None else self.stage_runs.loggers(stage, self._runs[stage])

    def _compute(self, name: str, work: Path, computing: ExitStack) -> Any:
        if self.stage_runs is not None:
            self._runs[name] = computing.enter_context(self.stage_runs.open(name, self.key(name)))
        self.console.print(f"[bold]{name}[/bold] …", highlight=False)
        with explained_when_out_of_memory(name), StageProgress(name, self.console) as progress:
            return STAGES[name].compute(self, work, progress)

    def _provenance(self, name: str) -> dict[str, Any]:
        return {
            "config": STAGES[name].config(self),
            "parents": {parent: self.key(parent) for parent in self.parents(name)},
            "seed": self.config.seed,
        }

    def _report(self, name: str) -> None:
        stored = self.used[name]
        how = "reused" if stored.reused else f"{stored.seconds:.1f} s, {stored.peak_mb:.0f} MB"
        self.console.print(f"[bold]{name}[/bold] {stored.key} {how}", highlight=False)
        if name == "task" and (fewer := fewer_than_wanted(self.config.task, stored.record)) is not None:
            log.info("%s", fewer)
