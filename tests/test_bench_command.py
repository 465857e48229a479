"""`fastdpo bench` on tiny heads: table, picture and JSON; what is missing, wrong, too slow or too large is said."""

from __future__ import annotations

import json
import signal

import cache_kit as kit  # skips where trl is missing
import pytest
import torch

from fastdpo import cli
from fastdpo.bench import command, inputs, isolated, providers, race, report
from fastdpo.bench.isolated import Contender, Failed, Outcome, run_alone
from fastdpo.bench.race import Entry

SMALL = ["--hidden", "16", "--vocab", "512", "--tokens", "16", "--rounds", "1"]


def bench(*arguments: str) -> int:
    return cli.main(["bench", *arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return kit.save_model(tmp_path_factory.mktemp("model"), bos_token_id=2)


# --- the whole command -----------------------------------------------------------------------------------------------


def test_sizes_alone(tmp_path, capsys, monkeypatch):
    """Peaked and dense inputs; a contender whose package is not there is named with what to install."""
    version = command.installed_version
    monkeypatch.setattr(command, "installed_version", lambda name: None if name == "trl" else version(name))
    assert bench(*SMALL, "--contenders", "eager", "TRL 1.16", "--output", str(tmp_path / "out")) == 0
    out = capsys.readouterr().out
    lines = {line[:26].strip(): line[26:].split() for line in out.splitlines()}
    for name in ("fastdpo, peaked", "fastdpo, dense", "eager"):
        assert lines[name][1] in ("ms", "s"), name
    assert " ".join(lines["TRL 1.16"]) == "not installed: pip install trl"
    assert max(map(len, out.split("faster")[1].splitlines())) <= report.WIDTH
    assert "random inputs: peaked" in out
    assert max(map(len, out.split("bench.json")[1].splitlines())) <= report.WIDTH
    assert "TRL's was not measured" in " ".join(out.split())

    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert {(p["contender"], p["kind"]) for p in found["points"]} == {
        ("fastdpo", "peaked"),
        ("fastdpo", "dense"),
        ("eager", "peaked"),
    }
    assert all(p["seconds"] > 0 and p["mib"] >= 0 and p["failed"] is None for p in found["points"])
    assert found["settings"]["vocab"] == 512 and found["settings"]["tokens"] == 16 and found["settings"]["rounds"] == 1
    assert found["left_out"] == {"TRL 1.16": "not installed: pip install trl"}
    assert found["versions"]["torch"] == torch.__version__
    assert "threads" in found["machine"] and found["product_seconds"] > 0
    assert " ".join(out.split()).endswith(found["summary"])


def test_a_model_and_pairs(model, tmp_path, capsys):
    """Hidden states of the model on the data: the inputs are those, and as many tokens as there are."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in kit.rows(3)))
    arguments = (model, "--data", str(data), "--contenders", "eager", "--rounds", "1", "--output", str(tmp_path))
    assert bench(*arguments) == 0
    out = capsys.readouterr().out
    assert f"hidden states of {model} on the completions of {data}" in out
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [p["kind"] for p in found["points"]] == ["real", "real"]
    tokens = found["settings"]["tokens"]
    words = sum(len(row[side].split()) for row in kit.rows(3) for side in ("chosen", "rejected"))
    assert tokens == words + 6, "and an end of text each"
    assert "of logits and log_softmax in PyTorch" in found["summary"]
    assert bench(*arguments, "--tokens", "9999") == 1
    assert "--tokens 9999: the data has" in capsys.readouterr().err


def test_what_fails_is_shown(tmp_path, capsys, monkeypatch):
    """A wrong result, one that takes too long: neither has numbers, the others go on."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\n"
        "if 'fastdpo.bench.isolated' in ' '.join(sys.orig_argv):\n"
        "    from fastdpo.bench import providers as p\n"
        "    slow, right = p.TOKEN_LOGPS['eager'], p.TOKEN_LOGPS['fastdpo exact']\n"
        "    p.TOKEN_LOGPS['fastdpo exact'] = lambda *a: 1.5 * right(*a)\n"
        "    p.TOKEN_LOGPS['eager'] = lambda h, w, y: (time.sleep(60 * (len(y) > 64)), slow(h, w, y))[1]\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{report.__file__.split('/fastdpo/bench')[0]}")
    arguments = ["--contenders", "eager", "fastdpo exact", "--limit", "6", "--output", str(tmp_path)]
    assert bench("--hidden", "16", "--vocab", "512", "--tokens", "80", "--rounds", "1", *arguments) == 0
    points = {p["contender"]: p for p in json.loads((tmp_path / "bench.json").read_text())["points"]}
    assert points["fastdpo"]["failed"] is None
    assert points["fastdpo exact"]["failed"].startswith("refused, fastdpo exact, logps: relative error")
    assert points["eager"]["failed"] == "more than 6 s"
    assert points["eager"]["seconds"] is points["fastdpo exact"]["seconds"] is None
    out = capsys.readouterr().out
    lines = {line[:26].strip(): line[26:].strip() for line in out.splitlines()}
    assert lines["eager"] == "more than 6 s"
    assert lines["fastdpo exact"] == "refused, fastdpo exact, logps: relative error 5.00e-01 above 1e-01"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL: not given, expected a folder or hub id, or else --hidden and --vocab"),
        (["--hidden", "16"], "MODEL: not given"),
        ([*SMALL, "--data", "x.jsonl"], "--data x.jsonl: only a MODEL"),
        (["{model}", "--vocab", "5"], "leave out --hidden and --vocab"),
        (["{empty}"], "no config"),
        (["{model}", "--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--hidden", "9999", "--vocab", "99999999"], "--hidden 9999 --vocab 99999999: inputs of 7,4"),
        ([*SMALL[:4], "--tokens", "99999999999"], "--tokens 99999999999: inputs of 11,9"),
        ([*SMALL, "--device", "tpu"], "--device tpu: expected cpu, cuda or cuda:N"),
        ([*SMALL, "--device", "cuda"], "--device cuda: torch sees no GPU"),
    ],
)
def test_bad_arguments(model, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = [word.format(model=model, empty=tmp_path) for word in arguments]
    assert bench(*given, "--output", str(tmp_path)) == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1] and err[-1].startswith("fastdpo bench: ")


@pytest.mark.parametrize(
    "arguments", [["--tokens", "0"], ["--limit", "-1"], ["--contenders", "magic"], ["--rounds", "x"]]
)
def test_bad_values(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        bench(*SMALL, *arguments)
    assert f"argument {arguments[0]}: " in capsys.readouterr().err.splitlines()[-1]


# --- its parts -------------------------------------------------------------------------------------------------------


def test_a_memory_limit_ends_a_contender(tmp_path):
    torch.save(tuple(inputs.random_batch("dense", 4096, 16384, 8, torch.float32)), tmp_path / "inputs.pt")
    with Contender("eager", tmp_path / "inputs.pt", tokens=64) as contender:
        held = contender.ready()  # 4,096 x 16,384 logits are 256 MiB, and eager holds several of them
    assert run_alone("eager", tmp_path / "inputs.pt", memory_mib=int(held) + 300) == Outcome(None, None, "memory")
    assert run_alone("eager", tmp_path / "inputs.pt", tokens=64, memory_mib=int(held) + 300).failed is None


def test_what_a_contender_says_when_it_fails(tmp_path):
    torch.save((torch.zeros(2, 3),), tmp_path / "inputs.pt")
    with Contender("eager", tmp_path / "inputs.pt") as contender, pytest.raises(Failed, match="^TypeError: "):
        contender.run()


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGKILL, "memory"), (signal.SIGSEGV, "ended by SIGSEGV")])
def test_a_contender_that_is_killed(tmp_path, number, reason):
    """The kernel kills where memory ends; a crash is another thing."""
    torch.save(tuple(inputs.random_batch("dense", 8, 64, 8, torch.float32)), tmp_path / "inputs.pt")
    with Contender("eager", tmp_path / "inputs.pt") as contender:
        contender.ready()
        contender._process.send_signal(number)
        with pytest.raises(Failed, match=f"^{reason}$"):
            contender.run()


