"""Quality at equal tokens and k on SmolLM2-135M: `python benchmarks/transcoder_quality.py --cache DIR --text GLOB`.

Activations are captured once; every contender trains on the same tokens in the same order, one pass, in a process of
its own, on one thread. Each peer gets the best of three batch sizes (its default, and 1,024 and 512 tokens, so that its
steps are not fewer than ours) at its default learning rate, then the best of at least four rates, both by the held-out
unexplained variance at layer 10; other layers use what was best there. Ours has one recipe and is not tuned. Rows are
written to `--results` as they come; a row that is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from contenders import Training, interpreter, one_thread
from learning_rates import best_rate, next_rate
from plain_dictionary import PlainDictionary, cross_entropy, explained, firing_counts, spliced
from smollm2_activations import (
    PLACES,
    Captured,
    SitePlace,
    capture_all,
    heldout_tokens,
    load_captured,
    load_language_model,
)

FOLDER = Path(__file__).resolve().parent
D, M, K = 576, 4608, 64
N_TRAIN, N_HELDOUT = 400_000, 40_000
TUNED_AT = 10
SMALL_BATCHES = (1024, 512)
_SPLICED_SEQUENCES = 64

Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """A package in one mode.

    Attributes:
        loop: its training loop in `peers.py` or `ours.py`.
        rate: its default learning rate for m = 4,608.
        batch: its default batch: sparsify's 32 sequences at 128 tokens, dictionary_learning's demonstration for models
            of this size, SAELens's `train_batch_size_tokens`; of ours the recipe's.
    """

    name: str
    loop: str
    site: str
    rate: float
    batch: int
    skip: bool = False

    @property
    def tuned(self) -> bool:
        """Whether rates and batches are searched."""
        return not self.name.startswith("ours")


_SIGNUM = 5e-3 / math.sqrt(M / 2**14)
_SCALING_LAW = 2e-4 / math.sqrt(M / 2**14)
_RECIPE = 3e-3

CONTENDERS = (
    Contender("sparsify transcoder", "sparsify_transcoder", "mlp", _SIGNUM, 4096),
    Contender("sparsify transcoder, skip", "sparsify_transcoder", "mlp", _SIGNUM, 4096, skip=True),
    Contender("sparsify autoencoder", "sparsify_autoencoder", "resid", _SIGNUM, 4096),
    Contender("dictionary_learning autoencoder", "dictionary_learning_autoencoder", "resid", _SCALING_LAW, 2048),
    Contender("SAELens autoencoder", "saelens_autoencoder", "resid", 3e-4, 4096),
    Contender("ours transcoder", "ours", "mlp", _RECIPE, 512),
    Contender("ours transcoder, skip", "ours", "mlp", _RECIPE, 512, skip=True),
    Contender("ours autoencoder", "ours", "resid", _RECIPE, 512),
    Contender("ours transcoder, bf16 selection", "ours_bf16", "mlp", _RECIPE, 512),
    Contender("ours transcoder, skip, bf16 selection", "ours_bf16", "mlp", _RECIPE, 512, skip=True),
    Contender("ours autoencoder, bf16 selection", "ours_bf16", "resid", _RECIPE, 512),
)
"""SAELens and dictionary_learning train no TopK transcoders, so sparsify is the only peer there."""


class Results:
    """Rows in a JSON file, which is replaced after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []

    def find(self, contender: str, place: SitePlace, batch: int, rate: float) -> Row | None:
        """The row of one training."""
        for row in self.rows:
            same = (row["contender"], row["place"], row["batch"]) == (contender, place.name, batch)
            if same and math.isclose(row["rate"], rate):
                return row
        return None

    def add(self, row: Row) -> None:
        """Append and write."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Replace the file."""
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"rows": self.rows}, indent=1))
        partial.replace(self._path)


