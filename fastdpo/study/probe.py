"""`fastdpo study --probe`: what a reference would do to a run, before any training and from cached logps alone.

The policy, as it would start, and each reference score the pairs once, into OUTPUT/refs; a second probe, with other
betas say, loads no model. In the output folder: probe.md (also printed), probe.json, probe.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..cache import CacheError, Entries, ReferenceCache, ReferenceModel
from ..cache.model import DTYPES
from ..cache.options import BuildOptions
from ..cache.rows import Preparation, Row, load_tokenizer
from ..options import check_number
from ..train_data import read_pairs
from . import probe_report, probe_samples
from .config import Sampling
from .probe_numbers import compare
from .probe_report import Probe
from .probe_scores import POLICY, read, score, score_answers, tokenizer_of
from .sampling import Answer

BETAS = (0.01, 0.03, 0.1, 0.3, 1.0)
PROMPTS = 16  # answered at once; what a kill loses
OF_SAMPLES = ["max_new_tokens", "seed"]  # options
OF_MODELS = ["max_length", "truncation_mode", "dtype", "batch_tokens", "device"]


class Scored(NamedTuple):
    """A cache that holds everything, and who is who in it."""

    cache: ReferenceCache
    policy: str  # its name there
    references: list[str]
    tokenizer: Any  # the policy's
    answers: dict[str, Entries]  # name -> scores of the policy's own answers, where they were asked for
    prompts: list[int]  # of each answer, which prompt


def main(argv: Sequence[str] | None = None) -> int:
    """Probe. Returns 0, or 1 with one line on stderr if the arguments, the data or a model are not usable."""
    arguments = _parser().parse_args(argv)
    try:
        probe = run(arguments)
        print(probe_report.write(probe, arguments.output))
    except (ValueError, OSError) as error:  # CacheError, DataError, and what options.py raises
        print(f"fastdpo study --probe: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfastdpo study --probe: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    names = ("probe.md", "probe.json", "probe.png")
    print(f"\n{', '.join(str(arguments.output / name) for name in names)}")
    return 0


def run(arguments: argparse.Namespace) -> Probe:
    """Score what is not there yet, and compare.

    Raises:
        CacheError: arguments that contradict one another; what `ReferenceCache.build` and `attach` raise.
        DataError: data that holds no pairs.
    """
    _check(arguments)
    every = read_pairs(arguments.data)
    rows: list[Row] = [every[i] for i in range(min(arguments.limit, len(every)))]
    scored = _from_models(arguments, rows) if arguments.cache is None else _from_cache(arguments, rows)
    policy, answers = scored.policy, scored.answers
    scores = {name: read(scored.cache, name, rows, scored.tokenizer) for name in (policy, *scored.references)}
    ours = scores[policy]
    for name, theirs in scores.items():
        lengths = [f"{one.max_length} ({one.truncation_mode})" for one in (theirs, ours)]
        if theirs.same_tokens and lengths[0] != lengths[1]:
            raise CacheError(f"{name}: was scored with max_length {lengths[0]}, expected the policy's, {lengths[1]}")
    # Of a completion without a token every model says the same: nothing
    whole = np.all([one.whole for one in scores.values()], axis=0)
    if not whole.any():
        raise CacheError(f"--max-length {ours.max_length}: no pair has a token left in both completions")
    scores = {name: one.only(whole) for name, one in scores.items()}
    betas, found = sorted(set(arguments.beta)), []
    for name in scored.references:
        own = (answers[policy], answers[name], scored.prompts) if name in answers else None
        found.append(compare(name, scores[policy], scores[name], betas, own))
    settings = {
        "policy": ours.model,
        "data": str(arguments.data),
        "pairs": int(whole.sum()),
        "pairs_left_out": int((~whole).sum()),
        "dtype": ours.dtype,
        "max_length": ours.max_length,
        "completions_cut": int(scores[policy].cut.sum()),
        "samples": arguments.samples,
        "max_new_tokens": arguments.max_new_tokens,
        "seed": arguments.seed,
    }
    return Probe(scores[policy], found, settings)


def _check(arguments: argparse.Namespace) -> None:
    """Raise for values out of range, and for options that would have no effect."""
    for beta in arguments.beta:
        check_number("--beta", beta, above=0)
    for name in ("limit", "samples", "max_new_tokens"):
        least = 0 if name == "samples" else 1
        if getattr(arguments, name) < least:
            raise CacheError(f"{_option(name)}: expected at least {least}, got {getattr(arguments, name)}")
    unused = [] if arguments.samples else OF_SAMPLES
    reason = "of --samples, which are not asked for"
    if arguments.cache is not None:
        unused, reason = ["policy", "samples", *OF_SAMPLES, *OF_MODELS], "with --cache no model is loaded"
    defaults = _parser()
    for name in unused:
        if getattr(arguments, name) != defaults.get_default(name):
            raise CacheError(f"{_option(name)}: {reason}, got {getattr(arguments, name)!r}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _from_cache(arguments: argparse.Namespace, rows: list[Row]) -> Scored:
    """What --cache holds; no model is loaded."""
    if arguments.policy_name is None:
        raise CacheError("--policy-name: not given, expected the policy's name in --cache")
    cache = ReferenceCache(arguments.cache)
    policy = cache.reference(arguments.policy_name)
    references = arguments.reference or [name for name in cache.references if name != policy.name]
    if not references:
        raise CacheError(f"--cache {arguments.cache}: holds no reference beside {policy.name!r}")
    tokenizer = load_tokenizer(policy.tokenizer, rows[0], arguments.trust_remote_code)
    return Scored(cache, policy.name, references, tokenizer, {}, [])


def _from_models(arguments: argparse.Namespace, rows: list[Row]) -> Scored:
    """All models score the pairs, and with --samples the policy's answers."""
    if arguments.policy is None:
        raise CacheError("--policy: not given, expected a model folder or hub id (or --cache and --policy-name)")
    if arguments.policy_name is not None:
        raise CacheError(f"--policy-name: belongs to --cache, got {arguments.policy_name!r} with --policy")
    models = {POLICY: arguments.policy, **_named(arguments.reference)}
    cache = ReferenceCache(arguments.output / "refs")
    tokenizer = load_tokenizer(arguments.policy, rows[0], arguments.trust_remote_code)
    options = BuildOptions(
        max_length=arguments.max_length or None,
        truncation_mode=arguments.truncation_mode,
        token_logps=True,
        batch_tokens=arguments.batch_tokens,
        source=Path(arguments.data).name,
    )
    # Whatever is wrong with a tokenizer or a prompt shows before anything is scored
    own = {name: tokenizer_of(path, tokenizer, rows[0], arguments.trust_remote_code) for name, path in models.items()}
    prompts = _prompts(arguments, tokenizer, rows) if arguments.samples else []
    answers: dict[str, Entries] = {}
    sampled: list[Answer] = []
    for name, path in models.items():
        model = ReferenceModel(
            path, dtype=arguments.dtype, device=arguments.device, trust_remote_code=arguments.trust_remote_code
        )
        score(cache, model, own[name], rows, name, options)
        if name == POLICY and prompts:
            sampling = Sampling(per_prompt=arguments.samples, max_new_tokens=arguments.max_new_tokens, batch=PROMPTS)
            sampled = probe_samples.sampled(arguments.output, model, tokenizer, prompts, sampling, arguments.seed)
        if sampled and own[name] is tokenizer:
            answers[name] = score_answers(cache, model, tokenizer, sampled, name, options)
    references = [name for name in models if name != POLICY]
    return Scored(cache, POLICY, references, tokenizer, answers, [one.prompt for one in sampled])


