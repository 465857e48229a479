"""One case: its contenders checked, then timed in turn, and their memory taken, each in a process of its own."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdpo import linear_token_logps
from fastdpo.bench import providers
from fastdpo.bench.from_logits import FROM_LOGITS, NO_CPU_PATH, LogitsBatch
from fastdpo.bench.gate import Gate, WrongResult
from fastdpo.bench.isolated import Outcome, run_alone
from fastdpo.bench.measure import alternating
from fastdpo.bench.providers import PACKAGES, Batch, first_tokens, run
from fastdpo.saved import unflatten

from . import cost
from .cases import Case, Shape
from .inputs import make

FEW, CHECKED = 8, 64  # tokens of the two gates
SLOW = 6.0  # seconds for FEW tokens: all of them are left to a process of its own, which is stopped
MEMORY_SECONDS = 6.0  # of a contender, about: two processes run at a time
PATIENCE = 2.5  # such a process, its loading included, must leave time for the others
MOST_ROUNDS = 7
KEPT_OF = 256  # tokens of fastdpo's tile, in which columns are kept
BASELINE = {"hidden": "product alone", "logits": "copy alone"}


class Result(NamedTuple):
    """Of one contender, or of the machine (BASELINE)."""

    rounds: list[float]  # seconds; none where `failed` says why
    failed: str | None = None
    info: dict[str, Any] = {}  # noqa: RUF012 -- never written to

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)


def contenders(case: Case) -> list[str]:
    if case.entry == "hidden":
        return list(providers.PROVIDERS)
    return [*FROM_LOGITS, *NO_CPU_PATH]


def measure(
    case: Case,
    shape: Shape,
    seconds: float,
    limit: float,
    names: list[str] | None = None,
    memory: bool = True,
) -> dict[str, Result]:
    """All contenders of a case, and the machine.

    Args:
        shape: of the case on this machine.
        seconds: to stay within, about.
        limit: seconds of one run; a contender that would take longer is run in a process of its own, and stopped.
        names: of the contenders; None: all.
        memory: take it too, if `seconds` allows.
    """
    begin = time.perf_counter()
    names = contenders(case) if names is None else names
    for_memory = MEMORY_SECONDS * len(names)
    memory = memory and seconds >= 2 * for_memory
    timed = seconds - for_memory * memory
    batch = make(case, shape)
    gates = [Gate(batch, case.needs, tokens) for tokens in (FEW, CHECKED)]
    failed: dict[str, str] = {}
    errors: dict[str, list[float]] = {}
    slow: dict[str, str] = {}
    for name in names:
        try:
            if name in NO_CPU_PATH and case.entry == "logits":
                failed[name] = NO_CPU_PATH[name]
                continue
            errors[name], said = check(name, gates, shape.tokens, limit)
            if said:
                slow[name] = said
        except WrongResult as wrong:
            failed[name] = f"wrong result: {wrong}"
        except ImportError:
            failed[name] = f"not installed: {PACKAGES.get(name, name)}"
        except Exception as error:  # the others are measured all the same
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    work = work_of(case, shape, batch)
    del gates
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inputs.pt"
        if memory or (slow and timed > PATIENCE * limit):
            torch.save(tuple(batch), file)
        alone: dict[str, Outcome] = {}
        for name, said in slow.items():
            # Rather one contender without a time than a case without
            spare = timed > PATIENCE * limit
            alone[name] = run_alone(name, file, case.needs, limit=limit) if spare else Outcome(None, None, said)
        left = timed - (time.perf_counter() - begin)
        calls, before = runs(case, batch, [name for name in errors if name not in slow])
        times = alternating(calls, MOST_ROUNDS, warmup=0, before=before, seconds=max(0.0, left))
        if memory and seconds - (time.perf_counter() - begin) > for_memory / 2:
            with ThreadPoolExecutor(2) as pool:
                waiting = {
                    name: pool.submit(run_alone, name, file, case.needs, limit=60)
                    for name in errors
                    if name not in slow
                }
                alone |= {name: future.result() for name, future in waiting.items()}
    results = {BASELINE[case.entry]: Result(times[BASELINE[case.entry]])}
    for name in names:
        results[name] = result(name, work, times.get(name), failed.get(name), errors.get(name), alone.get(name))
    return results


def check(name: str, gates: list[Gate], tokens: int, limit: float) -> tuple[list[float], str]:
    """The errors of a contender; and in words, if it is slower than the limit allows, what it took."""
    few, more = gates
    errors = few.errors(name)
    if few.seconds[name] > SLOW:
        few.errors(name)  # once more: the first time, some are compiled
    counts = [len(gate.part.labels) for gate in gates]
    if few.seconds[name] > SLOW:
        return errors, f"{few.seconds[name]:.0f} s for {counts[0]} of {tokens} tokens, no time for more"
    errors = more.errors(name)
    each = max(0.0, more.seconds[name] - few.seconds[name]) / max(1, counts[1] - counts[0])
    if more.seconds[name] + each * (tokens - counts[1]) > limit:
        return errors, f"{more.seconds[name]:.0f} s for {counts[1]} of {tokens} tokens, no time for more"
    return errors, ""


def runs(
    case: Case, batch: Batch | LogitsBatch, names: list[str]
) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """What is timed, and what has to run before some, off the clock."""
    calls: dict[str, Callable[[], object]] = {name: lambda name=name: run(name, batch, case.needs) for name in names}
    before: dict[str, Callable[[], object]] = {}
    if isinstance(batch, LogitsBatch):
        scratch = batch._replace(logits=batch.logits.clone())
        restore = lambda: scratch.logits.copy_(batch.logits)  # noqa: E731
        if "fastdpo, in place" in calls:
            calls["fastdpo, in place"] = lambda: run("fastdpo, in place", scratch, case.needs)
            before["fastdpo, in place"] = restore
        calls[BASELINE["logits"]] = restore
    else:
        calls[BASELINE["hidden"]] = product_alone(batch)
    return calls, before


def product_alone(batch: Batch) -> Callable[[], None]:
    """The logits, a tile of 256 tokens at a time over the last one: what no head can do without."""
    buffer = batch.hidden.new_empty((256, len(batch.weight))).zero_()  # its pages are there before the clock runs

    def product() -> None:
        for tile in batch.hidden.split(256):
            torch.mm(tile, batch.weight.T, out=buffer[: len(tile)])

    return product


def work_of(case: Case, shape: Shape, batch: Batch | LogitsBatch) -> cost.Work:
    counted = int((batch.labels >= 0).sum())
    longest = len(batch.lengths) * max(batch.lengths)
    kept = None
    if isinstance(batch, Batch) and case.needs != "forward":
        kept = kept_share(first_tokens(batch, KEPT_OF // len(batch.lengths)))
    width = shape.width if case.entry == "hidden" else 0
    sizes = shape.vocab, width, batch[0].element_size()
    return cost.Work(shape.tokens, counted, longest, *sizes, case.needs, kept)


def kept_share(batch: Batch) -> float | None:
    """Share of the logits' gradient that fastdpo computes; None: all of it, exactly."""
    weight = batch.weight.detach().requires_grad_()
    function = linear_token_logps(batch.hidden, weight, batch.labels).logps.grad_fn
    saved = unflatten(function.saved_layout, function.saved_tensors[7:])
    kept = [tile for *_, tile in saved.tiles if hasattr(tile, "columns")] if saved else []
    return sum(len(tile.columns) for tile in kept) / len(kept) / len(batch.weight) if kept else None


def result(
    name: str,
    work: cost.Work,
    times: list[float] | None,
    failed: str | None,
    errors: list[float] | None,
    alone: Outcome | None,
) -> Result:
    info: dict[str, Any] = {"errors": errors, "mib": alone.mib if alone else None}
    if times is None and alone is not None:
        info["alone"] = True  # one run in a process of its own, not in turn
        times, failed = ([alone.seconds], None) if alone.seconds is not None else (None, alone.failed)
    elif alone is not None and alone.failed:
        info["memory failed"] = alone.failed
    if failed or not times:
        return Result([], failed or "not measured", {})
    if work.width and name in cost.PRODUCTS:
        info |= {"operations": cost.operations(name, work), "logits_mib": cost.logits_held(name, work) / 2**20}
    else:
        info["bytes"] = cost.least_moved(work)
    return Result(times, None, info)
