"""Eight mini extractions as one sweep: a joblib launcher with two workers against one, one thread each.

python benchmarks/sweep.py [--turns 1] [--jobs 8] [--json FILE] [settings of extract.py …]

Every turn starts from empty folders and measures wall time, the start of Python and of workers included. Turns of one
and of two workers alternate. Needs hagd[joblib].
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = (1, 2)


def sweep(workers: int, jobs: int, settings: list[str]) -> float:
    """Wall seconds of the sweep.

    Raises:
        RuntimeError: a job failed.
    """
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, str(ROOT / "extract.py"), "-m", "hydra/launcher=joblib"]
        command += [f"hydra.launcher.n_jobs={workers}", "trainer.threads=1", f"seed=range({jobs})"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        done = subprocess.run(
            [*command, f"paths.runs={runs}", "tracking=disabled", *settings],
            env=environment,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - start
        if done.returncode or len(list((Path(runs) / "jobs").glob("*.json"))) != jobs:
            raise RuntimeError(f"expected {jobs} finished jobs, found:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return seconds


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description="one joblib worker against two")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options, settings = parser.parse_known_args()
    load = [os.getloadavg()[0]]
    seconds: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    for _ in range(options.turns):
        for workers in WORKERS:
            seconds[workers].append(round(sweep(workers, options.jobs, settings), 1))
            load.append(os.getloadavg()[0])
            print(f"{workers} workers: {seconds[workers][-1]} s, load {load[-1]:.1f}", flush=True)
    one, two = (statistics.median(seconds[workers]) for workers in WORKERS)
    result = {
        "jobs": options.jobs,
        "settings": settings,
        "seconds": seconds,
        "speedup": round(one / two, 2),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(each, 1) for each in load],
    }
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
