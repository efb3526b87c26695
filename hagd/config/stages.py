"""`graph`, `hierarchy`, `search`, `validation`: one section a stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hagd.config.base import Section

Ablation = Literal["mean", "zero", "resample"]
Metric = Literal["log_probability", "logit_difference"]
ErrorMode = Literal["mean", "keep"]
Affinity = Literal["edges", "attribution", "targets", "effects", "coactivation", "random"]
AttributionMethod = Literal["integrated_gradients", "integrated_gradients_inputs", "gradient_activation"]


class LogitsConfig(Section):
    """Which logits the graph of a prompt explains."""

    most: int = Field(10, ge=1, description="most likely next tokens, at most")
    probability: float = Field(0.95, gt=0, le=1, description="as few of them as reach this probability together")
    tokens: tuple[str, ...] | None = Field(None, description="texts of these tokens instead")
    minus: str | None = Field(None, description="text of a token whose logit is taken off that of the one in tokens")

    @model_validator(mode="after")
    def _one_difference(self) -> LogitsConfig:
        if self.tokens is not None and not self.tokens:
            raise ValueError("tokens must be null or at least one token, found none")
        if self.minus is not None and (self.tokens is None or len(self.tokens) != 1):
            raise ValueError(f"minus needs exactly one token in graph.logits.tokens, found {self.tokens}")
        named = [*(self.tokens or ()), *(() if self.minus is None else (self.minus,))]
        if len(set(named)) < len(named):
            raise ValueError(f"tokens and minus must be distinct, found {named}; name each token once")
        return self


class GraphPruningConfig(Section):
    """What is left of the graph of a prompt."""

    nodes: float = Field(0.8, gt=0, le=1, description="share of all influence on the logits that the kept nodes have")
    edges: float = Field(0.98, gt=0, le=1, description="share of the influence between them that the kept edges carry")


class AttentionScoreConfig(Section):
    """Why a head attends: one attention score, divided among pairs of sources of its query and its key."""

    layer: int = Field(0, ge=0, description="layer of the head")
    head: int = Field(0, ge=0, description="head")
    query: int | None = Field(None, ge=0, description="position that attends (null = the last)")
    key: int = Field(0, ge=0, description="position attended to, not after query")
    pairs: int = Field(50, ge=1, description="largest terms that are kept")


class GraphConfig(Section):
    """Node attribution, candidate nodes and the edges between them; or the graph of one prompt."""

    scope: Literal["task", "prompt"] = Field(
        "task",
        description="task: over all prompts of the task, by slot, with search and validation of a circuit; prompt: of "
        "graph.prompt alone, by position, pruned by influence. Keys from prompt on belong to the latter",
    )
    attribution: AttributionMethod = Field("integrated_gradients", description="how candidates are ranked")
    ig_steps: int = Field(8, ge=1, description="steps of integrated gradients")
    metric: Metric = Field(
        "logit_difference",
        description="what is attributed, and what edges into the logit and directions of heads are of: log-probability "
        "of the answer, or answer − distractor logit",
    )
    ablation: Ablation = Field("mean", description="value of a node outside the circuit")
    error: ErrorMode = Field("mean", description="error terms during discovery: at their mean, or kept")
    n_max: int = Field(4096, ge=1, description="candidate nodes that enter the graph, by attribution")
    edges: Literal["direct", "total"] = Field(
        "direct", description="direct: attention patterns and norm scales frozen; total: nothing frozen"
    )
    heads: bool = Field(
        False,
        description="attention heads of head_layers are nodes beside features; scope=task: candidates, members of "
        "circuits, ablated outside them; scope=prompt: edges enter and leave them and none leads through their "
        "attention. false = attention is never ablated, and edges lead through it",
    )
    head_layers: tuple[int, ...] | None = Field(
        None, description="layers whose heads are nodes (null = those that are decomposed)"
    )
    edge_prompts: int = Field(64, ge=1, description="discovery prompts over which edges are averaged")
    edges_per_node: int = Field(32, ge=1, description="strongest incoming edges kept a node")
    batch_size: int = Field(512, ge=1, description="prompts a forward pass")
    prompt: str | None = Field(
        None, min_length=1, description="text; for mini models tokens of the task's vocabulary with spaces between them"
    )
    logits: LogitsConfig = LogitsConfig()
    score: AttentionScoreConfig | None = Field(None, description="an attention score to explain too")
    skip_first: bool = Field(
        False,
        description="no features at the first position: what its MLPs write is error (language models have massive "
        "activations there, which dictionaries do not fit)",
    )
    max_features: int | None = Field(
        None,
        ge=1,
        description="edges into so many features (and heads that are nodes) alone, the most influential ones (null = "
        "all)",
    )
    strongest: int | None = Field(
        None,
        ge=1,
        description="edges kept a target before pruning (null = all); influence counts all of them anyway, but "
        "with max_features only those that are kept",
    )
    pruning: GraphPruningConfig = GraphPruningConfig()
    memory_limit_mb: int | None = Field(
        None, ge=1, description="a graph whose plan needs more memory or scratch disk is refused (null = no limit)"
    )

    @model_validator(mode="after")
    def _head_layers_fit(self) -> GraphConfig:
        layers = self.head_layers
        if layers is None:
            return self
        if not self.heads:
            raise ValueError(f"head_layers needs graph.heads=true, found head_layers={list(layers)}, heads=false")
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ValueError(
                f"head_layers must be null or layers from 0 up, ascending and distinct, found {list(layers)}"
            )
        return self

    @model_validator(mode="after")
    def _prompt_is_there(self) -> GraphConfig:
        if (self.scope == "prompt") != (self.prompt is not None):
            raise ValueError(
                f"scope=prompt and graph.prompt belong together, found scope={self.scope}, prompt={self.prompt}; set "
                "both, or neither"
            )
        return self


class HierarchyConfig(Section):
    """Recursive spectral partition of the attribution graph."""

    affinity: Affinity = Field(
        "edges",
        description="what draws nodes together: edges: strength of the edges between them; attribution: attribution "
        "that flows over them; targets: cosine of outgoing edges; effects: cosine of first-order effects on discovery "
        "prompts; coactivation: cosine of activations on discovery prompts; random, a control: edges, nodes shuffled. "
        "The graph of one prompt is always divided by the influence that flows over its edges",
    )
    neighbours: int = Field(16, ge=1, description="most alike nodes joined to a node (affinities that are cosines)")
    branching: int = Field(4, ge=2, description="children of a supernode (b)")
    min_size: int = Field(8, ge=1, description="supernodes of at most this many nodes are not divided")
    coherence_budget: int = Field(
        60,
        ge=0,
        description="model evaluations for ablating single nodes, by which supernodes are checked, beside one run of "
        "coherence_prompts without ablation; 0 = no check",
    )
    coherence_prompts: int = Field(64, ge=2, description="selection prompts on which each of them is ablated")


SearchLoss = Literal["both", "shortfall", "divergence"]
SearchMethod = Literal[
    "hagd",
    "attribution",
    "integrated_gradients_inputs",
    "gradient_activation",
    "gates",
    "greedy",
    "greedy_edges",
    "exhaustive",
    "random",
]


class SearchConfig(Section):
    """How the circuit is found."""

    method: SearchMethod = Field("hagd", description="search method; exhaustive: for up to 20 candidates (graph.n_max)")
    n_nodes: int | None = Field(80, ge=1, description="circuit size; null = smallest that keeps target_preservation")
    target_preservation: float = Field(0.9, gt=0, le=1, description="used when n_nodes is null, on the selection split")
    sizes: tuple[int, ...] = Field(
        (10, 20, 50, 100, 200, 500, 1000, 2000), description="sizes of the faithfulness curve"
    )
    scorer: str | None = Field(
        None,
        description="meta-learned scorer whose ranking replaces the attribution's: edgeless or edges, which come with "
        "HAGD, or a folder (train.py stage=gnn); method=hagd alone",
    )
    loss: SearchLoss = Field(
        "both",
        description="minimised: squared shortfall of logit differences below the full model's, divergence, or both",
    )
    traversal: bool = Field(False, description="coarse-to-fine group tests over the hierarchy; method=hagd alone")
    traversal_budget: int = Field(200, ge=0, description="model evaluations that group tests may spend")
    elimination: bool = Field(True, description="drop the least contributing nodes in rounds, attributed anew in each")
    elimination_keep: float = Field(0.8, gt=0, lt=1, description="share of the nodes that a round keeps")
    elimination_steps: int = Field(2, ge=1, description="points of a round's path integral")
    elimination_prompts: int = Field(256, ge=1, description="discovery prompts a round")
    gates: bool = Field(True, description="refine with stochastic gates under an L0 price")
    gate_steps: int = Field(280, ge=1, description="gradient steps of the gates, shared by all sizes")
    gate_learning_rate: float = Field(0.1, gt=0, description="rate of Adam on gate logits")
    gate_batch: int = Field(256, ge=1, description="prompts a gate step")
    pruning: bool = Field(True, description="exchange idle nodes against better ones by interventions")
    pruning_budget: int = Field(
        600,
        ge=0,
        description="model evaluations that pruning may spend, half of them on the reported circuit where there are "
        "smaller ones; below the cost of a round (at most 2 n_nodes and a few) it is not pruned, with a warning",
    )
    greedy_prompts: int = Field(64, ge=1, description="discovery prompts a test of greedy pruning")
    pruning_prompts: int = Field(256, ge=1, description="discovery prompts a test of pruning; fewer test more nodes")
    memory_limit_mb: int | None = Field(
        None, ge=1, description="a search during which the process holds more memory is stopped (null = no limit)"
    )

    @model_validator(mode="after")
    def _sizes_are_sizes(self) -> SearchConfig:
        if any(size < 1 for size in self.sizes):
            raise ValueError(f"sizes must be at least 1 each, found {list(self.sizes)}")
        return self

    @model_validator(mode="after")
    def _flat_gates_have_gates(self) -> SearchConfig:
        if self.method == "gates" and not self.gates:
            raise ValueError(
                "method=gates is flat gates alone, found gates=false; set it to true or choose another method"
            )
        return self

    @model_validator(mode="after")
    def _guides_are_read(self) -> SearchConfig:
        if self.method != "hagd" and (self.scorer is not None or self.traversal):
            raise ValueError(
                f"scorer and traversal need method=hagd, found scorer={self.scorer}, traversal={self.traversal} at "
                f"method={self.method}; set search.scorer=null search.traversal=false, or choose search.method=hagd"
            )
        return self


class ValidationConfig(Section):
    """Causal validation on prompts that nothing before has read."""

    n_random: int = Field(10, ge=1, description="random circuits, matched per layer and slot")
    n_removed: int = Field(64, ge=0, description="minimality: nodes of the circuit removed alone, and as many added")
    n_subsets: int = Field(
        10, ge=0, description="completeness: random halves of the circuit that are removed from it and from the model"
    )
    n_bootstrap: int = Field(1000, ge=10, description="bootstrap resamples of the prompts")
    batch_size: int = Field(256, ge=1, description="prompts a forward pass")
    shift: bool = Field(
        True,
        description="also measure on prompts of other wordings than those of every split, where the task has such: "
        "ioi, greater_than, and built-in factual_recall and subject_verb_agreement",
    )
    dark_matter: bool = Field(
        False,
        description="also measure what the dictionaries' errors hold: how well the answer is read from them, what is "
        "lost without them",
    )


class ReportConfig(Section):
    """What the report measures beyond the validation."""

    effect_prompts: int = Field(
        128, ge=1, description="discovery prompts on which every node of the circuit is ablated alone"
    )
    max_nodes: int = Field(
        200, ge=0, description="circuits of the search up to this size, and the reported one, can be chosen on the page"
    )
