"""Quality at equal tokens and k: `python benchmarks/transcoder_quality.py smollm2 --cache DIR --text GLOB`.

Activations of SmolLM2-135M, or of a mini model (`gpt2_mini --cache DIR`), are captured once; every contender trains on
the same tokens in the same order, one pass, in a process of its own, on one thread. At one layer each peer gets four or
more learning rates; the other layers use the best of them. Chosen is by tokens that are neither trained on nor
reported. Ours has one recipe for transcoders and one for autoencoders and is not tuned. Rows are written to `--results`
as they come; a row that is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from captured import SitePlace, Subject
from contenders import Training, interpreter, one_thread
from learning_rates import best_rate, next_rate
from mini_activations import mini
from plain_dictionary import PlainDictionary, cross_entropy, explained, firing_counts, spliced
from quality_contenders import CONTENDERS, OWN, Contender
from smollm2_activations import smollm2

FOLDER = Path(__file__).resolve().parent
SMOLLM2 = "smollm2"
_COUNTED = 50_000
"""Training tokens on which features are counted as dead."""

Row = dict[str, Any]


class Results:
    """Rows in a JSON file, which is replaced after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []

    def find(self, subject: Subject, contender: Contender, place: SitePlace, rate: float, seed: int) -> Row | None:
        """The row of one training; rows without a seed are of seed 0, and those
        without one of our settings have its default."""
        wanted = (subject.name, subject.n_train, contender.name, place.name, contender.batch)
        for row in self.rows:
            same = tuple(row[name] for name in ("subject", "tokens", "contender", "place", "batch")) == wanted
            same = same and row.get("seed", 0) == seed and _own(row) == contender.own
            if same and math.isclose(row["rate"], rate, rel_tol=1e-3):
                return row
        return None

    def add(self, row: Row) -> None:
        """Append and write."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Replace the file."""
        partial = self._path.with_suffix(".partial")
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        partial.write_text(f'{{"rows": [\n{lines}\n]}}\n')
        partial.replace(self._path)


class Benchmark:
    """Trainings, their figures and the results file."""

    def __init__(self, subject: Subject, results: Results, seed: int) -> None:
        self._subject = subject
        self._seed = seed
        self._results = results
        self._clean: Callable[[], float] = cache(self._cross_entropy)
        self._zeroed: Callable[[SitePlace], float] = cache(self._with_zeros)
        (subject.cache / "weights").mkdir(exist_ok=True)

    def run(self, contender: Contender, layer: int) -> None:
        """Train at `layer` with the learning rate that is best at the first layer, and complete that row."""
        place = SitePlace(contender.site, layer)
        rate = self.tune(contender) if contender.tuned else contender.rate
        self._complete(contender, place, self._trained(contender, place, rate, self._seed))

    def try_rates(self, contender: Contender, rates: Sequence[float]) -> None:
        """Train with each of `rates` at the first layer."""
        for rate in rates:
            self._trained(contender, SitePlace(contender.site, self._subject.layers[0]), rate, 0)

    def tune(self, contender: Contender) -> float:
        """The best of at least four learning rates at the first layer."""
        place = SitePlace(contender.site, self._subject.layers[0])
        tried: dict[float, float] = {}
        while (rate := next_rate(contender.default_rate(self._subject.m), tried)) is not None:
            tried[rate] = float(self._trained(contender, place, rate, 0)["fvu_selection"])
        return best_rate(tried)

    def _trained(self, contender: Contender, place: SitePlace, rate: float, seed: int) -> Row:
        subject = self._subject
        found = self._results.find(subject, contender, place, rate, seed)
        if found is not None:
            return found
        seconds = self._train(contender, place, rate, seed)
        dictionary = self._dictionary(contender, place, rate, seed)
        row: Row = {
            "subject": subject.name,
            "tokens": subject.n_train,
            "contender": contender.name,
            "place": place.name,
            "batch": contender.batch,
            "rate": rate,
            **contender.own,
            "seed": seed,
            "steps": subject.n_train // contender.batch,
            "cpu_seconds": seconds,
            "fvu_selection": explained(dictionary, subject.load(place, "selection")).fvu,
        }
        row = _rounded(row)
        self._results.add(row)
        print(json.dumps(row), flush=True)
        return row

    def _train(self, contender: Contender, place: SitePlace, rate: float, seed: int) -> float:
        """CPU seconds of the training, whose weights are then in `_weights`."""
        subject = self._subject
        training = Training(
            subject.lm.d_model,
            subject.m,
            subject.k,
            contender.batch,
            subject.n_train // contender.batch,
            rate,
            skip=contender.skip,
            scaled=True,
            optimizer="signum",
            seed=seed,
            own=contender.own,
        )
        weights = self._weights(contender, place, rate, seed)
        request = weights.with_suffix(".json")
        content = {
            "contender": contender.loop,
            "tokens": str(subject.cache / f"{place.name}-train.safetensors"),
            "training": asdict(training),
            "weights": str(weights),
        }
        request.write_text(json.dumps(content))
        command = [interpreter(contender.loop), FOLDER / "training_worker.py", request]
        ran = subprocess.run(command, env=one_thread(), capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(f"{contender.name}: expected exit code 0, found {ran.returncode}: {ran.stderr[-2000:]}")
        return float(ran.stdout.splitlines()[-1])

    def _complete(self, contender: Contender, place: SitePlace, row: Row) -> None:
        """Add what only chosen rows have: figures on held-out tokens, dead share on training tokens."""
        if "loss_recovered" in row:
            return
        subject = self._subject
        dictionary = self._dictionary(contender, place, row["rate"], row.get("seed", 0))
        counts = firing_counts(dictionary, subject.load(place, "train").x[:_COUNTED])
        clean, zero, heldout = self._clean(), self._zeroed(place), subject.load(place, "heldout")
        with spliced(subject.lm, place, heldout, dictionary):
            replaced = self._cross_entropy()
        completed = {
            **asdict(explained(dictionary, heldout)),
            "dead_train": float((counts == 0).float().mean()),
            "ce_clean": clean,
            "ce_zero": zero,
            "ce_spliced": replaced,
            "loss_recovered": (zero - replaced) / (zero - clean),
        }
        row |= _rounded(completed)
        self._results.write()
        print(json.dumps(row), flush=True)

    def _with_zeros(self, place: SitePlace) -> float:
        """Cross entropy of the model with zeros at `place`."""
        with spliced(self._subject.lm, place, self._subject.load(place, "heldout"), torch.zeros_like):
            return self._cross_entropy()

    def _cross_entropy(self) -> float:
        return float(cross_entropy(self._subject.lm, self._subject.text, self._subject.scored).mean())

    def _dictionary(self, contender: Contender, place: SitePlace, rate: float, seed: int) -> PlainDictionary:
        return PlainDictionary.load(self._weights(contender, place, rate, seed), self._subject.k)

    def _weights(self, contender: Contender, place: SitePlace, rate: float, seed: int) -> Path:
        mode, tokens = contender.loop + ("-skip" if contender.skip else ""), self._subject.n_train
        name = f"{mode}-{place.name}-{tokens}-{contender.batch}-{rate:.4g}" + (f"-seed{seed}" if seed else "")
        name += "".join(f"-{setting}{value:g}" for setting, value in contender.own.items())
        return self._subject.cache / "weights" / f"{name}.safetensors"


def _rounded(row: Row) -> Row:
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}


