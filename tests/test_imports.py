"""What importing fastdpo does and does not do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import fastdpo

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_package_called_kernels_is_not_shadowed(tmp_path: Path) -> None:
    """From the repository's root, `import kernels` finds an installed package of that name, not our folder."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("stand_in = 'of PyPI'")
    code = (
        f"import sys; sys.path[:0] = ['']; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.stand_in)"
    )
    assert run(code) == "of PyPI"


def test_import_is_light() -> None:
    heavy = ["trl", "transformers", "datasets", "matplotlib", "triton"]
    assert run(f"import sys, fastdpo; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in fastdpo.__all__:
        assert getattr(fastdpo, name).__doc__, name


def test_readme_names_resolve() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"fastdpo\.([a-zA-Z_]+)\(", readme)):
        assert hasattr(fastdpo, name), name
