"""The whole configuration of `extract.py` and `train.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hagd.config.base import Section
from hagd.config.comparison import ComparisonConfig
from hagd.config.model import MiniModel, ModelConfig, PretrainedModel
from hagd.config.stages import GraphConfig, HierarchyConfig, ReportConfig, SearchConfig, ValidationConfig
from hagd.config.task import SymbolicTask, TaskConfig
from hagd.config.transcoder import TranscoderConfig


class TrainerConfig(Section):
    """Where Lightning trains; leads from a laptop to a cluster without touching anything else."""

    accelerator: str = Field("cpu", description="Lightning accelerator: cpu, gpu, auto")
    devices: int | Literal["auto"] = Field(1, description="devices a node")
    num_nodes: int = Field(1, ge=1, description="nodes")
    strategy: str = Field(
        "auto",
        description="layers (every process trains the dictionaries of its own layers), fsdp (dictionaries and their "
        "optimiser state are divided over processes, for those larger than a device), in both of which other trainings "
        "share the tokens of a batch; or a Lightning strategy: auto, ddp (processes share the tokens of a batch), …",
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = Field(
        "32-true", description="Lightning precision; weights, thresholds and counters stay in float32"
    )
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest",
        description="of trainings' float32 matrix products (torch.set_float32_matmul_precision); high takes a GPU's "
        "TensorFloat-32",
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
    upload_mb: int | None = Field(
        1024,
        ge=0,
        description="results of stages (weights included), circuits and reports larger than this are not uploaded: W&B "
        "gets their path and checksum (null = no limit)",
    )
    tensorboard: bool = Field(
        False, description='curves of trainings also for TensorBoard, below the run folder; needs "hagd[tensorboard]"'
    )


class PathsConfig(Section):
    """Where results go."""

    runs: str = Field("runs", description="root of artifacts, run folders and W&B files")


class StagesConfig(Section):
    """Everything that decides a result; shared by both entry points."""

    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of every random choice")
    model: ModelConfig
    task: TaskConfig
    transcoder: TranscoderConfig = TranscoderConfig()
    graph: GraphConfig = GraphConfig()
    hierarchy: HierarchyConfig = HierarchyConfig()
    search: SearchConfig = SearchConfig()
    validation: ValidationConfig = ValidationConfig()
    report: ReportConfig = ReportConfig()
    comparison: ComparisonConfig | None = Field(
        None, description="another model of the task whose circuit is compared with this one (null = none)"
    )
    trainer: TrainerConfig = TrainerConfig()
    tracking: TrackingConfig = TrackingConfig()
    paths: PathsConfig = PathsConfig()
    optimized_metric: str | None = Field(
        None,
        description="key of metrics.json that a job returns to a sweeper such as Optuna; null: extract.py returns "
        "selection.preservation (graph.replacement for a prompt, plan.peak_mb for a plan), train.py objective. Figures "
        "of validation.* would choose settings by the prompts on which they are reported",
    )

    @model_validator(mode="after")
    def _sections_fit(self) -> StagesConfig:
        model, transcoder = self.model, self.transcoder
        problems = self._model_problems()
        if self.search.n_nodes is not None and self.search.n_nodes > self.graph.n_max:
            problems.append(
                f"search.n_nodes must be at most graph.n_max={self.graph.n_max}, found {self.search.n_nodes}; lower it "
                "or raise graph.n_max"
            )
        if self.search.method == "greedy_edges" and self.graph.heads:
            problems.append(
                "search.method=greedy_edges prunes edges between features, found graph.heads=true; set it to false or "
                "choose search.method=greedy"
            )
        if transcoder.cross_layer and self.trainer.strategy == "layers":
            problems.append(
                "trainer.strategy=layers divides dictionaries that each write to their own layer, found "
                "transcoder.cross_layer=true; choose trainer.strategy=ddp"
            )
        if transcoder.optimiser != "adam" and self.trainer.strategy == "fsdp":
            problems.append(
                f"trainer.strategy=fsdp divides the state of transcoder.optimiser=adam, found {transcoder.optimiser}; "
                "choose adam, whose state each process then holds a part of"
            )
        if transcoder.activations.layer_streaming and not isinstance(model, PretrainedModel):
            problems.append(
                f"transcoder.activations.layer_streaming needs the weight files of model.kind=pretrained, found "
                f"model.kind={model.kind}; set it to false, or choose model=hf model.path=…"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _model_problems(self) -> list[str]:
        """What other sections ask of a model of another kind or size."""
        problems: list[str] = []
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
            if transcoder.corpus is not None:
                problems.append(
                    "transcoder.corpus needs a model with a tokenizer, found model.kind=mini; "
                    "set transcoder.corpus=null"
                )
            if transcoder.layers and transcoder.layers[-1] >= model.n_layers:
                problems.append(
                    f"transcoder.layers must be below model.n_layers={model.n_layers}, found {list(transcoder.layers)}"
                )
            if self.graph.head_layers and self.graph.head_layers[-1] >= model.n_layers:
                problems.append(
                    f"graph.head_layers must be below model.n_layers={model.n_layers}, found "
                    f"{list(self.graph.head_layers)}"
                )
        elif isinstance(task, SymbolicTask):
            problems.append(
                f"task={task.name} has a vocabulary of its own that only mini models are trained on, "
                f"found model.kind={model.kind}; choose model=gpt2_mini, pythia_mini or llama_mini"
            )
        return problems


class ExtractConfig(StagesConfig):
    """Configuration of `extract.py`: one circuit, or the graph of one prompt."""

    mode: Literal["run", "plan"] = Field(
        "run", description="plan: print what the graph of graph.prompt would need of memory and time, and stop"
    )

    @model_validator(mode="after")
    def _plan_has_a_prompt(self) -> ExtractConfig:
        if self.mode == "plan" and self.graph.scope != "prompt":
            raise ValueError(
                f"mode=plan plans the graph of one prompt, found graph.scope={self.graph.scope}; set "
                "graph.scope=prompt graph.prompt=…"
            )
        return self

    @model_validator(mode="after")
    def _measured_circuits_are_of_tasks(self) -> ExtractConfig:
        if self.graph.scope == "prompt" and (self.comparison is not None or self.validation.dark_matter):
            raise ValueError(
                "comparison and validation.dark_matter measure circuits of a task, found graph.scope=prompt; set "
                "comparison=null validation.dark_matter=false"
            )
        return self

    @model_validator(mode="after")
    def _prompt_has_mlps(self) -> ExtractConfig:
        if self.graph.scope == "prompt" and self.transcoder.site != "mlp":
            raise ValueError(
                f"graph.scope=prompt needs transcoder.site=mlp, found {self.transcoder.site}; between two autoencoders "
                "of the residual stream the MLPs are not linear"
            )
        return self

    @model_validator(mode="after")
    def _model_fits_memory(self) -> ExtractConfig:
        if self.transcoder.activations.layer_streaming:
            raise ValueError(
                "transcoder.activations.layer_streaming must be false here, because attribution and search need the "
                "whole model and its gradients, found true; only train.py stage=transcoder streams layers, and what "
                "it trained is used by extract.py with the same transcoder settings otherwise"
            )
        return self


class GNNConfig(Section):
    """Meta-training of the circuit scorer on circuits of several mini models and tasks."""

    models: tuple[str, ...] = Field(("gpt2_mini", "pythia_mini", "llama_mini"), description="configs of conf/model")
    tasks: tuple[str, ...] = Field(("modular_addition", "parity", "sorting"), description="configs of conf/task")
    seeds: tuple[int, ...] = Field((5, 6, 7), description="model seeds, apart from those that are evaluated")
    edges: bool = Field(
        False, description="message passing over the graph's edges (GATv2); not shown to help (docs/results/search.md)"
    )
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


class ExportConfig(Section):
    """A copy of the dictionaries of stage=transcoder for other programs."""

    format: Literal["hagd", "sparsify", "saelens", "circuit_tracer"] | None = Field(
        None, description="layout: HAGD's own, sparsify's, SAELens' or circuit-tracer's; null = no copy"
    )
    path: str | None = Field(None, min_length=1, description="folder of the copy, new or empty")

    @model_validator(mode="after")
    def _both(self) -> ExportConfig:
        if (self.format is None) != (self.path is None):
            raise ValueError(f"format and path belong together, found format={self.format}, path={self.path}; set both")
        return self


class TrainConfig(StagesConfig):
    """Configuration of `train.py`: one training stage."""

    stage: Literal["lm", "transcoder", "gnn"] = Field("transcoder", description="what is trained")
    gnn: GNNConfig = GNNConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _export_fits(self) -> TrainConfig:
        """What a layout has no place for is refused before hours of training; files are checked once they are read."""
        layout, options = self.export.format, self.transcoder
        problems = []
        if layout is not None and self.stage != "transcoder":
            problems.append(f"export copies dictionaries, found stage={self.stage}; set stage=transcoder")
        if options.path is None:
            sparse, chosen = f"transcoder.activation={options.activation}", options.layers or ()
            if layout == "circuit_tracer" and options.activation == "topk":
                problems.append(
                    f"export.format=circuit_tracer has no place for {sparse}; choose batch_topk, jumprelu or relu"
                )
            if layout == "circuit_tracer" and options.site == "resid":
                problems.append("export.format=circuit_tracer has no place for transcoder.site=resid; choose mlp")
            if layout == "circuit_tracer" and chosen != tuple(range(len(chosen))):
                problems.append(
                    f"export.format=circuit_tracer holds every layer from 0 up, found transcoder.layers={list(chosen)}"
                    "; set it to null"
                )
            if layout == "circuit_tracer" and options.cross_layer and options.skip:
                problems.append("export.format=circuit_tracer has no cross-layer skip; set transcoder.skip=false")
            if layout == "sparsify" and options.activation != "topk":
                problems.append(f"export.format=sparsify has no place for {sparse}; choose topk or another format")
            if layout == "saelens" and options.activation == "topk" and options.skip:
                problems.append("export.format=saelens has no TopK with a skip; set transcoder.skip=false")
            if layout in ("sparsify", "saelens") and options.cross_layer:
                problems.append(f"export.format={layout} has no cross-layer dictionaries; choose circuit_tracer")
        if problems:
            raise ValueError("; ".join(problems))
        return self
