"""One contender in a process of its own, under limits of time and memory: seconds, peak memory, or why it failed.

The process runs `python -m fastdpo.bench.isolated NAME INPUTS ...` and prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from .from_logits import LogitsBatch
from .measure import peak_mib
from .providers import NEEDS, Batch, first_tokens, run

LOADING = 60  # seconds, for imports, inputs and compilation, on top of the limit of a run
SHORT = 5  # seconds; a shorter run is repeated, and the better time taken


class Outcome(NamedTuple):
    """Of one contender. `failed` is None, or in words why there are no numbers."""

    seconds: float | None
    mib: float | None  # peak above inputs and returned gradients
    failed: str | None = None


def run_alone(
    name: str,
    inputs: Path,
    needs: str = "both",
    tokens: int | None = None,
    limit: float | None = None,
    memory_mib: int | None = None,
) -> Outcome:
    """Run a contender once or twice in a new process.

    Args:
        name: of PROVIDERS, or of FROM_LOGITS for a LogitsBatch.
        inputs: file that holds the fields of a Batch or LogitsBatch, by torch.save.
        needs: "both" gradients, "frozen" (of hidden alone), "forward" (none).
        tokens: the first so many, spread over the sequences; None: all.
        limit: seconds that a run may take.
        memory_mib: data that the process may hold (RLIMIT_DATA), inputs and libraries included; None: what is free.
    """
    command = [sys.executable, "-m", "fastdpo.bench.isolated", name, str(inputs), "--needs", needs]
    command += [] if tokens is None else ["--tokens", str(tokens)]
    command += [] if memory_mib is None else ["--memory-mib", str(memory_mib)]
    late = Outcome(None, None, f"more than {limit} s")
    try:
        timeout = None if limit is None else limit + LOADING
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return late
    if done.returncode:
        # The kernel kills, the allocator raises
        memory = "memory" in done.stderr.lower() or "bad_alloc" in done.stderr or done.returncode < 0
        return Outcome(None, None, "memory" if memory else (done.stderr.strip() or "no message").splitlines()[-1])
    found = Outcome(**json.loads(done.stdout.splitlines()[-1]))
    return late if limit is not None and found.seconds is not None and found.seconds > limit else found


def run_here(name: str, batch: Batch | LogitsBatch, needs: str) -> Outcome:
    """For a process of its own: what `run_alone` returns."""
    for few in (8, 12):  # libraries loaded; torch.compile has seen that N varies
        run(name, first_tokens(batch, few), needs)
    inputs = {field.data_ptr() for field in batch if isinstance(field, torch.Tensor)}
    # A gradient written over an input is no memory of its own
    peak, seconds = peak_mib(lambda: [x for x in run(name, batch, needs)[1:] if x.data_ptr() not in inputs])
    if seconds < SHORT:
        start = time.perf_counter()
        run(name, batch, needs)
        seconds = min(seconds, time.perf_counter() - start)
    return Outcome(seconds, peak)


def limit_memory(mib: int | None) -> None:
    """Allocations beyond `mib` (None: nine tenths of what is free now) fail in this process (not on Windows)."""
    import resource

    import psutil

    most = int(psutil.virtual_memory().available * 0.9) if mib is None else mib * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--needs", default="both", choices=NEEDS)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--memory-mib", type=int)
    options = parser.parse_args()
    limit_memory(options.memory_mib)
    fields = torch.load(options.inputs, weights_only=True)
    batch = (Batch if len(fields) == len(Batch._fields) else LogitsBatch)(*fields)
    if options.tokens is not None:
        batch = first_tokens(batch, -(-options.tokens // len(batch.lengths)))
    print(json.dumps(run_here(options.name, batch, options.needs)._asdict()))


if __name__ == "__main__":
    main()
