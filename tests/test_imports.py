"""What importing fastdpo does and does not do; and the shape of its modules: no cycle, no long file, few parameters."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fastdpo

ROOT = Path(__file__).parent.parent
MOST_LINES, MOST_PARAMETERS = 400, 12


def sources() -> dict[str, Path]:
    """module -> its file, of the package as setup.py puts it together; those of a checkout's own links left out."""
    found = {}
    backends = [path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")]
    for folder, package in (("fastdpo", "fastdpo"), *((f"kernels/{name}", f"fastdpo.{name}") for name in backends)):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if not any(parent.is_symlink() for parent in path.parents):
                found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


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


def test_the_readmes_map() -> None:
    """Every module and every folder is in it, by itself or with its folder; and what is in it is there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = readme.partition("## In the code\n")[2].partition("\n## ")[0].splitlines()
    named: set[Path] = set()
    for cell in (row.split("|")[1] for row in rows if row.startswith("| `")):
        folder = Path()
        for text in re.findall(r"`([^`]+)`", cell):  # `fastdpo/cli.py`, `train.py`: both are of fastdpo/
            folder = Path(text).parent if "/" in text.rstrip("/") else folder
            found = set(ROOT.glob(text if "/" in text else f"{folder}/{text}"))
            assert found, f"{text}: not there"
            named |= found
    folders = [path for path in ROOT.glob("[!.]*/") if any((*path.glob("*.py"), *path.glob("*.md")))]
    every = [*folders, *(path for path in sources().values() if path.name != "__init__.py")]
    inside = {child for path in named if path.is_dir() for child in path.rglob("*")}
    left_out = set(every) - named - inside - {folder for path in named for folder in path.parents}
    assert not left_out, ", ".join(sorted(str(path.relative_to(ROOT)) for path in left_out))


# --- its shape -------------------------------------------------------------------------------------------------------


def imported(module: str, path: Path, known: set[str]) -> Iterator[str]:
    """Which of the known modules one imports, in its functions and `if TYPE_CHECKING:` too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = [name if (name := f"{source}.{alias.name}") in known else source for alias in node.names]
        yield from (name for name in names if name in known)


def test_no_import_cycle() -> None:
    modules = sources()
    graph = {name: set(imported(name, path, set(modules))) for name, path in modules.items()}
    assert {"fastdpo.tiles", "fastdpo.options"} <= graph["fastdpo.head"] and "fastdpo.gpu.launch" in graph
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"a cycle: {' -> '.join(reversed(error.args[1]))}") from None


def test_no_long_file() -> None:
    folders = ("fastdpo", "kernels", "benchmarks", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def test_few_parameters() -> None:
    """But for what users call, by keywords (in `__all__`, and methods of what is), and so the functions of a backend;
    Triton kernels; and the operators of ops.py, whose schemas say their arguments."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources().values()}
    public = {
        name
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in ast.literal_eval(node.value)
    }
    assert {"dpo_loss", "ReferenceCache", "LigerFusedLinearDPOLoss"} <= public
    many = []
    for path, tree in trees.items():
        called = [node for node in tree.body if getattr(node, "name", None) in public]
        allowed = {*called, *(method for node in called if isinstance(node, ast.ClassDef) for method in node.body)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node not in allowed:
                given = node.args
                every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
                kernel = any(ast.unparse(one).startswith("triton.jit") for one in node.decorator_list)
                if sum(one is not None for one in every) > MOST_PARAMETERS and not kernel:
                    many.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert many == []
