"""The `fastdpo` command: `fastdpo --help` lists its parts. Each is a module with `main(argv) -> int`, imported late."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    module: str
    help: str
    needs: tuple[str, ...]  # packages beyond those that fastdpo itself requires


COMMANDS = {
    "train": Command(
        "fastdpo.train", "DPO training on your pairs; takes what `trl dpo` takes", ("trl", "transformers", "matplotlib")
    ),
    "demo": Command(
        "fastdpo.demo", "watch a small model learn preferences, beside TRL", ("trl", "transformers", "matplotlib")
    ),
    "cache": Command(
        "fastdpo.cache.command",
        "reference logps, computed once: build, attach, verify",
        ("trl", "transformers", "pyarrow"),
    ),
    "study": Command(
        "fastdpo.study.command",
        "how much reference policies matter: a grid of runs and its report",
        ("trl", "transformers", "matplotlib", "pyarrow", "yaml"),
    ),
    "bench": Command(
        "fastdpo.bench.command",
        "what it saves on this machine, against what is installed",
        ("matplotlib", "tqdm", "psutil"),
    ),
    "doctor": Command("fastdpo.doctor", "which backends work on this machine, and why the others do not", ()),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 where the command failed, 2 for a command line it cannot read."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from . import __version__

        print(f"fastdpo {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"fastdpo: unknown command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    missing = [package for package in command.needs if importlib.util.find_spec(package) is None]
    if missing:
        print(f"fastdpo {name}: needs {', '.join(missing)}: pip install 'fastdpo[trl]'", file=sys.stderr)
        return 1
    return importlib.import_module(command.module).main(rest)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: fastdpo <command> [options]", "", "commands:", *lines, "", "`fastdpo <command> --help` says more."]
    )


if __name__ == "__main__":
    sys.exit(main())