def table(rows: Sequence[Row]) -> str:
    """Markdown: the rows of chosen trainings, each with our unexplained variance over that row's."""
    lines = [
        "| place | contender | batch | rate | FVU | ours over it | recovered | dead, held-out / training | CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    chosen = [row for row in rows if "loss_recovered" in row]
    ours = {
        (_group(row), row.get("seed", 0)): row["fvu"] for row in chosen if row["contender"] == f"ours {_group(row)[2]}"
    }
    for row in sorted(chosen, key=lambda row: (*_group(row), row["fvu"])):
        own = ours.get((_group(row), row.get("seed", 0)))
        over = "–" if own is None else f"{own / row['fvu']:.3f}"
        lines.append(
            f"| {_group(row)[0]}, {row['place']} | {row['contender']} | {row['batch']} | {_rate(row)} "
            f"| {row['fvu']:.4f} | {over} | {row['loss_recovered']:.4f} "
            f"| {row['dead']:.1%} / {row['dead_train']:.1%} | {row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def _own(row: Row) -> dict[str, float]:
    """What only rows of ours can have."""
    return {name: row[name] for name in OWN if name in row}


def _rate(row: Row) -> str:
    decoders = row.get("decoder_rate", 1.0)
    return f"{row['rate']:.2g}" + (f", decoder × {decoders:g}" if decoders != 1 else "")


def _group(row: Row) -> tuple[str, str, str]:
    """Model, place and kind of dictionary: what can be compared."""
    return f"{row['subject']}, {row['tokens']:,} tokens", row["place"], row["contender"].partition(" ")[2]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"{SMOLLM2}, or a mini model of conf/model")
    parser.add_argument("--cache", type=Path, required=True, help="folder for activations and weights, up to 15 GB")
    parser.add_argument("--text", help=f"text files of {SMOLLM2}, a glob pattern (** for any folders)")
    parser.add_argument("--tokens", type=int, default=256_000, help="of a training; no more than that for SmolLM2")
    parser.add_argument("--results", type=Path, default=Path("transcoder_quality.json"), help="file of the rows")
    parser.add_argument("--only", default="", help="contenders whose name matches this regular expression")
    parser.add_argument(
        "--layers", type=int, nargs="*", help="fewer layers than all; rates are chosen at the first of all"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first weights; rates are chosen with 0")
    parser.add_argument("--batch", type=int, help="only tune, at the first layer, with this many tokens a step")
    parser.add_argument("--rates", type=float, nargs="+", help="with --batch: only train with these learning rates")
    parser.add_argument(
        "--decoder-rate", type=float, help="with --batch: factor of our decoders' rate, with no other setting of ours"
    )
    arguments = parser.parse_args()
    if arguments.model == SMOLLM2 and not arguments.text:
        parser.error(f"--text: expected a glob pattern for {SMOLLM2}, found none")
    torch.set_num_threads(1)
    if arguments.model == SMOLLM2:
        subject = smollm2(arguments.cache, arguments.text, arguments.tokens)
    else:
        subject = mini(arguments.cache, arguments.model, arguments.tokens)
    results = Results(arguments.results)
    benchmark = Benchmark(subject, results, arguments.seed)
    contenders = [each.at(subject.m, subject.n_train) for each in CONTENDERS if re.search(arguments.only, each.name)]
    if arguments.batch is not None:
        for contender in (replace(each, batch=arguments.batch) for each in contenders):
            if arguments.decoder_rate is not None:
                decoders = {} if arguments.decoder_rate == 1 else {"decoder_rate": arguments.decoder_rate}
                contender = replace(contender, own=decoders)
            if arguments.rates:
                benchmark.try_rates(contender, arguments.rates)
            else:
                benchmark.tune(contender)
        return
    for layer in arguments.layers or subject.layers:
        for contender in contenders:
            benchmark.run(contender, layer)
    print(table(results.rows))


if __name__ == "__main__":
    main()
