"""Every command that a document shows is one that its program takes, every option included; the short ones are run."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import docs_kit
import pytest
from docs_kit import DOCUMENTS, ROOT, Command

from fastdpo import cli

pytest.importorskip("trl")
pytest.importorskip("yaml")

import cache_kit as kit

from fastdpo.bench.providers import PROVIDERS
from fastdpo.integrations import llama_factory

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
COMMANDS = [command for document in DOCUMENTS for command in docs_kit.commands(document)]
OF_THE_SHELL = ("cat", "grep", "tail")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a command writes


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless it is known, and takes these words."""
    program, *words = command.words
    assert not any(set(word) & set("$<>;&|") for word in words), "a variable that is not set, or shell that is not read"
    if program == "fastdpo":
        _fastdpo(words, command.in_text)
    elif program in ("python", "python3"):
        _python(words, monkeypatch)
    elif program == "make":
        _make(words)
    elif program == "pip":
        _pip(words, command.in_text)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert words[0] == "launch"
        options = launch_command_parser().parse_args(words[1:])
        assert options.module
        _module(options.training_script, options.training_script_args, monkeypatch)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words)
        assert options.module
        _module(options.training_script, options.training_script_args, monkeypatch)
    elif program == ".":
        assert words == [".venv/bin/activate"]
    elif program == ".ci/run":
        assert not words and os.access(ROOT / program, os.X_OK)
    else:
        assert program in OF_THE_SHELL and shutil.which(program), f"{program}: not a program that this test knows"


def _fastdpo(words: Sequence[str], in_text: bool) -> None:
    if in_text and f"fastdpo {' '.join(words)}" in PROVIDERS:
        return  # the name of a contender
    if in_text and (len(words) == 1 or (words[0] == "cache" and len(words) == 2)):
        with pytest.raises(SystemExit, match="0"):  # the command's name alone
            cli.main([*words, "--help"])
        return
    assert words[0] in cli.COMMANDS
    _parse(cli.COMMANDS[words[0]].module, words[1:])


def _parse(name: str, words: Sequence[str]) -> None:
    if name == "fastdpo.study.command" and "--probe" in words:
        from fastdpo.study import probe

        options = probe._parser().parse_args([word for word in words if word != "--probe"])
        probe._check(options)
        assert options.policy and probe._named(options.reference)
        return
    module = importlib.import_module(name)
    for parse in ("parse", "_parse"):
        if hasattr(module, parse):
            getattr(module, parse)(words)
            return
    parser = getattr(module, "_parser", None) or getattr(module, "parser", None)
    if parser is not None:
        parser().parse_args(words)
    else:
        assert not words and not inspect.signature(module.main).parameters, f"{name} takes no arguments"


def _python(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "-m":
        _module(words[1], words[2:], monkeypatch)
    else:
        assert (ROOT / words[0]).is_file() and not words[1:]


def _module(name: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "venv":
        assert len(words) == 1
    elif name == "fastdpo.integrations.llama_factory":
        config: list[str] = []
        tuner = SimpleNamespace(run_exp=lambda: config.extend(sys.argv[1:]))
        monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", tuner)
        monkeypatch.setattr(llama_factory, "patch", lambda: None)
        monkeypatch.setattr(sys, "argv", [""])
        llama_factory.main(list(words))
        assert config == ["config.yaml"]
    else:
        assert name.startswith(("fastdpo.", "benchmarks."))
        _parse(name, words)


def _make(words: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    target, *settings = words
    assert target in re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE)
    variables = re.findall(r"^(\w+) \?=", makefile, flags=re.MULTILINE)
    assert {setting.partition("=")[0] for setting in settings} <= set(variables)


def _pip(words: Sequence[str], in_text: bool) -> None:
    assert words[0] == "install" and (in_text or words[1:])
    setup = ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
    (extras,) = [ast.unparse(node.value) for node in setup if getattr(node, "arg", None) == "extras_require"]
    pinned = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
    for word in words[1:]:
        own = re.fullmatch(r"(?:\.|fastdpo)(?:\[(\w+)\])?", word)
        if own:
            assert own[1] is None or f"'{own[1]}': [" in extras
        else:
            assert word == "-e" or f"\n{word}==" in pinned


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{one.where}: {' '.join(one.words)}" for one in COMMANDS])
def test_it_is_one(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    check(command, monkeypatch)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_nothing_is_left_out(document: str) -> None:
    """Every fence is read as one, and every path of the repository that is named is there."""
    blocks, prose = docs_kit.parts(document)
    assert "```" not in prose and "~~~" not in prose
    assert {block.language for block in blocks} <= {"python", "shell", "yaml", "json", "text"}
    for path in re.findall(r"`((?:fastdpo|kernels|benchmarks|tests|docs|examples)/[\w./]+)`", prose):
        assert (ROOT / path.replace("/NAME", "")).exists(), path


def test_a_config_to_start_from(capsys: pytest.CaptureFixture[str]) -> None:
    """`fastdpo study --print-config > config.yaml`, and that file is one."""
    from fastdpo.study import config

    assert cli.main(["study", "--print-config"]) == 0
    Path("config.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert config.read(Path("config.yaml")).references


@pytest.mark.parametrize(
    "words",
    [
        "fastdpo trian --data pairs.jsonl",
        "fastdpo train --data pairs.jsonl --nonsense 3",
        "fastdpo cache build --model M",
        "fastdpo study --output DIR",
        "fastdpo demo --vocabluary 3",
        "fastdpo doctor --all",
        "fastdpo study --probe --policy MODEL --data pairs.jsonl --output probe",
        "python -m benchmarks.longest --output DIR --memory 3GB",
        "python -m benchmarks.gpu_report --output DIR",
        "python -m pytest",
        "python docs/make_loss.py",
        "make benchmark",
        "make bench SECONDS=3",
        "pip install fastdpo[all]",
        "pip install liger",
        "accelerate launch --zero_stages 3 -m fastdpo.train --data pairs.jsonl",
        "accelerate launch -m fastdpo.train --dataa pairs.jsonl",
        "torchrun --nproc-per-node 8 -m fastdpo.integrations.llama_factory config.yaml",
        "fastdpo train --beta $beta",
        "fastdpo study <config>",
        "git push",
    ],
)
def test_a_wrong_one_is_found(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(Command("", tuple(words.split())), monkeypatch)


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("cache_lookup", "--keys 500 --rounds 1"),
        (
            "shared_prompts",
            "--layers 1 --width 64 --vocab 99 --pairs 1 --length 32 --shares 0.5 --rounds 1 --output out",
        ),
        ("bf16_agreement", "--model model --data pairs.jsonl --batches 1"),
    ],
)
def test_a_benchmark_of_the_page_runs(
    name: str, small: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that no other test runs and that are quick when made small."""
    kit.save_model(Path("model"))
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kit.rows(8)))
    assert any(command.words[2:3] == (f"benchmarks.{name}",) for command in COMMANDS)
    monkeypatch.setattr(sys, "argv", [name, *small.split()])
    importlib.import_module(f"benchmarks.{name}").main()
    assert capsys.readouterr().out
