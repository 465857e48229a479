"""The wheel holds every file of the package and nothing else, and works without the checkout (`make wheel`: whole)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# folder -> in the wheel
SOURCES = {"fastdpo": "fastdpo"} | {
    f"kernels/{path.parent.name}": f"fastdpo/{path.parent.name}" for path in (ROOT / "kernels").glob("*/__init__.py")
}
SHIPPED = {".py", ".cpp", ".h", ".typed", ".html", ".css", ".js"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked. Built from a copy: setuptools writes beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("fastdpo", "kernels"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored, symlinks=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=folder / "source", check=True, capture_output=True)
    (path,) = folder.glob("fastdpo-*-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def files(folder: Path) -> set[str]:
    """Of the package, relative to the folder."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix() for path in found if "__pycache__" not in path.parts}


def test_every_file_of_the_package(wheel: Path) -> None:
    expected = {
        f"{target}/{name}"
        for source, target in SOURCES.items()
        for name in files(ROOT / source)
        if not name.startswith(("gpu/", "cpu/"))  # links that a development checkout may have
    }
    assert {Path(name).suffix for name in expected} <= SHIPPED
    assert {name for name in files(wheel) if ".dist-info/" not in name} == expected


def test_metadata(wheel: Path) -> None:
    (info,) = wheel.glob("*.dist-info")
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    assert "Requires-Python: >=3.10" in metadata and "Requires-Dist: torch>=2.8" in metadata
    assert "License: Apache-2.0" in metadata and (info / "licenses" / "LICENSE").is_file()
    assert "fastdpo = fastdpo.cli:main" in (info / "entry_points.txt").read_text(encoding="utf-8")


def test_it_works_alone(wheel: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    command = [sys.executable, str(ROOT / "tests" / "smoke.py"), str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"smoke test passed: {wheel / 'fastdpo'}" in done.stdout
