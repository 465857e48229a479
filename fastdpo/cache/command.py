"""`fastdpo cache`: build, look at and keep a folder of reference logps."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..train_data import read_pairs
from .model import DTYPES
from .options import BuildOptions
from .rows import load_tokenizer
from .store import ReferenceCache

_DEFAULTS = BuildOptions()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0; 1 with one line on stderr where it failed, or where `verify` found something."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(ReferenceCache(arguments.cache), arguments)
    except (ValueError, OSError) as error:  # CacheError, DataError, and what options.py raises
        print(f"fastdpo cache {arguments.command}: {error}", file=sys.stderr)
        return 1


def build(cache: ReferenceCache, arguments: argparse.Namespace) -> int:
    """Score the pairs of a file."""
    pairs = read_pairs(arguments.data)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model, pairs[0], arguments.trust_remote_code)
    report = cache.build(
        arguments.model,
        tokenizer,
        pairs,
        name=arguments.name or "reference",
        max_length=arguments.max_length,
        truncation_mode=arguments.truncation_mode,
        prior=arguments.prior,
        token_logps=arguments.token_logps,
        shard_size=arguments.shard_size,
        batch_tokens=arguments.batch_tokens,
        source=Path(arguments.data).name,
        replace_name=arguments.replace,
        dtype=arguments.dtype,
        autocast=arguments.autocast,
        temperature=arguments.temperature,
        device=arguments.device,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(report)
    return 0


def info(cache: ReferenceCache, arguments: argparse.Namespace) -> int:
    """Say what the cache holds."""
    for about in cache.info():
        named, reference = about.named, about.named.reference
        tokens = f", {about.with_tokens:,} with token logps" if about.with_tokens else ""
        damaged = f", {about.damaged} DAMAGED" if about.damaged else ""
        print(f"{named.name}: {about.entries:,} entries{tokens}; {about.shards} shards, {about.size:,} bytes{damaged}")
        print(f"  model      {named.model}, tokenizer {named.tokenizer or 'none'}")
        autocast = f" under {reference.autocast} autocast" if reference.autocast else ""
        softcap = "none" if reference.softcap is None else f"{reference.softcap:g}"
        print(
            f"  scored in  {reference.dtype}{autocast}, temperature {reference.temperature:g}, softcap {softcap}, "
            f"logit scale {reference.logit_scale:g}"
        )
        print(
            f"  last build max_length {named.max_length}, {named.truncation_mode}"
            f"{', with priors' if named.prior else ''}{', with token logps' if named.token_logps else ''}"
        )
        print(f"  id         {reference.id}, fingerprint {reference.fingerprint}")
    if not cache.references:
        print(f"{cache.path}: no references")
    return 0


def verify(cache: ReferenceCache, arguments: argparse.Namespace) -> int:
    """Read everything; 1 if anything is wrong."""
    findings, held = cache.examine()
    for finding in findings:
        print(finding)
    if findings:
        print(f"{cache.path}: {len(findings)} findings; `fastdpo cache build` computes what they concern again")
        return 1
    for about in held:
        print(f"{about.named.name}: {about.entries:,} entries in {about.shards} shards, all as they were written")
    return 0


def attach(cache: ReferenceCache, arguments: argparse.Namespace) -> int:
    """Write the pairs of a file with their reference logps."""
    pairs = read_pairs(arguments.data)
    keywords: dict[str, Any] = {}
    if hasattr(arguments, "max_length"):
        keywords["max_length"] = arguments.max_length
    if arguments.truncation_mode is not None:
        keywords["truncation_mode"] = arguments.truncation_mode
    if arguments.tokenizer is not None:
        keywords["tokenizer"] = load_tokenizer(arguments.tokenizer, pairs[0], arguments.trust_remote_code)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        with_logps = cache.attach(
            pairs, arguments.name, prior=arguments.prior, token_logps=arguments.token_logps, **keywords
        )
    for warning in said:
        print(f"fastdpo cache attach: {warning.message}", file=sys.stderr)
    output = Path(arguments.output)
    if output.suffix == ".parquet":
        with_logps.to_parquet(output)
    else:
        with output.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in with_logps)
    print(f"{output}: {len(with_logps)} rows")
    return 0


def merge(cache: ReferenceCache, arguments: argparse.Namespace) -> int:
    """Take in other caches; put small shards together."""
    merged = cache.merge(arguments.source)
    print(f"{cache.path}: {merged.taken} shards taken in; {merged.before} shards became {merged.after}")
    return 0


def gc(cache: ReferenceCache, arguments: argparse.Namespace) -> int:
    """Remove what nothing uses."""
    gone = cache.gc(arguments.drop, dry_run=arguments.dry_run)
    if arguments.dry_run:
        for path in gone:
            print(path)
    print(f"{cache.path}: {len(gone)} files {'would go' if arguments.dry_run else 'removed'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastdpo cache", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(run: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        sub.add_argument("--cache", required=True, metavar="DIR", help="the cache's folder")
        sub.set_defaults(run=run)
        return sub

    def data(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--data", required=True, metavar="FILE.jsonl", help="pairs, as `fastdpo train` takes them")
        sub.add_argument("--tokenizer", metavar="T", help="folder or hub id; default: the reference's")
        sub.add_argument("--prior", action="store_true", help="the unconditional logps of the completions too")
        sub.add_argument("--token-logps", action="store_true", help="the logps of single tokens too")
        sub.add_argument("--trust-remote-code", action="store_true")

    sub = command(build)
    data(sub)
    sub.add_argument("--model", required=True, metavar="M", help="the reference: folder or hub id")
    sub.add_argument("--name", help="what to call it in this cache (default: reference)")
    sub.add_argument(
        "--max-length",
        type=_max_length,
        default=_DEFAULTS.max_length,
        metavar="L",
        help="tokens of prompt and completion that are kept; 0: all (default: %(default)s, TRL's)",
    )
    sub.add_argument("--truncation-mode", choices=_MODES, default=_DEFAULTS.truncation_mode)
    sub.add_argument("--dtype", choices=[*DTYPES, "auto"], default="float32", help="of the weights (default: float32)")
    sub.add_argument("--autocast", choices=DTYPES[1:], help="dtype of the products, if not the weights'")
    sub.add_argument("--temperature", type=float, default=1.0)
    sub.add_argument("--device", help="default: the accelerator, if there is one")
    sub.add_argument("--revision", help="of the hub id")
    sub.add_argument(
        "--batch-tokens", type=int, default=_DEFAULTS.batch_tokens, help="in a forward (default: %(default)s)"
    )
    sub.add_argument(
        "--shard-size", type=int, default=_DEFAULTS.shard_size, help="what a kill loses (default: %(default)s)"
    )
    sub.add_argument("--replace", action="store_true", help="let the name stand for another reference than before")

    command(info)
    command(verify)

    sub = command(attach)
    data(sub)
    sub.add_argument("--name", help="which reference (default: the only one)")
    sub.add_argument(
        "--max-length", type=_max_length, default=argparse.SUPPRESS, metavar="L", help="0: all (default: as built)"
    )
    sub.add_argument("--truncation-mode", choices=_MODES, help="default: as built")
    sub.add_argument("--output", required=True, metavar="OUT", help=".jsonl or .parquet")

    sub = command(merge)
    sub.add_argument("--from", dest="source", nargs="+", default=[], metavar="DIR", help="other caches to take in")

    sub = command(gc)
    sub.add_argument("--drop", nargs="+", default=[], metavar="NAME", help="references to forget first")
    sub.add_argument("--dry-run", action="store_true", help="only list the files")
    return parser


_MODES = ("keep_start", "keep_end")


def _max_length(text: str) -> int | None:
    try:
        return int(text) or None
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of tokens, or 0 for all, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
