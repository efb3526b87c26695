"""Speed of one training step against the peers, on one thread: `python benchmarks/transcoders.py [--quick]`.

Every contender is a process of its own that runs its package's own training loop on the same synthetic tokens, in
float32, Adam included. The processes take turns, a few steps each, so that whatever else the machine does meets all
of them alike; figures are CPU seconds (user and system), medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contenders import interpreter, is_ours, one_thread

FOLDER = Path(__file__).resolve().parent
EXPANSION, K = 8, 64
SIZES = tuple((d, batch) for d in (576, 768) for batch in (2048, 4096, 8192))
QUICK_SIZE = (576, 4096)
ROUNDS = 7
QUICK_SECONDS = 60.0
"""After this much time in turns, --quick takes no further turn (but never fewer than three)."""

NOT_QUICK = ("saelens_autoencoder_sparse", "sparsify_transcoder")
"""Left out of --quick: the peers' other settings."""

LABELS = {
    "encoder_product": "encoder product alone",
    "naive": "naive dense PyTorch",
    "dictionary_learning_autoencoder": "dictionary_learning",
    "saelens_autoencoder": "SAELens",
    "saelens_autoencoder_sparse": "SAELens, sparse activations",
    "sparsify_autoencoder": "sparsify, autoencoder",
    "sparsify_transcoder": "sparsify, transcoder",
    "ours": "ours, fp32",
    "ours_bf16": "ours, bf16 selection",
    "ours_int8": "ours, int8 selection",
    "dictionary_learning_batch_topk": "dictionary_learning, BatchTopK",
    "saelens_batch_topk": "SAELens, BatchTopK",
    "ours_batch_topk": "ours, BatchTopK",
    "dictionary_learning_jumprelu": "dictionary_learning, JumpReLU",
    "saelens_jumprelu": "SAELens, JumpReLU",
    "ours_jumprelu": "ours, JumpReLU",
}
"""Contenders in the order of the table."""

OTHERS = ("batch_topk", "jumprelu")
"""Activation functions beside TopK, with contenders of their own beside the encoder product and a plain TopK."""


@dataclass(frozen=True)
class Measured:
    """One contender at one size.

    Attributes:
        seconds: CPU seconds a step, one figure a turn.
        step_bytes: growth of the resident set over the first two steps, without Adam's two moments.
    """

    contender: str
    d: int
    batch: int
    seconds: tuple[float, ...]
    step_bytes: float

    @property
    def median(self) -> float:
        """CPU seconds a step."""
        return statistics.median(self.seconds)