def _prompts(arguments: argparse.Namespace, tokenizer: Any, rows: list[Row]) -> list[list[int]]:
    """The prompts that leave room for an answer, as tokens."""
    prepare = Preparation(rows[0], tokenizer)
    prompts = [prepare.numbered(row, f"row {number}")["prompt_ids"] for number, row in enumerate(rows)]
    room = arguments.max_length - arguments.max_new_tokens if arguments.max_length else None
    short = [prompt for prompt in prompts if prompt and (room is None or len(prompt) <= room)]
    if not short:
        raise CacheError(
            f"--max-new-tokens {arguments.max_new_tokens}: no prompt leaves room in {arguments.max_length} tokens"
        )
    return short


def _named(references: list[str]) -> dict[str, str]:
    """name -> model, of NAME=MODEL."""
    found: dict[str, str] = {}
    for text in references:
        name, equals, model = text.partition("=")
        if not (name and equals and model) or name == POLICY or name in found:
            raise CacheError(f"--reference: expected NAME=MODEL, each name once and none {POLICY!r}, got {text!r}")
        found[name] = model
    if not found:
        raise CacheError("--reference: not given, expected NAME=MODEL at least once")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastdpo study --probe", description=__doc__)
    add = parser.add_argument
    add("--policy", metavar="MODEL", help="the model that training would start from: folder or hub id")
    add("--reference", action="append", default=[], metavar="NAME=MODEL", help="repeat it for more; with --cache: NAME")
    add("--cache", metavar="REFS", help="a cache that holds everything, a study's say, instead of --policy")
    add("--policy-name", metavar="NAME", help="the policy's name in --cache (a study's: start)")
    add("--data", required=True, metavar="FILE.jsonl", help="pairs, as `fastdpo train` takes them")
    add("--limit", type=int, default=100, metavar="N", help="the first N pairs (default: %(default)s)")
    add("--beta", type=float, nargs="+", default=list(BETAS), help="(default: 0.01 0.03 0.1 0.3 1)")
    add(
        "--max-length",
        type=int,
        default=512,
        metavar="L",
        help="tokens of prompt and completion that are kept; 0: all (default: %(default)s)",
    )
    add("--truncation-mode", choices=("keep_start", "keep_end"), default="keep_start")
    add("--dtype", choices=[*DTYPES, "auto"], default="bfloat16", help="of the weights (default: bfloat16, the faster)")
    add("--batch-tokens", type=int, default=4096, help="in a forward (default: %(default)s)")
    add("--samples", type=int, default=0, metavar="N", help="answers of the policy a prompt, for a KL (default: none)")
    add("--max-new-tokens", type=int, default=128, help="of a sampled answer, at most (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    add("--device", help="default: the accelerator, if there is one")
    add("--trust-remote-code", action="store_true")
    add("--output", required=True, type=Path, metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
