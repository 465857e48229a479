"""Builds the C++ library once, on first use, with ninja; afterwards it is only loaded.

The library lies in the user's cache, in a folder named by everything that it depends on: sources, torch, flags, the
CPU's features. Builds happen in a folder of their own and are renamed into place: several processes may
build at once, and one that is killed leaves nothing behind that another could wait for or load.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = (
    "row_forward.cpp",
    "row_backward.cpp",
    "stream.cpp",
    "stream_forward.cpp",
    "choose.cpp",
    "stream_backward.cpp",
    "stream_gradient.cpp",
    "compact_gradient.cpp",
    "sequences.cpp",
    "bindings.cpp",
)
HEADERS = (
    "compact_gradient.h",
    "gradient.h",
    "kernels.h",
    "pack.h",
    "screen.h",
    "simd.h",
    "stream.h",
    "stream_forward.h",
    "stream_tile.h",
    "streamer.h",
    "tasks.h",
    "transform.h",
)


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the message is one line, the log is named in it."""


def library() -> Path:
    """Path of the built library; builds it if this machine has not yet.

    Raises:
        BuildError: no C++ compiler, the build failed, or there is no place for it.
    """
    flags = compile_flags()
    key = _key(flags)
    folder = cache_folder() / f"cpu-{key}"
    target = folder / "fastdpo_cpu.so"
    if not target.exists():
        compiler = find_compiler()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as temporary:
                _build(Path(temporary), compiler, flags, cache_folder() / f"build-{key}.log")
                folder.mkdir(exist_ok=True)
                os.replace(Path(temporary) / target.name, target)
        except OSError as error:
            raise BuildError(
                f"the C++ library cannot be built in {folder.parent} ({error.strerror}): set FASTDPO_CACHE to a folder "
                "that can be written"
            ) from error
    return target


def cache_folder() -> Path:
    """$FASTDPO_CACHE, else fastdpo/ in the user's cache folder."""
    if given := os.environ.get("FASTDPO_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdpo"


def find_compiler() -> list[str]:
    """$CXX, a program and perhaps its arguments ("ccache g++"); or the first of the usual names on the PATH.

    Raises:
        BuildError: there is none.
    """
    if given := os.environ.get("CXX"):
        try:
            words = shlex.split(given)
        except ValueError as error:  # a quotation that does not end
            raise BuildError(f"no C++ compiler found: CXX={given!r} cannot be read ({error})") from error
        if not words or shutil.which(words[0]) is None:
            raise BuildError(f"no C++ compiler found: CXX={given!r} is not a program")
        return words
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler found (looked for $CXX, c++, g++, clang++)")


def compile_flags() -> list[str]:
    """The flags of at::vec's and torch's headers for this CPU."""
    capability = torch.backends.cpu.get_cpu_capability()  # AVX512, AVX2, DEFAULT, ...
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    include = Path(torch.__path__[0]) / "include"
    flags = ["-O3", "-std=c++20", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", native]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    flags += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    if sys.platform == "linux":
        flags.append("-fopenmp")
    return flags


def _key(flags: list[str]) -> str:
    # Not the compiler: a machine without one may use what another built
    digest = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        digest.update((HERE / name).read_bytes())
    for part in (torch.__version__, *flags, _cpu_features()):
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()[:16]


def _cpu_features() -> str:
    # -march=native means another thing on another machine that shares the cache folder
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def _build(folder: Path, compiler: list[str], flags: list[str], log: Path) -> None:
    import ninja

    lib = Path(torch.__path__[0]) / "lib"
    objects = [source.replace(".cpp", ".o") for source in SOURCES]
    lines = [
        f"cxx = {_words(compiler)}",
        f"flags = {_words(flags)}",
        "rule compile\n  command = $cxx $flags -c $in -o $out",
        f"rule link\n  command = $cxx -shared $in -o $out {_words([f'-L{lib}'])} -lc10 -ltorch_cpu -ltorch"
        + (" -fopenmp" if "-fopenmp" in flags else ""),
        *(f"build {o}: compile {_escape(str(HERE / s))}" for o, s in zip(objects, SOURCES, strict=True)),
        f"build fastdpo_cpu.so: link {' '.join(objects)}",
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    done = subprocess.run([Path(ninja.BIN_DIR) / "ninja"], cwd=folder, capture_output=True, text=True)
    if done.returncode or not (folder / "fastdpo_cpu.so").exists():
        log.write_text(done.stdout + done.stderr)
        raise BuildError(f"the C++ build failed with {' '.join(compiler)}; its output is in {log}")


def _words(words: list[str]) -> str:
    """For a command line of ninja, which hands it to a shell."""
    return " ".join(map(shlex.quote, words)).replace("$", "$$")


def _escape(path: str) -> str:
    """For a path of ninja's own syntax."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