def test_peaked_inputs_are_a_trained_models():
    """Of 256 tokens, all but 2^-10 of the probability is in 4 to 8% of the columns of Gemma 3 270M, as here."""
    batch = inputs.random_batch("peaked", 256, 16384, 640, torch.float32)
    probs = (batch.hidden @ batch.weight.T).softmax(-1)
    mass = probs.mean(0).sort(descending=True).values.cumsum(0)
    assert 0.04 < (mass < 1 - 2**-10).double().mean() < 0.09
    assert batch.lengths == (128, 128)
    likely = probs.gather(-1, batch.labels[:, None]).log().mean()
    assert -4 < likely < -1, "labels are drawn from the softmax"
    dense = inputs.random_batch("dense", 256, 16384, 640, torch.float32)
    mass = (dense.hidden @ dense.weight.T).softmax(-1).mean(0).sort(descending=True).values.cumsum(0)
    assert (mass < 1 - 2**-10).double().mean() > 0.9


def test_sampled_text(model):
    batch = inputs.sampled_batch(model, 200, torch.float32)
    assert batch.hidden.shape == (200, 32) and batch.lengths == (100, 100)
    assert batch.labels.unique().numel() > 20


def test_a_first_token_is_not_scored(model, tmp_path):
    """Without a prompt, nothing comes before it that could predict it."""
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({**kit.rows(1)[0], "prompt": ""}) + "\n")
    batch = inputs.real_batch(model, data, 1, 64, dtype=torch.float32)
    words = [len(kit.rows(1)[0][side].split()) for side in ("chosen", "rejected")]
    assert len(batch.hidden) == len(batch.labels) == sum(words), "and an end of text each"
    assert batch.lengths == tuple(words)


def test_fewer_rounds_where_time_is_short():
    class Fake:
        def ready(self, timeout):
            return 0.0

        def check(self, timeout):
            timeouts.append(timeout)

        def run(self, limit=None):
            runs.append(1)
            if len(runs) == 5:
                raise Failed("memory")
            return Outcome(10.0, float(len(runs)))

        def close(self):
            pass

    runs, timeouts = [], []
    found, rounds = race.race({Entry(name, "real"): Fake() for name in "ab"}, 9, 20, seconds=45)
    assert rounds == 2
    assert timeouts == [60, 20], "a check far slower than the first one is ended"
    assert found == {Entry("a", "real"): Outcome(None, None, "memory"), Entry("b", "real"): Outcome(10.0, 7.0)}


def test_the_table_names_no_numbers_that_are_not_there():
    some = {Entry("TRL 1.16", "real"): Outcome(4.0, 100.0), Entry("fastdpo", "real"): Outcome(1.0, 25.0)}
    assert report.sentence(some, {}) == (
        "On this machine fastdpo's head takes 25% of the time and 25% of the memory of what TRL runs."
    )
    faster = {**some, Entry("CCE", "real"): Outcome(2.0, 200.0)}
    assert report.sentence(faster, {}).endswith("of what TRL runs; of those of the fastest other, CCE, 50% and 12%.")
    assert "4.0 x" in report.table(some, 100, {}) and "3.00 s, 75 MiB" in report.table(some, 100, {})
    some[Entry("TRL 1.16", "real")] = Outcome(None, None, "memory")
    assert "out of memory" in report.table(some, 100, {})
    assert "nothing to compare" in report.sentence(some, {})
    some[Entry("CCE", "real")] = Outcome(2.0, 50.0)
    assert "50% of the memory of CCE's; TRL's was not measured" in report.sentence(some, {})


def test_refused_by_name():
    batch = inputs.random_batch("dense", 16, 512, 16, torch.float32)
    isolated.verify("fastdpo", batch, "both")
    isolated.verify("fastdpo", batch, "forward")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(providers.TOKEN_LOGPS, "fastdpo", lambda h, w, y: 2 * providers.eager(h, w, y))
        with pytest.raises(AssertionError, match="fastdpo, logps: relative error"):
            isolated.verify("fastdpo", batch, "both")
