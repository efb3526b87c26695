"""The whole configuration of `extract.py` and `train.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hagd.config.base import Section
from hagd.config.model import MiniModel, ModelConfig
from hagd.config.stages import GraphConfig, HierarchyConfig, SearchConfig, TranscoderConfig, ValidationConfig
from hagd.config.task import SymbolicTask, TaskConfig


class TrainerConfig(Section):
    """Where Lightning trains; leads from a laptop to a cluster without touching anything else."""

    accelerator: str = Field("cpu", description="Lightning accelerator: cpu, gpu, auto")
    devices: int | Literal["auto"] = Field(1, description="devices a node")
    num_nodes: int = Field(1, ge=1, description="nodes")
    strategy: str = Field("auto", description="Lightning strategy: auto, ddp, ddp_fork, fsdp, …")
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = Field(
        "32-true", description="Lightning precision"
    )
    threads: int | None = Field(
        1, ge=1, description="CPU threads of PyTorch (null = its own choice); mini models gain nothing from a second"
    )
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints from which a killed run resumes")

    @model_validator(mode="after")
    def _some_device(self) -> TrainerConfig:
        if self.devices != "auto" and self.devices < 1:
            raise ValueError(f"devices must be at least 1, or auto, found {self.devices}")
        return self


class TrackingConfig(Section):
    """Weights & Biases; offline unless asked, so nothing ever asks for a login."""

    mode: Literal["offline", "online", "disabled"] = Field("offline", description="W&B mode")
    project: str = Field("hagd", description="W&B project")
    entity: str | None = Field(None, description="W&B team or user")
    group: str | None = Field(None, description="W&B group (null = the sweep's name)")
    tags: tuple[str, ...] = Field((), description="W&B tags")


class PathsConfig(Section):
    """Where results go."""

    runs: str = Field("runs", description="root of artifacts, run folders and W&B files")


class StagesConfig(Section):
    """Everything that decides a result; shared by both entry points."""

    seed: int = Field(0, ge=0, description="seed of every random choice")
    model: ModelConfig
    task: TaskConfig
    transcoder: TranscoderConfig = TranscoderConfig()
    graph: GraphConfig = GraphConfig()
    hierarchy: HierarchyConfig = HierarchyConfig()
    search: SearchConfig = SearchConfig()
    validation: ValidationConfig = ValidationConfig()
    trainer: TrainerConfig = TrainerConfig()
    tracking: TrackingConfig = TrackingConfig()
    paths: PathsConfig = PathsConfig()

    @model_validator(mode="after")
    def _sections_fit(self) -> StagesConfig:
        problems = []
        model, task, transcoder = self.model, self.task, self.transcoder
        if isinstance(model, MiniModel):
            if not isinstance(task, SymbolicTask):
                problems.append(
                    f"task={task.name} needs a pretrained model with a tokenizer, found model.kind=mini; "
                    "choose model=smollm2_135m or model=hf model.path=…"
                )
            m = transcoder.expansion * model.d_model
            if transcoder.k > m:
                problems.append(
                    f"transcoder.k must be at most the dictionary size m = expansion × d_model = {m}, "
                    f"found {transcoder.k}; lower transcoder.k or raise transcoder.expansion"
                )
            if transcoder.layers and transcoder.layers[-1] >= model.n_layers:
                problems.append(
                    f"transcoder.layers must be below model.n_layers={model.n_layers}, found {list(transcoder.layers)}"
                )
        elif isinstance(task, SymbolicTask):
            problems.append(
                f"task={task.name} has a vocabulary of its own that only mini models are trained on, "
                f"found model.kind={model.kind}; choose model=gpt2_mini, pythia_mini or llama_mini"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


class ExtractConfig(StagesConfig):
    """Configuration of `extract.py`: one circuit."""


class GNNConfig(Section):
    """Meta-training of the circuit scorer on circuits of several mini models and tasks."""

    models: tuple[str, ...] = Field(("gpt2_mini", "pythia_mini", "llama_mini"), description="configs of conf/model")
    tasks: tuple[str, ...] = Field(("modular_addition", "parity", "sorting"), description="configs of conf/task")
    seeds: tuple[int, ...] = Field((100, 101), description="model seeds, apart from those that are evaluated")
    edges: bool = Field(True, description="message passing over edges; false = the edge-less control")
    hidden: int = Field(64, ge=1, description="width, a multiple of heads")
    heads: int = Field(4, ge=1, description="attention heads of GATv2")
    n_layers: int = Field(2, ge=1, description="message-passing layers")
    epochs: int = Field(200, ge=1, description="passes over the graphs")
    learning_rate: float = Field(3e-3, gt=0, description="peak rate of AdamW")
    weight_decay: float = Field(1e-2, ge=0, description="weight decay of AdamW")

    @model_validator(mode="after")
    def _heads_divide(self) -> GNNConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden must be a multiple of gnn.heads={self.heads}, found {self.hidden}")
        return self


class TrainConfig(StagesConfig):
    """Configuration of `train.py`: one training stage."""

    stage: Literal["lm", "transcoder", "gnn"] = Field("transcoder", description="what is trained")
    gnn: GNNConfig = GNNConfig()
