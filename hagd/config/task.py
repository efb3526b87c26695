"""`task`: what the model is asked to do, and how its prompts are split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hagd.config.base import Section


class LMTraining(Section):
    """How a mini model is trained from scratch on its task."""

    steps: int = Field(1000, ge=1, description="optimiser steps")
    batch_size: int = Field(512, ge=1, description="sequences a step")
    learning_rate: float = Field(3e-3, gt=0, description="peak rate of AdamW, cosine decay to a hundredth")
    warmup_steps: int = Field(50, ge=0, description="linear warm-up")
    weight_decay: float = Field(3.0, ge=0, description="AdamW weight decay of matrices (embeddings included)")
    target_accuracy: float = Field(
        0.99, ge=0, le=1, description="held-out accuracy that the model should reach; a warning is printed below it"
    )


class TaskBase(Section):
    """Sizes of the disjoint splits; every task has them."""

    n_discovery: int = Field(512, ge=1, description="prompts for attribution, means and search")
    n_selection: int = Field(256, ge=1, description="prompts for choosing sizes, thresholds and early stopping")
    n_validation: int = Field(256, ge=1, description="prompts read once, for the reported figures")
    only_correct: bool = Field(True, description="keep only prompts that the full model answers correctly")


class UpTo(TaskBase):
    """A task whose data may be too few: sizes of splits are upper bounds."""

    n_discovery: int = Field(512, ge=1, description="at most so many prompts for attribution, means and search")
    n_selection: int = Field(
        256, ge=1, description="at most so many prompts for choosing sizes, thresholds and early stopping"
    )
    n_validation: int = Field(256, ge=1, description="at most so many prompts read once, for the reported figures")


class SymbolicTask(TaskBase):
    """A task with its own vocabulary, on which mini models are trained."""

    n_train: int = Field(2048, ge=1, description="sequences that train the model; disjoint from every other split")
    training: LMTraining = LMTraining()


class ModularArithmetic(SymbolicTask):
    """`a ∘ b … mod p`, one token a number; slots a, b, …, =."""

    name: Literal["modular_arithmetic"] = "modular_arithmetic"
    p: int = Field(59, ge=2, description="modulus")
    operation: Literal["+", "-", "*"] = Field("+", description="the operation, applied left to right")
    n_operands: int = Field(2, ge=2, description="operands")


class Parity(SymbolicTask):
    """Parity of a bit string; slots bit1 … bitN."""

    name: Literal["parity"] = "parity"
    length: int = Field(12, ge=2, description="bits")
    targets: Literal["running", "final"] = Field(
        "running", description="train on the parity of every prefix, or of the whole string only"
    )


class Sorting(SymbolicTask):
    """Sort distinct symbols: the model reads the input and writes it in order."""

    name: Literal["sorting"] = "sorting"
    length: int = Field(6, ge=2, description="symbols to sort")
    n_symbols: int = Field(10, ge=2, description="alphabet")
    separator: bool = Field(False, description="a separator token between input and output")
    slots: Literal["role", "position"] = Field(
        "role",
        description="what a node's slot is: the role of a position (in, last, sep, out), so that a node is the same "
        "feature at every output; or each position (in1 …, sep, out1 …)",
    )

    @model_validator(mode="after")
    def _distinct(self) -> Sorting:
        if self.length > self.n_symbols:
            raise ValueError(f"length must be at most n_symbols={self.n_symbols}, found {self.length}")
        return self


class IOI(TaskBase):
    """Indirect object identification (Wang et al. 2022): `When Mary and John …, John gave … to` → Mary."""

    name: Literal["ioi"] = "ioi"


class GreaterThan(TaskBase):
    """Greater-than (Hanna et al. 2023): `The war lasted from the year 1732 to the year 17` → a later year."""

    name: Literal["greater_than"] = "greater_than"


class SubjectVerbAgreement(UpTo):
    """Number agreement across an attractor; generated sentences, or a file of sentence pairs."""

    name: Literal["subject_verb_agreement"] = "subject_verb_agreement"
    data_files: str | None = Field(
        None, description="JSON lines with clean_prefix, patch_prefix, clean_answer, patch_answer"
    )


class FactualRecall(UpTo):
    """Complete a relation (`The capital of France is`) from the built-in table or an LRE relation file."""

    name: Literal["factual_recall"] = "factual_recall"
    relation: Literal["capital", "language", "continent"] = Field("capital", description="built-in relation")
    data_files: str | None = Field(None, description="relation file in the LRE format; replaces the built-in table")


class WinoGrande(UpTo):
    """WinoGrande, partial scoring: log-likelihood of the rest of the sentence given each option."""

    name: Literal["winogrande"] = "winogrande"
    dataset: str = Field("allenai/winogrande", description="hub name")
    subset: str = Field("winogrande_xl", description="configuration of the hub data set")
    split: str = Field("validation", description="split of the hub data set")
    data_files: str | None = Field(None, description="local JSON lines in the hub's columns; replaces the hub")
    max_length: int = Field(64, ge=4, description="tokens; longer items are left out")


class HellaSwag(UpTo):
    """HellaSwag: length-normalised log-likelihood of four endings."""

    name: Literal["hellaswag"] = "hellaswag"
    dataset: str = Field("Rowan/hellaswag", description="hub name")
    split: str = Field("validation", description="split of the hub data set")
    data_files: str | None = Field(None, description="local JSON lines in the hub's columns; replaces the hub")
    max_length: int = Field(128, ge=4, description="tokens; longer items are left out")


TaskConfig = Annotated[
    ModularArithmetic
    | Parity
    | Sorting
    | IOI
    | GreaterThan
    | SubjectVerbAgreement
    | FactualRecall
    | WinoGrande
    | HellaSwag,
    Field(discriminator="name"),
]
