"""Nothing is unpickled, no code of a model runs unasked, and a reference's name is no path (test_cache_paths.py)."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = ("yaml.unsafe_load", "yaml.full_load", "eval", "exec")
PICKLING = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SOURCES = sorted([*(ROOT / "fastdpo").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(file, dotted name of the function, call) of every call in the package."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield str(path.relative_to(ROOT)), ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(one.value) for one in call.keywords if one.arg == name), None)


def test_nothing_is_unpickled() -> None:
    for file, name, call in calls():
        if name == "torch.load":
            assert keyword(call, "weights_only") == "True", file
        if name in ("np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") in (None, "False"), file
        if name == "yaml.load":
            assert "class Loader(yaml.SafeLoader)" in (ROOT / file).read_text(encoding="utf-8"), file
            assert ast.unparse(call.args[1]) == "Loader", file
        assert name not in FORBIDDEN, (file, name)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.partition(".")[0] for alias in node.names} & PICKLING, path
            if isinstance(node, ast.ImportFrom):
                assert node.module not in (*PICKLING, "yaml"), path


def test_the_loader_of_a_config_is_a_safe_one(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    pytest.importorskip("trl")
    from fastdpo.study.config import read
    from fastdpo.study.errors import StudyError

    (tmp_path / "config.yaml").write_text(f"policy: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(StudyError):
        read(tmp_path / "config.yaml")
    assert not (tmp_path / "made").exists()


def test_no_code_of_a_model_runs_unasked() -> None:
    assert [file for file, _, call in calls() if keyword(call, "trust_remote_code") == "True"] == []
    pytest.importorskip("pyarrow")
    pytest.importorskip("yaml")
    from fastdpo.cache import ReferenceModel
    from fastdpo.study.config import StudyConfig

    for one in (ReferenceModel, StudyConfig):
        assert inspect.signature(one).parameters["trust_remote_code"].default is False


@pytest.mark.parametrize("name", ["../out", "a/b", "/etc/passwd", "..", "", "a\\b", "a\0b"])
def test_a_references_name_is_no_path(name: str) -> None:
    pytest.importorskip("pyarrow")
    from fastdpo.cache import CacheError
    from fastdpo.cache.manifest import check_name

    with pytest.raises(CacheError, match="name"):
        check_name(name)
