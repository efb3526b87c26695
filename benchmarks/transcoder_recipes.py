"""Recipes of transcoders by number of tokens, as Hydra multiruns: `python benchmarks/transcoder_recipes.py --text GLOB
--heldout GLOB [--json FILE] [--sweeps NAME …] [--batches N …] [--layer N] [--jobs N] [--distinct N] [key=value …]`.

For each sweep of `SWEEPS`, a multirun of `train.py` over learning rates at each batch size: an MLP of SmolLM2-135M,
by default that of layer 10, k = 64, m = 4,608, one seed. Then every dictionary is measured on the first `HELDOUT`
tokens of files that no training read. `--jobs` jobs run at a time; those with as many tokens share one capture, also
those of another process, so the batch sizes of a sweep can be divided over several (`--batches`). A sweep whose
tokens are more than `--distinct` draws that many several times. What is in `paths.runs` already is not trained again;
a training that failed, because its loss diverged for one, says why and has no figures.

On a GPU: `trainer=gpu model=hf model.path=FOLDER model.device_map=cuda`, the folder being a `save_pretrained` copy of
the model. Ends with a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from affinities import pipeline
from rich.console import Console
from torch import Tensor

from hagd.activations.capture import capture
from hagd.activations.corpus import corpus_tokens
from hagd.activations.outliers import Outliers
from hagd.config.activations import Corpus
from hagd.models.language_model import LanguageModel, rows_a_pass
from hagd.transcoders.records import Transcoder, TranscoderSet

HELDOUT = 65_536

RATES = (0.00175, 0.0035, 0.007, 0.014)
SETTINGS = (
    "model=smollm2_135m",
    "task=ioi",
    "transcoder.k=64",
    "transcoder.expansion=8",
    "transcoder.selection=bfloat16",
    "transcoder.lambda_prediction=0",
    "transcoder.activations.keep=true",
    "transcoder.activations.dtype=bfloat16",
    "tracking=disabled",
)


@dataclass(frozen=True)
class Sweep:
    """Trainings with one number of tokens.

    Attributes:
        recipe: the configuration that is varied.
        tokens: of a training.
        batches: tokens a step; one multirun each.
        rates: of each multirun.
    """

    recipe: str
    tokens: int
    batches: tuple[int, ...]
    rates: tuple[float, ...] = RATES


SWEEPS = {
    "400k": Sweep("tokens_400k", 400_000, (128, 256, 512)),
    "5m": Sweep("tokens_5m", 5_000_000, (512, 1024, 2048), RATES[:3]),
    "100m": Sweep("tokens_100m", 100_000_000, (2048, 4096, 8192), RATES[:3]),
}


@dataclass(frozen=True)
class Row:
    """A training and what its dictionary leaves unexplained.

    Attributes:
        fvu: unexplained variance on held-out tokens.
        dead: share of features that never fire on them.
        tokens_per_second: of the training.
        waiting: share of its time spent waiting for activations.
    """

    sweep: str
    batch: int
    rate: float
    fvu: float
    dead: float
    tokens_per_second: float
    waiting: float


def overrides(sweep: Sweep, batch: int, layer: int, distinct: int, text: str, extra: Sequence[str]) -> list[str]:
    """What all trainings of a multirun have in common."""
    n_tokens = min(sweep.tokens, distinct)
    return [
        *SETTINGS,
        f"recipe={sweep.recipe}",
        f"transcoder.layers=[{layer}]",
        f"transcoder.batch_size={batch}",
        f"transcoder.steps={sweep.tokens // batch}",
        f"transcoder.corpus={{data_files: '{text}', n_tokens: {n_tokens}}}",
        *extra,
    ]


def multirun(common: Sequence[str], rates: Sequence[float], jobs: int) -> None:
    """Run `train.py -m` over the rates; its output goes to standard error."""
    launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"] if jobs > 1 else []
    swept = f"transcoder.learning_rate={','.join(map(str, rates))}"
    train = Path(__file__).resolve().parents[1] / "train.py"
    command = [sys.executable, str(train), "-m", "stage=transcoder", *launcher, *common, swept]
    subprocess.run(command, stdout=sys.stderr, check=False)


@torch.no_grad()
def heldout(lm: LanguageModel, layer: int, text: str) -> tuple[Tensor, Tensor]:
    """Inputs and outputs `[n, d]` of a layer on the first `HELDOUT` tokens of `text`, without massive activations."""
    assert lm.tokenizer is not None
    with tempfile.TemporaryDirectory() as folder:
        tokens = corpus_tokens(Corpus(data_files=text, n_tokens=HELDOUT), lm.tokenizer, Path(folder)).long()
    parts = [capture(lm, rows.to(lm.device), "mlp", [layer]) for rows in tokens.split(rows_a_pass(tokens.shape[1]))]
    x, y = (torch.cat(side, 1).flatten(1, 2) for side in zip(*parts, strict=True))
    keep = Outliers.of(x.norm(dim=-1), y.norm(dim=-1)).keep(x, y)
    return x[0, keep], y[0, keep]


@torch.no_grad()
def unexplained(transcoder: Transcoder, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Unexplained variance of `y` and share of dead features."""
    error, fired = 0.0, torch.zeros(len(transcoder.b_enc), dtype=torch.bool, device=x.device)
    for inputs, outputs in zip(x.split(4096), y.split(4096), strict=True):
        f = transcoder.encode(inputs)
        fired |= (f > 0).any(0)
        error += float((outputs - transcoder.decode(f)).square().sum())
    return error / float((y - y.mean(0)).square().sum()), 1 - float(fired.float().mean())


