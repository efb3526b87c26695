"""The peers' own training loops, fed with given activations; runs in the peers' environment.

Nothing of a peer's step is rewritten: sparsify's `Trainer.fit`, dictionary_learning's `trainSAE` and SAELens's
`SAETrainer.fit` run as they are. Only where they would read a language model they read `batches`.

Shape legend: B tokens a step, d = d_model, m dictionary size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from contenders import Batches, Training, Weights
from torch import Tensor, nn


def naive(training: Training, batches: Batches) -> Weights:
    """A transcoder in the plainest PyTorch: dense products, dense sparse code, torch's Adam."""
    torch.manual_seed(training.seed)
    d, m = training.d, training.m
    encoder, decoder = nn.Linear(d, m), nn.Linear(m, d)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=training.rate or 1e-3)
    for x, y in batches():
        values, index = encoder(x).topk(training.k, dim=-1)
        features = torch.zeros(len(x), m).scatter(1, index, values.relu())
        loss = (decoder(features) - y).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "W_enc": encoder.weight.data,
        "b_enc": encoder.bias.data,
        "W_dec": decoder.weight.data.T.contiguous(),
        "b_dec": decoder.bias.data,
    }


def encoder_product(training: Training, batches: Batches) -> Weights:
    """No training: the dense encoder product `x W_encᵀ`, once a step, as a yardstick."""
    weight = torch.randn(training.m, training.d) / training.d**0.5
    with torch.no_grad():
        for x, _ in batches():
            nn.functional.linear(x, weight)
    return {}


class _Site(nn.Module):
    """Stands for the module whose input and output a transcoder connects."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class _Activations(nn.Module):
    """Stands for sparsify's language model: each forward pass sends the next batch through `site`."""

    def __init__(self, training: Training, batches: Batches) -> None:
        super().__init__()
        self.site = _Site()
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.device = torch.device("cpu")
        self.dummy_inputs = {"example": torch.zeros(1, 1, training.d)}
        self._batches = batches()

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor | None = None, *, example: Tensor | None = None) -> None:
        x, y = (example[0], example[0]) if example is not None else next(self._batches)
        self.site(x[None], y[None])


class _Steps:
    """A data set of `steps` rows, one a step. sparsify reads from it only how many tokens a step has."""

    def __init__(self, steps: int, batch: int) -> None:
        self._steps = steps
        self._row = {"input_ids": torch.zeros(batch, dtype=torch.long)}

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._row


def sparsify_transcoder(training: Training, batches: Batches) -> Weights:
    """eai-sparsify, from input to target."""
    return _sparsify(training, batches, transcode=True)


def sparsify_autoencoder(training: Training, batches: Batches) -> Weights:
    """eai-sparsify, from input to itself."""
    return _sparsify(training, batches, transcode=False)


def _sparsify(training: Training, batches: Batches, *, transcode: bool) -> Weights:
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SparseCoderConfig(num_latents=training.m, k=training.k, skip_connection=training.skip, transcode=transcode),
            batch_size=1,  # rows of `_Steps`, which are whole batches
            optimizer=training.optimizer,
            lr=training.rate,
            lr_warmup_steps=training.steps // 20,  # of adam; its own 1,000 exceed the steps of these runs
            hookpoints=["site"],
            init_seeds=[training.seed],
            log_to_wandb=False,
            save_every=training.steps + 1,
            save_dir=folder,
        )
        model: Any = _Activations(training, batches)
        data: Any = _Steps(training.steps, training.batch)
        Trainer(config, data, model).fit()
        coder = SparseCoder.load_from_disk(Path(folder) / "unnamed" / "site")
    W_enc, b_enc = coder.encoder.weight.data, coder.encoder.bias.data
    weights = {
        "W_enc": W_enc,
        "b_enc": b_enc if transcode else b_enc - W_enc @ coder.b_dec.data,
        "W_dec": coder.W_dec.data,
        "b_dec": coder.b_dec.data,
    }
    return weights | ({"W_skip": coder.W_skip.data} if coder.W_skip is not None else {})


class _Inputs:
    """Inputs alone, as often as they are asked for."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return (x for x, _ in self._batches())


def dictionary_learning_autoencoder(training: Training, batches: Batches) -> Weights:
    """dictionary_learning's TopK trainer with the schedule of its demonstration (10 steps up, last fifth down)."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

    state = _dictionary_learning(
        training, batches, trainer=TopKTrainer, dict_class=AutoEncoderTopK, k=training.k, lr=training.rate
    )
    return {
        "W_enc": state["encoder.weight"],
        "b_enc": state["encoder.bias"] - state["encoder.weight"] @ state["b_dec"],
        "W_dec": state["decoder.weight"].T.contiguous(),
        "b_dec": state["b_dec"],
    }


