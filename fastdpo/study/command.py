"""`fastdpo study`: a grid of FastDPOTrainer runs over beta, reward, reference, loss and seed, and its report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import results, runner
from .config import read

EXAMPLE = """\
# fastdpo study config.yaml --output DIR
# A path may be relative to this file. What is commented out shows its default.
policy: org/model                 # folder or hub id: where every run starts
data:
  train: pairs.jsonl              # prompt, chosen, rejected, as for `fastdpo train --data`
  held_out_share: 0.05            # of the prompts; or held_out: another.jsonl
  # seed: 0                       # of that share
  # train_rows: null              # only the first ones
  # held_out_rows: null
references:                       # name: model, or null for none
  start: policy
  stronger: {model: org/stronger, role: stronger}   # role: stronger, weaker, other; dtype and tokenizer if its own
  none: null
betas: [0.005, 0.01, 0.02, 0.05, 0.1]
# parameterizations: [ratio, posterior, likelihood]
# loss_types: [sigmoid]
# seeds: [0]
# dtype: float32                  # of the policy's weights: float32, bfloat16, float16
training:                         # keywords of trl.DPOConfig, the same in every run
  learning_rate: 5e-7
  num_train_epochs: 1
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 8
  max_length: 1024
# peft: null                      # keywords of peft.LoraConfig, such as {r: 16, target_modules: all-linear}
sampling:                         # answers of each trained policy to held-out prompts
  prompts: 200
  # per_prompt: 1
  max_new_tokens: 512
  # temperature: 1.0
  # batch: 32
scorer: org/reward-model          # or scoring.py:function, package.module:function; null: held-out reward accuracy
quality: reward                   # what it measures, for the report
# higher_is_better: true
# workers: auto                   # one a GPU; without GPUs one a core
# threads: auto                   # of each worker
# save_models: false              # keep all trained models in DIR/models
# token_rows: 32                  # held-out pairs of each cell kept for the token page
# trust_remote_code: false
"""

_EPILOG = """\
A study can be killed and started again: what is finished is kept. Failed cells are tried again then. Betas, references
and the other lists of the grid may be changed between two runs on one DIR; any other change needs another DIR.

In DIR: report.html, report.md, figures/, tokens.html, results.json, results.csv, cells/ (one JSON a cell, and the
answers that were sampled), refs/ (the references' log-probabilities), work/ (logs; may be deleted).
Exit code: 0; 1 where the study could not be run or a cell failed, and the message names it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study. Returns 0; 1 with one line on stderr where it cannot be, or where a cell failed."""
    given = list(sys.argv[1:] if argv is None else argv)
    if "--probe" in given:
        from . import probe

        given.remove("--probe")
        return probe.main(given)
    arguments = _parse(given)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("\nfastdpo study: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # StudyError, CacheError, DataError
        print(f"fastdpo study: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdpo study",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("config", nargs="?", type=Path, help="YAML; --print-config shows one with all settings")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the study")
    one.add_argument("--demo", action="store_true", help="a small model and task, made in DIR/demo; needs no config")
    one.add_argument("--print-config", action="store_true", help="a commented config, to start from")
    one.add_argument("--report", type=Path, metavar="DIR", help="write the report of a study folder again")
    parser.add_argument("--tokens", metavar="CELL", help="with --report: tokens.html of this cell, not of the best one")
    one.add_argument("--cost", type=Path, metavar="DIR", help="time some cells of a study as runs of TRL alone")
    parser.add_argument("--cells", type=int, default=4, help="how many, with --cost (4)")
    parser.add_argument("--probe", action="store_true", help="what a reference would do to a run, before any training")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.output is not None and not (arguments.demo or arguments.config):
        parser.error(f"--output {arguments.output}: expected CONFIG or --demo with it")
    if arguments.tokens is not None and arguments.report is None:
        parser.error(f"--tokens {arguments.tokens}: expected --report DIR with it")
    if arguments.output is None and not (arguments.print_config or arguments.cost or arguments.report):
        parser.error("expected CONFIG --output DIR, or --demo --output DIR")
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    if arguments.print_config:
        print(EXAMPLE, end="")
        return 0
    if arguments.cost is not None:
        from . import cost

        print(cost.measure(arguments.cost, arguments.cells))
        return 0
    if arguments.report is not None:
        results.write(arguments.report)
        print(write_pages(arguments.report, arguments.tokens))
        return 0
    folder: Path = arguments.output
    if arguments.demo:
        from . import demo_study

        config = read(demo_study.prepare(folder))
    else:
        config = read(arguments.config)
    failed = runner.run(config, folder)
    print(write_pages(folder))
    if failed:
        print(f"fastdpo study: FAILED: {len(failed)} cells: {', '.join(failed)}", file=sys.stderr)
        for cell in results.load(folder).cells:
            if cell.id in failed[:3]:
                print(f"  {cell.id}: {cell.error}", file=sys.stderr)
    return 1 if failed else 0


def write_pages(folder: Path, cell_id: str | None = None) -> Path:
    """The report, and the token page of a cell (None: the first of the best setting); returns the report's file.

    Raises:
        StudyError: no such cell, or it is not done.
        OSError: the policy's tokenizer is not there. Both after the report is written.
    """
    from . import report, summary, token_view

    made = report.write(folder)
    if cell_id is None:
        study = results.load(folder)
        best = summary.best(summary.groups(study), study.config["higher_is_better"])
        cell_id = None if best is None else best.cells[0].id
    if cell_id is not None:
        token_view.of_study(folder, cell_id, folder / "tokens.html")
    return made


if __name__ == "__main__":
    sys.exit(main())