def measured(
    name: str, common: list[str], batch: int, rates: Sequence[float], tokens: tuple[Tensor, Tensor]
) -> list[Row]:
    """The rows of a multirun that is done, of the trainings that came to their end."""
    rows = []
    for rate in rates:
        stages = pipeline(0, [*common, f"transcoder.learning_rate={rate}"], Console(quiet=True))
        if not stages.store.contains("transcoders", stages.key("transcoders")):
            continue
        found: TranscoderSet = stages.get("transcoders")
        fvu, dead = unexplained(found.to(tokens[0].device).transcoders[0], *tokens)
        rows.append(Row(name, batch, rate, fvu, dead, found.tokens_per_second, found.waiting))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line a batch size, a column a rate; unexplained variance, and dead features where 0.05 % and more."""
    rates = sorted({row.rate for row in rows})
    lines = ["| tokens | batch | " + " | ".join(map(str, rates)) + " |", "| --- | --- |" + " --- |" * len(rates)]
    for name, batch in dict.fromkeys((row.sweep, row.batch) for row in rows):
        cells = {row.rate: row for row in rows if (row.sweep, row.batch) == (name, batch)}
        shown = [f"{cells[r].fvu:.4f} ({cells[r].dead:.1%})" if r in cells else "–" for r in rates]
        lines.append(f"| {name} | {batch} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="text files that train, a glob pattern")
    parser.add_argument("--heldout", required=True, help="text files that do not")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--batches", type=int, nargs="+", help="only these batch sizes")
    parser.add_argument("--layer", type=int, default=10, help="whose MLP is explained")
    parser.add_argument("--jobs", type=int, default=1, help="at a time; more than one need Hydra's joblib launcher")
    parser.add_argument("--distinct", type=int, default=10**9, help="tokens that are captured at most")
    parser.add_argument("--json", type=Path, help="file for every figure")
    extra = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("--")]
    arguments = parser.parse_args([argument for argument in sys.argv[1:] if argument not in extra])
    runs = [
        (name, batch, overrides(SWEEPS[name], batch, arguments.layer, arguments.distinct, arguments.text, extra))
        for name in SWEEPS
        if name in arguments.sweeps
        for batch in SWEEPS[name].batches
        if arguments.batches is None or batch in arguments.batches
    ]
    for name, _, common in runs:
        multirun(common, SWEEPS[name].rates, arguments.jobs)

    tokens = heldout(pipeline(0, runs[0][2], Console(quiet=True)).lm, arguments.layer, arguments.heldout)
    rows = [row for name, batch, common in runs for row in measured(name, common, batch, SWEEPS[name].rates, tokens)]
    on = torch.cuda.get_device_name() if tokens[0].is_cuda else "CPU"
    result = {"command": "benchmarks/transcoder_recipes.py", "device": on, "heldout_tokens": len(tokens[0])}
    result |= {"layer": arguments.layer, "distinct": arguments.distinct, "rows": [asdict(row) for row in rows]}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows), json.dumps(result), sep="\n\n")


if __name__ == "__main__":
    main()
