"""One contender in a process of its own, under limits of time and memory: seconds, peak memory, or why it failed.

The process runs `python -m fastdpo.bench.isolated NAME INPUTS ...`; it answers each line on its standard input with one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .from_logits import LogitsBatch
from .gate import Gate, WrongResult
from .measure import Cost, cost_on, data_mib
from .providers import COMPILED, NEEDS, Batch, first_tokens, run

LOADING = 60  # seconds, for imports, inputs and compilation, on top of the limit of a run
SHORT = 5  # seconds; a shorter run is repeated, and the better time taken
CHECKED_TOKENS = 64


class Outcome(NamedTuple):
    """Of one contender. `failed` is None, or in words why there are no numbers."""

    seconds: float | None
    mib: float | None  # peak above inputs and returned gradients
    failed: str | None = None


class Failed(Exception):
    """A contender's process ended, or was ended, without an answer; the message says why, in a few words."""


class Contender:
    """A contender in a new process, which loads at once; `run` as often as wanted, `close` (or `with`) at the end.

    Args:
        name: of PROVIDERS, or of FROM_LOGITS for a LogitsBatch.
        inputs: file that holds the fields of a Batch or LogitsBatch, by torch.save.
        needs: "both" gradients, "frozen" (of hidden alone), "forward" (none).
        tokens: the first so many, spread over the sequences; None: all, which contenders of one file then share.
        memory_mib: data that the process may hold (RLIMIT_DATA), inputs and libraries included; None: what is free.
        device: where it runs.
    """

    def __init__(
        self,
        name: str,
        inputs: Path,
        needs: str = "both",
        tokens: int | None = None,
        memory_mib: int | None = None,
        device: str = "cpu",
    ) -> None:
        command = [sys.executable, "-m", "fastdpo.bench.isolated", name, str(inputs), "--needs", needs]
        command += ["--device", device]
        command += [] if tokens is None else ["--tokens", str(tokens)]
        command += [] if memory_mib is None else ["--memory-mib", str(memory_mib)]
        # One compiler per contender, not one per core, each a process
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1", **os.environ}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )
        self._held: float | None = None
        self._limited = memory_mib is not None

    def ready(self, timeout: float = LOADING) -> float:
        """Wait until it is loaded and warmed up. MiB of data that it holds then: libraries and inputs (0: not known).

        Raises:
            Failed: it could not load, or took longer.
        """
        if self._held is None:
            try:
                self._held = self._answer(timeout)["held_mib"]
            except TimeoutError:
                raise Failed(f"not loaded after {timeout:g} s") from None
        assert self._held is not None
        return self._held

    def run(self, limit: float | None = None) -> Outcome:
        """One run, ended if it takes more than `limit` seconds; then the process has ended, too.

        Raises:
            Failed: there are no numbers.
        """
        self.ready()
        try:
            return Outcome(**self._ask("run", limit))
        except TimeoutError:
            raise Failed(f"more than {limit:g} s") from None

    def check(self, timeout: float = LOADING) -> None:
        """Raise Failed where its results on a part of the inputs are wrong, or do not come."""
        self.ready()
        try:
            wrong = self._ask("check", timeout)["wrong"]
        except TimeoutError:
            raise Failed(f"more than {timeout:.0f} s for {CHECKED_TOKENS} tokens") from None
        if wrong is not None:
            raise Failed(f"refused, {wrong}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, what: str, timeout: float | None) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._why()) from None
        return self._answer(timeout)

    def _answer(self, timeout: float | None) -> dict[str, Any]:
        """The next line; TimeoutError, and the process is killed, if it does not come."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            self._process.kill()
            raise TimeoutError
        line = self._process.stdout.readline()
        if not line:
            raise Failed(self._why())
        return json.loads(line)

    def _why(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read()
        # The kernel kills, the allocator raises; under a limit libraries also fall over a null pointer
        ends = {signal.SIGKILL, signal.SIGABRT, signal.SIGBUS} | ({signal.SIGSEGV} if self._limited else set())
        if -code in ends or "memory" in said.lower() or "bad_alloc" in said:
            return "memory"
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return (said.strip() or "no message").splitlines()[-1]


def run_alone(
    name: str,
    inputs: Path,
    needs: str = "both",
    tokens: int | None = None,
    limit: float | None = None,
    memory_mib: int | None = None,
    device: str = "cpu",
) -> Outcome:
    """Run a contender once or twice in a new process; the arguments are `Contender`'s.

    Args:
        limit: seconds that a run may take.
    """
    try:
        with Contender(name, inputs, needs, tokens, memory_mib, device) as contender:
            first = contender.run(limit)
            assert first.seconds is not None
            if first.seconds >= SHORT:
                return first
            again = contender.run(limit)
            assert again.seconds is not None
            return first._replace(seconds=min(first.seconds, again.seconds))
    except Failed as failed:
        return Outcome(None, None, str(failed))


# --- in the process of its own ---------------------------------------------------------------------------------------


def warm_up(name: str, batch: Batch | LogitsBatch, needs: str) -> None:
    """Libraries are loaded, and torch.compile has seen that N varies."""
    for few in (8, 12) if name in COMPILED else (2,):
        run(name, first_tokens(batch, few), needs)


def run_here(name: str, batch: Batch | LogitsBatch, needs: str) -> Cost:
    """One run; for a process of its own."""
    inputs = {field.data_ptr() for field in batch if isinstance(field, Tensor)}
    # A gradient written over an input is no memory of its own
    own = lambda: [x for x in run(name, batch, needs)[1:] if x.data_ptr() not in inputs]  # noqa: E731
    cost = cost_on(batch[0].device)(own)
    return cost._replace(mib=max(cost.mib, 0.0))  # a gradient may lie in memory that was there before


def verify(name: str, batch: Batch | LogitsBatch, needs: str) -> None:
    """Raise WrongResult for results that are not those of float32 mathematics, on a part of the batch."""
    Gate(batch, needs, CHECKED_TOKENS).errors(name)


def limit_memory(mib: int | None) -> None:
    """Allocations beyond `mib` (None: nine tenths of what is free now) fail in this process (not on Windows)."""
    import resource

    import psutil

    most = int(psutil.virtual_memory().available * 0.9) if mib is None else mib * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def load(inputs: Path, tokens: int | None, device: str) -> Batch | LogitsBatch:
    """The batch in a file; hidden states and head mapped, logits read, as a contender may write over them."""
    mapped = tokens is None and device == "cpu"
    fields = torch.load(inputs, weights_only=True, mmap=mapped, map_location=device)
    batch: Batch | LogitsBatch
    batch = Batch(*fields) if len(fields) == len(Batch._fields) else LogitsBatch(fields[0].clone(), *fields[1:])
    return batch if tokens is None else first_tokens(batch, -(-tokens // len(batch.lengths)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--needs", default="both", choices=NEEDS)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--memory-mib", type=int)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a contender prints is no answer
    if options.device == "cpu":
        limit_memory(options.memory_mib)
    batch = load(options.inputs, options.tokens, options.device)
    warm_up(options.name, batch, options.needs)

    def answer(**found: Any) -> None:
        print(json.dumps(found), file=answers, flush=True)

    answer(held_mib=data_mib())
    for line in sys.stdin:
        if line.strip() == "run":
            cost = run_here(options.name, batch, options.needs)
            answer(seconds=cost.seconds, mib=cost.mib)
        else:
            try:
                verify(options.name, batch, options.needs)
                answer(wrong=None)
            except WrongResult as error:
                answer(wrong=str(error))


if __name__ == "__main__":
    main()