class Benchmark:
    """Trainings, their held-out figures and the results file."""

    def __init__(self, folder: Path, results: Results) -> None:
        self._cache = folder
        self._results = results
        self._loss: Callable[[SitePlace], tuple[float, float]] = cache(self._clean_and_zero)
        self._lm = cache(lambda: load_language_model(folder))

    def run(self, contender: Contender) -> None:
        """Tune where it is tuned, then train on every layer and complete the chosen rows."""
        places = [place for place in PLACES if place.site == contender.site]
        tuning = next(place for place in places if place.layer == TUNED_AT)
        batch, rate = self._choose(contender, tuning) if contender.tuned else (contender.batch, contender.rate)
        for place in places:
            self._complete(contender, place, self._trained(contender, place, batch, rate))

    def _choose(self, contender: Contender, place: SitePlace) -> tuple[int, float]:
        def missed(batch: int, rate: float) -> float:
            return float(self._trained(contender, place, batch, rate)["fvu"])

        batch = min(contender.batch, *SMALL_BATCHES, key=lambda size: missed(size, contender.rate))
        tried: dict[float, float] = {}
        while (rate := next_rate(contender.rate, tried)) is not None:
            tried[rate] = missed(batch, rate)
        return batch, best_rate(tried)

    def _trained(self, contender: Contender, place: SitePlace, batch: int, rate: float) -> Row:
        found = self._results.find(contender.name, place, batch, rate)
        if found is not None:
            return found
        seconds = self._train(contender, place, batch, rate)
        held_out = explained(self._dictionary(contender, place, batch, rate), self._tokens(place, "heldout"))
        row = {
            "contender": contender.name,
            "place": place.name,
            "batch": batch,
            "rate": rate,
            "steps": N_TRAIN // batch,
            "cpu_seconds": seconds,
            **asdict(held_out),
        }
        self._results.add(row)
        print(json.dumps(row), flush=True)
        return row

    def _train(self, contender: Contender, place: SitePlace, batch: int, rate: float) -> float:
        """CPU seconds of the training, whose weights are then in `_weights`."""
        training = Training(
            D, M, K, batch, N_TRAIN // batch, rate, skip=contender.skip, scaled=True, optimizer="signum"
        )
        weights = self._weights(contender, place, batch, rate)
        weights.parent.mkdir(exist_ok=True)
        request = weights.with_suffix(".json")
        tokens = self._cache / f"{place.name}-train.safetensors"
        request.write_text(
            json.dumps(
                {
                    "contender": contender.loop,
                    "tokens": str(tokens),
                    "training": asdict(training),
                    "weights": str(weights),
                }
            )
        )
        command = [interpreter(contender.loop), FOLDER / "training_worker.py", request]
        ran = subprocess.run(command, env=one_thread(), capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(f"{contender.name}: expected exit code 0, found {ran.returncode}: {ran.stderr[-2000:]}")
        return float(ran.stdout.splitlines()[-1])

    def _complete(self, contender: Contender, place: SitePlace, row: Row) -> None:
        """Add what only chosen rows have: dead share on the training tokens, loss recovered."""
        if "loss_recovered" in row:
            return
        dictionary = self._dictionary(contender, place, row["batch"], row["rate"])
        counts = firing_counts(dictionary, self._tokens(place, "train").x)
        clean, zero = self._loss(place)
        lm, text = self._lm(), heldout_tokens(self._cache, _SPLICED_SEQUENCES)
        with spliced(lm, place, self._tokens(place, "heldout"), dictionary):
            replaced = cross_entropy(lm, text)
        row |= {
            "dead_train": float((counts == 0).float().mean()),
            "ce_clean": clean,
            "ce_zero": zero,
            "ce_spliced": replaced,
            "loss_recovered": (zero - replaced) / (zero - clean),
        }
        self._results.write()
        print(json.dumps(row), flush=True)

    def _clean_and_zero(self, place: SitePlace) -> tuple[float, float]:
        """Cross entropy of the model as it is, and with zeros at `place`."""
        lm, text = self._lm(), heldout_tokens(self._cache, _SPLICED_SEQUENCES)
        clean = cross_entropy(lm, text)
        with spliced(lm, place, self._tokens(place, "heldout"), torch.zeros_like):
            return clean, cross_entropy(lm, text)

    def _tokens(self, place: SitePlace, split: str) -> Captured:
        return load_captured(self._cache, place, split)

    def _dictionary(self, contender: Contender, place: SitePlace, batch: int, rate: float) -> PlainDictionary:
        return PlainDictionary.load(self._weights(contender, place, batch, rate), K)

    def _weights(self, contender: Contender, place: SitePlace, batch: int, rate: float) -> Path:
        mode = contender.loop + ("-skip" if contender.skip else "")
        return self._cache / "weights" / f"{mode}-{place.name}-{batch}-{rate:.4g}.safetensors"


def table(rows: Sequence[Row]) -> str:
    """Markdown: the best row of each contender at each place, by held-out unexplained variance."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["place"], row["contender"])
        if key not in best or not row["fvu"] >= best[key]["fvu"]:
            best[key] = row
    lines = [
        "| place | contender | batch | rate | FVU | loss recovered | dead, held-out | dead, training | L0 | CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (place, name), row in sorted(best.items()):
        recovered = f"{row['loss_recovered']:.4f}" if "loss_recovered" in row else "–"
        dead = f"{row['dead_train']:.1%}" if "dead_train" in row else "–"
        lines.append(
            f"| {place} | {name} | {row['batch']} | {row['rate']:.2g} | {row['fvu']:.4f} | {recovered} "
            f"| {row['dead']:.1%} | {dead} | {row['l0']:.1f} | {row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for activations and weights, 15 GB")
    parser.add_argument("--text", required=True, help="text files, a glob pattern (** for any folders)")
    parser.add_argument("--results", type=Path, default=Path("transcoder_quality.json"), help="file of the rows")
    parser.add_argument("--only", nargs="*", default=[""], help="contenders whose name contains one of these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    capture_all(arguments.cache, arguments.text, N_TRAIN, N_HELDOUT)
    results = Results(arguments.results)
    benchmark = Benchmark(arguments.cache, results)
    for contender in CONTENDERS:
        if any(part in contender.name for part in arguments.only):
            benchmark.run(contender)
    print(table(results.rows))


if __name__ == "__main__":
    main()
