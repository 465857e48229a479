"""mkdocs hook: README.md, CHANGELOG.md and kernels/README.md become pages, and links to them lead there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "kernels/README.md": "kernels.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    source = {page: source for source, page in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = (ROOT / source).parent

    def link(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        name = (folder / target).resolve().relative_to(ROOT).as_posix()
        return f"]({PAGES.get(name, name.removeprefix('docs/'))}{anchor})"

    return re.sub(r"\]\(([\w./-]+\.(?:md|png|html))(#[\w-]+)?\)", link, markdown)