class Worker:
    """A contender's process (`timing_worker.py`), which waits between commands."""

    def __init__(self, contender: str, d: int, batch: int, **environment: str) -> None:
        self.contender = contender
        sizes = json.dumps({"d": d, "m": EXPANSION * d, "k": K, "batch": batch})
        self._process = subprocess.Popen(
            [interpreter(contender), FOLDER / "timing_worker.py", contender, sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=one_thread() | environment,
        )

    def ask(self, command: str) -> float:
        """The answer to one command.

        Raises:
            RuntimeError: the process has ended; its message ends with what it wrote last.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(command, file=self._process.stdin, flush=True)
            return float(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            _, wrote = self._process.communicate()
            raise RuntimeError(
                f"{self.contender}: expected an answer to {command!r}, it ended: {wrote[-2000:]}"
            ) from None

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def adam_bytes(d: int) -> int:
    """Of Adam's two float32 moments of encoder, decoder and their biases."""
    m = EXPANSION * d
    return 2 * 4 * (2 * m * d + m + d)


def grown_by(contender: str, d: int, batch: int) -> float:
    """Bytes of a step beside weights and Adam's moments, in a process of its own."""
    # glibc would keep freed tensors of this size for itself, and the resident set would show what was, not what is.
    worker = Worker(contender, d, batch, MALLOC_MMAP_THRESHOLD_="1000000")
    try:
        return worker.ask("memory") - (0 if contender == "encoder_product" else adam_bytes(d))
    finally:
        worker.stop()


def measure(contenders: Sequence[str], d: int, batch: int, rounds: int, seconds: float) -> list[Measured]:
    """All contenders at one size, in turns: `rounds` turns, or as many (at least three) as start within `seconds`."""
    grown = [grown_by(name, d, batch) for name in contenders]
    workers: list[Worker] = []
    try:
        for name in contenders:
            workers.append(Worker(name, d, batch))
            workers[-1].ask("2")  # warms up
            _note(f"d={d} B={batch}: {name} ready")
        times: dict[str, list[float]] = {name: [] for name in contenders}
        start = time.monotonic()
        for turn in range(rounds):
            if turn >= 3 and time.monotonic() - start > seconds:
                break
            for worker in workers[turn % len(workers) :] + workers[: turn % len(workers)]:
                steps = _steps_a_turn(worker.contender)
                times[worker.contender].append(worker.ask(str(steps)) / steps)
            _note(f"d={d} B={batch}: turn {turn + 1}")
    finally:
        for worker in workers:
            worker.stop()
    return [Measured(n, d, batch, tuple(times[n]), size) for n, size in zip(contenders, grown, strict=True)]


def _steps_a_turn(contender: str) -> int:
    """Fast ones take more."""
    return 4 if contender == "encoder_product" else 3 if is_ours(contender) else 1


def _contenders(activation: str, quick: bool) -> list[str]:
    if activation in OTHERS:
        return ["encoder_product", "naive", *(name for name in LABELS if name.endswith(activation))]
    return [name for name in LABELS if not name.endswith(OTHERS) and not (quick and name in NOT_QUICK)]


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(measured: Sequence[Measured]) -> str:
    """Markdown rows: one a contender, for one size."""
    by_name = {row.contender: row for row in measured}
    first = measured[0]
    m = EXPANSION * first.d
    lines = [
        f"d = {first.d}, m = {m}, k = {K}, {first.batch} tokens a step, one thread",
        "",
        "| | CPU s a step | spread | tokens / CPU s | ÷ encoder product | memory of a step, MB | ÷ naive |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in measured:
        product, naive = by_name["encoder_product"], by_name["naive"]
        lines.append(
            f"| {LABELS[row.contender]} | {row.median:.3f} | {min(row.seconds):.3f}–{max(row.seconds):.3f} "
            f"| {row.batch / row.median:,.0f} | {row.median / product.median:.2f} "
            f"| {row.step_bytes / 1e6:.0f} | {row.step_bytes / naive.step_bytes:.2f} |"
        )
    return "\n".join(lines)


def ratios(measured: Sequence[Measured]) -> dict[str, float]:
    """Our speed over each peer's, and our time and memory over the yardsticks', for one size.

    `x_sparsify` and `x_saelens` are over autoencoders with the packages' defaults, as for dictionary_learning, which
    has nothing else; `x_sparsify_transcoder` and `x_saelens_sparse` are over other settings of those packages. Of
    another activation function than TopK the names begin with it, and `naive` is a TopK all the same.
    """
    seconds = {row.contender: row.median for row in measured}
    memory = {row.contender: row.step_bytes for row in measured}
    peers = {
        "sparsify": "sparsify_autoencoder",
        "dictionary_learning": "dictionary_learning_autoencoder",
        "saelens": "saelens_autoencoder",
        "sparsify_transcoder": "sparsify_transcoder",
        "saelens_sparse": "saelens_autoencoder_sparse",
        "naive": "naive",
    }
    found: dict[str, float] = {}
    for prefix in ("", "bf16_", "int8_", *(f"{activation}_" for activation in OTHERS)):
        name = f"ours_{prefix}".rstrip("_")
        if name not in seconds:
            continue
        same = {peer: f"{peer}_{prefix[:-1]}" for peer in ("dictionary_learning", "saelens") if prefix[:-1] in OTHERS}
        for key, peer in (peers | same).items():
            if peer in seconds:
                found[f"{prefix}x_{key}"] = seconds[peer] / seconds[name]
        found[f"{prefix or 'fp32_'}over_encoder_gemm"] = seconds[name] / seconds["encoder_product"]
        found[f"{prefix}memory_over_naive"] = memory[name] / memory["naive"]
    return {key: round(value, 3) for key, value in found.items()}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"d, tokens a step = {QUICK_SIZE} only; under 3 minutes")
    parser.add_argument("--activation", choices=("topk", *OTHERS), default="topk", help="function of the dictionaries")
    parser.add_argument("--sizes", nargs="+", metavar="DxB", help="d and tokens a step, for example 768x2048")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each contender")
    parser.add_argument("--json", type=Path, help="file for every figure")
    arguments = parser.parse_args()
    interpreter("naive")  # the peers' environment, before anything is timed
    rows: list[Measured] = []
    summary: dict[str, Any] = {}
    contenders = _contenders(arguments.activation, arguments.quick)
    limit = QUICK_SECONDS if arguments.quick else float("inf")
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes or ()] or SIZES
    for d, batch in (QUICK_SIZE,) if arguments.quick else sizes:
        size = measure(contenders, d, batch, arguments.rounds, limit)
        rows += size
        summary[f"d{d}_B{batch}"] = ratios(size)
        print(table(size), end="\n\n", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "ratios": summary}, indent=1))
    print(json.dumps(summary.get(f"d{QUICK_SIZE[0]}_B{QUICK_SIZE[1]}", summary)))


if __name__ == "__main__":
    main()
