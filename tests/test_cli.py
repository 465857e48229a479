"""The command line: listing, `fastdpo train` end to end on a tiny model, its errors, and `fastdpo doctor`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdpo import cli, doctor

needs_trl = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("trl", "transformers", "matplotlib")),
    reason="needs fastdpo[trl]",
)
ROWS = [
    {"prompt": f"sort {a} two :", "chosen": f" two {a}", "rejected": f" {a} two or not"}
    for a in ("six", "ten", "nine", "five")
]


def messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {key: [{"role": roles[key], "content": text.strip()}] for key, text in row.items()}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A folder with a random model and a tokenizer of words, without a chat template."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from fastdpo import demo_task

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = demo_task.tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(  # of Qwen2 AutoTokenizer would make its own tokenizer, not one of words
        vocab_size=203,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train_arguments(tiny: str, data: str, output: Path, *more: str) -> list[str]:
    fixed = "--max_steps 2 --per_device_train_batch_size 2 --learning_rate 1e-3 --bf16 false --disable_tqdm true"
    return ["train", "--model_name_or_path", tiny, "--data", data, "--output_dir", str(output), *fixed.split(), *more]


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# --- the listing -----------------------------------------------------------------------------------------------------


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert name in out
        assert command.help in out


def test_unknown_command(capsys):
    assert cli.main(["trian"]) == 2
    err = capsys.readouterr().err
    assert "unknown command 'trian'" in err
    assert "train" in err
    assert cli.main([]) == 2


def test_missing_packages_name_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "trl" else object())
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err.strip() == "fastdpo train: needs trl: pip install 'fastdpo[trl]'"


def test_help_and_import_leave_trl_alone():
    code = (
        "import sys, fastdpo.cli as c; c.main(['--help']); sys.exit('trl' in sys.modules or 'datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# --- train -----------------------------------------------------------------------------------------------------------


@needs_trl
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_train_end_to_end(tiny, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = write(tmp_path / "pairs.jsonl", ROWS)
    held_out = write(tmp_path / "held_out.jsonl", ROWS[:2])
    losses = {}
    for run in ("fastdpo", "fastdpo --shared_prompt", "trl"):
        name, output = run.split()[0], tmp_path / run
        more = ("--eval_data", held_out, "--trainer", *run.split())
        assert cli.main(train_arguments(tiny, data, output, *more)) == 0
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last.startswith(f"{name}: 2 steps, ")
        assert "peak resident memory" in last

        found = records(output)
        losses[run] = [r["loss"] for r in found if "loss" in r]
        assert [r["step"] for r in found if "loss" in r] == [1, 2]
        assert any("eval_rewards/accuracies" in r for r in found)
        summary = found[-1]["summary"]
        assert summary["trainer"] == name
        assert summary["steps"] == 2
        assert summary["seconds_per_step"] > 0
        assert summary["peak_memory_mib"] > 50
        assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
        model = AutoModelForCausalLM.from_pretrained(output)
        start = AutoModelForCausalLM.from_pretrained(tiny)
        assert not torch.equal(model.lm_head.weight, start.lm_head.weight), "it has learned"
        assert (
            AutoTokenizer.from_pretrained(output)("six two")["input_ids"]
            == AutoTokenizer.from_pretrained(tiny)("six two")["input_ids"]
        )
    for curve in losses.values():
        assert curve == pytest.approx(losses["trl"], rel=1e-4)


@needs_trl
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_train_conversational_from_a_config_file(tiny, tmp_path, capsys):
    from transformers import AutoTokenizer

    output = tmp_path / "out"
    data = write(tmp_path / "pairs.jsonl", [messages(row) for row in ROWS])
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {data}\nbeta: 0.3\ntest_split_size: 0.5\nuse_peft: true\nlora_r: 2\n")
    arguments = [a for a in train_arguments(tiny, data, output) if a not in ("--data", data)]
    assert cli.main([*arguments, "--config", str(config)]) == 0
    assert capsys.readouterr().out.count("no chat template") == 1
    assert (output / "adapter_model.safetensors").is_file()
    assert any("eval_loss" in r for r in records(output)), "half of the rows are held out"
    rendered = AutoTokenizer.from_pretrained(output).apply_chat_template(
        [{"role": "user", "content": "sort"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "### user\nsort\n### assistant\n"


@needs_trl
def test_bf16_flag_alone(tiny):
    from fastdpo import train

    _, _, config, _, _ = train.parse(["--model_name_or_path", tiny, "--bf16", "--max_steps", "1"])
    assert config.bf16 is True
    assert config.logging_steps == 1


GOOD = json.dumps(ROWS[0])


@needs_trl
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "has no pairs"),
        (f"{GOOD}\n\xe9\n", "line 2: not UTF-8"),
        (f"{GOOD}\n\n{{'prompt': 1}}\n", "line 3: not JSON"),
        (f"{GOOD}\n[1]\n", "line 2: expected a JSON object, got list"),
        ('{"prompt": "a", "chosen": "b"}', "line 1: missing column rejected; has prompt, chosen"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', "line 1: column rejected: expected a string or a list"),
        ('{"chosen": [{"role": "user"}], "rejected": "a"}', "line 1: column chosen: expected a string or a list"),
        (f'{GOOD}\n{{"chosen": "a", "rejected": "b"}}\n', "line 2: has chosen (text), rejected (text), but"),
    ],
)
def test_bad_data(tiny, tmp_path, capsys, content, message):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    assert cli.main(train_arguments(tiny, str(path), tmp_path / "out")) == 1
    err = capsys.readouterr().err
    assert f"{path}" in err
    assert message in err
    assert err.count("\n") == 1, "one line"


@needs_trl
def test_bad_arguments(tiny, tmp_path, capsys):
    data = write(tmp_path / "pairs.jsonl", ROWS)
    cases = [
        (["train", "--data", data], "--model_name_or_path: not given"),
        (["train", "--model_name_or_path", tiny], "--data: expected --data FILE.jsonl"),
        (train_arguments(tiny, data, tmp_path, "--dataset_name", "x"), "got both"),
        (train_arguments(tiny, data, tmp_path, "--config", str(tmp_path / "none.yaml")), "no such file, expected YAML"),
        (train_arguments(str(tmp_path / "no-model"), data, tmp_path), "--model_name_or_path"),
        (train_arguments(tiny, data, tmp_path, "--nonsense", "3"), "--nonsense"),
        (train_arguments(tiny, data, tmp_path, "--trainer", "trl", "--shared_prompt"), "only FastDPOTrainer knows it"),
        (
            train_arguments(tiny, data, tmp_path, "--loss_type", "sigmod"),
            "--loss_type sigmod: expected one of sigmoid, ",
        ),
        (train_arguments(tiny, data, tmp_path, "--loss_type", "sigmoid", "kto"), "--loss_type kto: expected one of"),
        (train_arguments(tiny, data, tmp_path, "--eval_strategy", "epoch"), "needs --eval_data or --test_split_size"),
    ]
    for arguments, message in cases:
        assert cli.main(arguments) == 1
        assert message in capsys.readouterr().err


@needs_trl
def test_plain_chat_template_keeps_the_prompt_a_prefix():
    from fastdpo import demo_task
    from fastdpo.train_data import plain_chat_template

    tokenizer = demo_task.tokenizer()
    tokenizer.chat_template = plain_chat_template(tokenizer)
    chat = messages(ROWS[0])
    prompt = tokenizer.apply_chat_template(chat["prompt"], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat["prompt"] + chat["chosen"], tokenize=False)
    assert whole == prompt + "two six" + demo_task.END + "\n"


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor(capsys, monkeypatch):
    from fastdpo import backend

    # The other backends have tests of their own, and may have to be built first
    real = backend.load
    monkeypatch.setattr(backend, "load", lambda name: real(name) if name == "eager" else "not in this test")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "compiler", "CPU", "GPU", "triton  not available: not in this test", "float64   OK"):
        assert word in out


def test_doctor_finds_a_wrong_kernel(capsys, monkeypatch):
    from fastdpo import backend, eager

    right = eager.row_backward

    def wrong(logits, *arguments):
        right(logits, *arguments)
        if logits.dtype == torch.float16:
            arguments[-1].mul_(1.01)

    monkeypatch.setattr(backend, "BACKENDS", {"eager": backend.BACKENDS["eager"]})
    monkeypatch.setattr(eager, "row_backward", wrong)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "float16   FAIL: gradient differs from float64" in out
    assert "float32   OK" in out