def dictionary_learning_batch_topk(training: Training, batches: Batches) -> Weights:
    """Its BatchTopK trainer; gives no weights."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer

    _dictionary_learning(
        training, batches, trainer=BatchTopKTrainer, dict_class=BatchTopKSAE, k=training.k, lr=training.rate
    )
    return {}


def dictionary_learning_jumprelu(training: Training, batches: Batches) -> Weights:
    """Its JumpReLU trainer; gives no weights."""
    from dictionary_learning.dictionary import JumpReluAutoEncoder
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer

    _dictionary_learning(
        training,
        batches,
        trainer=JumpReluTrainer,
        dict_class=JumpReluAutoEncoder,
        target_l0=float(training.k),
        sparsity_warmup_steps=min(2000, training.steps // 4),
    )
    return {}


def _dictionary_learning(training: Training, batches: Batches, **settings: Any) -> dict[str, Tensor]:
    from dictionary_learning.training import trainSAE

    configuration = settings | {
        "steps": training.steps,
        "activation_dim": training.d,
        "dict_size": training.m,
        "layer": 0,
        "lm_name": "given activations",
        "warmup_steps": min(10, training.steps // 4),
        "decay_start": int(0.8 * training.steps),
        "seed": training.seed,
        "device": "cpu",
    }
    with tempfile.TemporaryDirectory() as folder:
        trainSAE(
            data=_Inputs(batches),
            trainer_configs=[configuration],
            steps=training.steps,
            save_dir=folder,
            normalize_activations=training.scaled,
            device="cpu",
        )
        state: dict[str, Tensor] = torch.load(Path(folder) / "trainer_0" / "ae.pt", weights_only=True)
    return state


_SCALE_BATCHES = 20
"""Batches that SAELens reads for its estimate of the input's scale, before the pass."""


def saelens_autoencoder(training: Training, batches: Batches) -> Weights:
    """SAELens's TopK autoencoder with the schedule of its tutorial (no warm-up, last fifth down)."""
    return _saelens_top_k(training, batches, sparse=False)


def saelens_autoencoder_sparse(training: Training, batches: Batches) -> Weights:
    """The same with `use_sparse_activations`, which on a CPU only runs without rescaling by decoder norms."""
    return _saelens_top_k(training, batches, sparse=True)


def saelens_batch_topk(training: Training, batches: Batches) -> Weights:
    """SAELens's BatchTopK autoencoder; gives no weights."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    config = BatchTopKTrainingSAEConfig(d_in=training.d, d_sae=training.m, k=training.k)
    _saelens(training, batches, BatchTopKTrainingSAE, config)
    return {}


def saelens_jumprelu(training: Training, batches: Batches) -> Weights:
    """SAELens's JumpReLU autoencoder with the loss that has a target L0; gives no weights."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

    config = JumpReLUTrainingSAEConfig(
        d_in=training.d, d_sae=training.m, jumprelu_sparsity_loss_mode="quadratic", target_l0=training.k
    )
    _saelens(training, batches, JumpReLUTrainingSAE, config)
    return {}


def _saelens_top_k(training: Training, batches: Batches, *, sparse: bool) -> Weights:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    config = TopKTrainingSAEConfig(
        d_in=training.d,
        d_sae=training.m,
        k=training.k,
        normalize_activations="expected_average_only_in" if training.scaled else "none",
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,
    )
    state = _saelens(training, batches, TopKTrainingSAE, config)
    W_enc = state["W_enc"].T.contiguous()
    return {
        "W_enc": W_enc,
        "b_enc": state["b_enc"] - W_enc @ state["b_dec"],
        "W_dec": state["W_dec"],
        "b_dec": state["b_dec"],
    }


def _saelens(training: Training, batches: Batches, kind: Any, sae_config: Any) -> dict[str, Tensor]:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer
    from safetensors.torch import load_file

    torch.manual_seed(training.seed)
    sae = kind(sae_config)
    rate = SAETrainerConfig.lr if training.rate is None else training.rate
    config = SAETrainerConfig(
        lr=rate,
        lr_end=rate / 10,
        total_training_samples=training.steps * training.batch,
        train_batch_size_samples=training.batch,
        lr_decay_steps=training.steps // 5,
        n_batches_for_norm_estimate=_SCALE_BATCHES,
    )
    inputs = iter(_Inputs(batches))
    if training.scaled:
        inputs = chain(islice(_Inputs(batches), _SCALE_BATCHES), inputs)
    trained = SAETrainer(config, sae, inputs).fit()
    with tempfile.TemporaryDirectory() as folder:
        weights, _ = trained.save_inference_model(folder)
        state: dict[str, Tensor] = load_file(weights)
    return state
