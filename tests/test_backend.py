"""The choice of a backend, and its loud failures."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdpo import token_logps
from fastdpo.backend import choose, load

LOGITS, LABELS = torch.randn(3, 11), torch.tensor([1, -100, 10])
# One loss after another: a backend that cannot be had is said once
TWICE = """import torch, fastdpo
for _ in range(2):
    out = fastdpo.token_logps(torch.zeros(2, 4), torch.zeros(2).long())
print(out.logps[0].item())"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
def test_cpu_is_there_where_a_compiler_is() -> None:
    assert not isinstance(load("cpu"), str)
    assert choose("auto", torch.device("cpu"), torch.bfloat16) is load("cpu")


def test_float64_is_eager() -> None:
    assert choose("auto", torch.device("cpu"), torch.float64) is load("eager")
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run: it has no kernels for torch.float64"):
        token_logps(LOGITS.double(), LABELS, backend="cpu")


def test_triton_on_a_cpu_raises() -> None:
    done = run("import torch, fastdpo; fastdpo.token_logps(torch.randn(1, 3), torch.zeros(1).long(), backend='triton')")
    assert done.returncode != 0
    reason = "its tensors must be on cuda, got cpu (TRITON_INTERPRET=1 runs the kernels on a CPU, for tests)"
    assert f"RuntimeError: backend='triton' cannot run: {reason}" in done.stderr


def test_without_a_compiler_eager_works_with_one_warning(tmp_path: Path) -> None:
    code = (
        "import torch, fastdpo\n"
        "x = torch.randn(4, 3, 7, requires_grad=True)\n"
        "for _ in range(2):\n"
        "    fastdpo.dpo_loss(x, torch.zeros(4, 3).long()).loss.backward()\n"
        "print(x.grad.abs().sum() > 0)\n"
        "try: fastdpo.token_logps(x, torch.zeros(4, 3).long(), backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = run(code, FASTDPO_CACHE=str(tmp_path), PATH=str(tmp_path), CXX="")
    assert done.returncode == 0, done.stderr
    assert "tensor(True)" in done.stdout
    assert "backend='cpu' cannot run: no C++ compiler found" in done.stdout
    assert done.stderr.count("'cpu' backend is not available (no C++ compiler found") == 1


def test_a_failing_compiler_names_its_log(tmp_path: Path) -> None:
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = run(TWICE, FASTDPO_CACHE=str(tmp_path / "cache"), CXX=str(compiler))
    (log,) = (tmp_path / "cache").iterdir()  # nothing half built is left
    assert float(done.stdout) == pytest.approx(-math.log(4)), done.stderr
    assert done.stderr.count(f"the C++ build failed with {compiler}; its output is in {log}") == 1
    assert "this compiler is broken" in log.read_text()
    nothing = run(TWICE, FASTDPO_CACHE=str(tmp_path / "other"), CXX="true")  # succeeds, and writes no library
    assert nothing.stderr.count("the C++ build failed with true; its output is in") == 1


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("/nowhere/c++ -O2", "is not a program"),
        (" ", "is not a program"),
        ("c++ '-O2", "cannot be read (No closing quotation)"),
    ],
)
def test_a_compiler_that_is_none(tmp_path: Path, given: str, why: str) -> None:
    done = run(TWICE, FASTDPO_CACHE=str(tmp_path), CXX=given)
    assert float(done.stdout) == pytest.approx(-math.log(4)), done.stderr
    assert done.stderr.count(f"no C++ compiler found: CXX={given!r} {why}") == 1


@pytest.mark.skipif(isinstance(load("cpu"), str), reason="no C++ compiler")
def test_a_built_library_needs_no_compiler(tmp_path: Path) -> None:
    code = "from fastdpo.backend import load; print(load('cpu'))"
    done = run(code, PATH=str(tmp_path), CXX="")
    assert "module 'fastdpo.cpu'" in done.stdout


def test_a_blank_cache_folder_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else a library would be built into, and loaded from, whatever folder a process runs in."""
    from fastdpo.cpu.build import cache_folder

    monkeypatch.setenv("FASTDPO_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fastdpo"


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")  # a permission would not keep root out
    done = run(TWICE, FASTDPO_CACHE=str(tmp_path / "file" / "cache"))
    assert float(done.stdout) == pytest.approx(-math.log(4)), done.stderr
    assert done.stderr.count("the C++ library cannot be built in") == 1
    assert "set FASTDPO_CACHE to a folder that can be written" in done.stderr


@pytest.mark.skipif(isinstance(load("cpu"), str), reason="no C++ compiler")
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    """A compiler that waits for the other process in the middle of its link: both end with the library."""
    from fastdpo.cpu.build import library

    compiler = tmp_path / "slow-c++"
    compiler.write_text(
        f"""#!{sys.executable}
import os, pathlib, shutil, sys, time
out = sys.argv[sys.argv.index("-o") + 1]
if "-shared" in sys.argv:
    shutil.copy({str(library())!r}, out)
    pathlib.Path({str(tmp_path)!r}, f"linking-{{os.getpid()}}").touch()
    until = time.time() + 120
    while len(list(pathlib.Path({str(tmp_path)!r}).glob("linking-*"))) < 2 and time.time() < until:
        time.sleep(0.01)
else:
    pathlib.Path(out).touch()
"""
    )
    compiler.chmod(0o755)
    code = "from fastdpo.backend import load; print(load('cpu'))"
    environment = {**os.environ, "FASTDPO_CACHE": str(tmp_path / "cache"), "CXX": str(compiler)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert ["module 'fastdpo.cpu'" in process.communicate(timeout=300)[0] for process in both] == [True, True]
    assert len(list(tmp_path.glob("linking-*"))) == 2, "both built"
    (folder,) = (tmp_path / "cache").iterdir()
    assert [path.name for path in folder.iterdir()] == ["fastdpo_cpu.so"]


def test_a_build_is_for_one_kind_of_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another CPU, or torch's capability for this one, built has another name, and is not loaded."""
    from fastdpo.cpu import build

    flags = build.compile_flags()
    here = build._key(flags)
    monkeypatch.setattr(build, "_cpu_features", lambda: "flags : avx2")
    older = build._key(flags)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2-of-a-test")
    assert len({here, older, build._key(build.compile_flags())}) == 3


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this CPU has no AVX-512 to do without")
def test_without_avx512() -> None:
    """The C++ kernels as built for an older CPU, through the same tests."""
    tests = Path(__file__).parent
    files = [str(tests / "test_kernels.py"), str(tests / "test_compaction.py")]
    code = f"import sys, pytest; sys.exit(pytest.main(['-k', 'cpu', *{files}]))"
    done = run(code, ATEN_CPU_CAPABILITY="avx2", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout
