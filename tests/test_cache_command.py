"""`fastdpo cache`: every command, their exit codes, and repair after damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("trl")

import cache_kit as kit
import pyarrow.parquet as pq
from build_kit import PAIRS, tiny  # noqa: F401

from fastdpo import cli
from fastdpo.cache import ReferenceCache


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return str(path)


@pytest.fixture
def run(tiny, data, tmp_path, capsys):
    """Runs one command on the cache: (exit code, stdout, stderr)."""

    def runner(command: str, *more: str) -> tuple[int, str, str]:
        own = {"build": ["--model", tiny, "--data", data, "--shard-size", "6"], "attach": ["--data", data]}
        code = cli.main(["cache", command, "--cache", str(tmp_path / "cache"), *own.get(command, []), *more])
        out = capsys.readouterr()
        return code, out.out, out.err

    return runner


def test_build_info_verify(run, tmp_path):
    code, out, err = run("build", "--prior", "--token-logps", "--max-length", "20", "--name", "base")
    assert code == 0
    assert out.startswith("base: 40 sequences: ")
    assert "seq/s" in err, "a bar with the rate"
    for path in (tmp_path / "cache").rglob("*.parquet"):
        assert {"key", "logp", "count", "token_logps"} <= set(pq.read_schema(path).names)
    code, out, _ = run("info")
    assert code == 0
    for text in ("base: ", "with token logps", "max_length 20, keep_start, with priors", "float32, temperature 1"):
        assert text in out
    code, out, _ = run("verify")
    assert (code, "all as they were written" in out) == (0, True)
    assert run("build", "--name", "base", "--prior", "--token-logps", "--max-length", "20")[1].startswith(
        "base: 40 sequences: 0 scored"
    )


def test_build_repairs_just_what_verify_finds(run, tmp_path):
    assert run("build")[0] == 0
    cache = ReferenceCache(tmp_path / "cache")
    before, paths = kit.entries(cache), kit.shard_paths(cache)
    sizes = {path: pq.read_metadata(path).num_rows for path in paths}
    paths[0].write_bytes(paths[0].read_bytes()[:-40])
    wrong = bytearray(paths[1].read_bytes())
    wrong[50] ^= 1
    paths[1].write_bytes(wrong)
    code, out, _ = run("verify")
    assert code == 1
    lines = out.splitlines()
    assert len(lines) == 3
    assert all(str(path.relative_to(cache.path)) in out for path in paths[:2])
    words = " ".join(line.split("rows ")[1] for line in lines[:2]).replace(",", "").split()
    named = [word for word in words if word.isdigit()]
    assert len(named) == sizes[paths[0]] + sizes[paths[1]], "every entry's row"
    assert lines[0].endswith("of pairs.jsonl")
    code, out, _ = run("build")
    assert code == 0
    lost = sizes[paths[0]] + sizes[paths[1]]
    assert f"{lost} scored, {20 - lost} already there" in out
    assert run("verify")[0] == 0
    assert kit.entries(cache) == before
    assert len(list(cache.path.rglob("*.damaged"))) == 2
    assert run("gc")[1].endswith("2 files removed\n")
    assert not list(cache.path.rglob("*.damaged"))


def test_build_repairs_a_manifest(run, tmp_path):
    run("build")
    path = tmp_path / "cache" / "references" / "reference.json"
    path.write_text(path.read_text().replace('"temperature": 1.0', '"temperature": 2.0'))
    code, out, _ = run("verify")
    assert (code, "references/reference.json" in out) == (1, True)
    assert "0 scored, 20 already there" in run("build")[1]
    assert run("verify")[0] == 0


def test_build_repairs_entries_that_disagree(run, tmp_path):
    import numpy as np

    from fastdpo.cache import journal, shard

    assert run("build")[0] == 0
    cache = ReferenceCache(tmp_path / "cache")
    before, named = kit.entries(cache), cache.reference()
    path = max(kit.shard_paths(cache), key=lambda path: pq.read_metadata(path).num_rows)
    part = shard.read(path, named.reference.id)
    other = shard.Shard(part.keys[:3], part.logp[:3] - np.array([0, 0, 1.0]), part.counts[:3], None)
    name, encoded = shard.encode(named.reference.id, other)
    shard.save(path.parent, name, encoded)
    journal.Journal(path.parent).add(name, [journal.Origin(0, "elsewhere", [7, 8, 9], [0, 0, 1])])
    code, out, _ = run("verify")
    assert code == 1
    assert "1 disagreeing entries: another shard holds them too; concerns row 9 rejected of elsewhere" in out
    assert "2 duplicate entries: another shard holds them too; concerns rows 7 chosen, 8 chosen of elsewhere" in out
    assert "1 scored, 19 already there" in run("build")[1]
    assert run("verify")[0] == 0
    again = kit.entries(cache)
    assert again.keys() == before.keys()
    assert list(again.values()) == pytest.approx([before[key] for key in again], rel=1e-6)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_attach_writes_the_columns(run, tmp_path, suffix):
    run("build")
    output = tmp_path / f"with.{suffix}"
    code, out, _ = run("attach", "--output", str(output))
    assert (code, out) == (0, f"{output}: 10 rows\n")
    rows = pq.read_table(output).to_pylist() if suffix == "parquet" else list(map(json.loads, output.open()))
    for row, pair, expected in zip(rows, PAIRS, ReferenceCache(tmp_path / "cache").attach(PAIRS), strict=True):
        assert row == {**pair, **{k: expected[k] for k in ("ref_chosen_logps", "ref_rejected_logps")}}
    code, _, err = run("attach", "--output", str(output), "--max-length", "9")
    assert code == 1
    assert err.startswith("fastdpo cache attach: row 0 chosen")
    run("build", "--max-length", "0", "--token-logps")
    assert run("attach", "--output", str(output), "--token-logps")[0] == 0


def test_merge_and_gc(run, tmp_path):
    run("build")
    other = str(tmp_path / "other")
    assert run("merge", "--from", str(tmp_path / "cache"))[0] == 0
    cli.main(["cache", "merge", "--cache", other, "--from", str(tmp_path / "cache")])
    assert kit.entries(ReferenceCache(other)) == kit.entries(ReferenceCache(tmp_path / "cache"))
    code, out, _ = run("gc", "--drop", "reference", "--dry-run")
    assert code == 0 and "would go" in out
    assert run("verify")[0] == 0
    assert run("gc", "--drop", "reference")[0] == 0
    assert run("info")[1].endswith("no references\n")


def test_errors_are_one_line(run, tiny, data, tmp_path):
    for command, more, message in [
        ("build", ["--data", str(tmp_path / "none.jsonl")], "none.jsonl: no such file"),
        ("build", ["--model", str(tmp_path / "no-model")], "tokenizer: "),
        ("build", ["--max-length", "-3"], "max_length: expected an int above 0"),
        ("build", ["--temperature", "0"], "temperature: expected"),
        ("attach", ["--output", str(tmp_path / "x")], "no such folder; `build` makes a cache"),
        ("gc", ["--drop", "x"], "no such folder"),
        ("merge", ["--from", str(tmp_path)], "not a cache"),
    ]:
        code, _, err = run(command, *more)
        assert code == 1, message
        assert message in err
        assert err.strip().count("\n") == 0
    with pytest.raises(SystemExit) as usage:
        cli.main(["cache", "build"])
    assert usage.value.code == 2


def test_conversations_without_a_chat_template_get_a_plain_one(run, tmp_path):
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "".join(json.dumps({k: [{"role": roles[k], "content": v}] for k, v in row.items()}) + "\n" for row in PAIRS)
    )
    assert run("build", "--data", str(path))[0] == 0
    assert run("attach", "--data", str(path), "--output", str(tmp_path / "o.jsonl"))[0] == 0
