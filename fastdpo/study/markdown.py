"""A report as Markdown, of the same blocks as the HTML page."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path

from .blocks import Block, Bullets, Fold, Heading, Paragraph, Picture, Table


def render(blocks: Sequence[Block], folder: Path, deeper: int = 0) -> str:
    """Blocks as GitHub's Markdown; everything in them shows as plain text.

    Args:
        blocks: of the report.
        folder: the Markdown file's own; pictures are linked from there.
        deeper: added to the level of each heading.
    """
    return "\n\n".join(_one(block, folder, deeper) for block in blocks) + "\n"


def escape(text: str) -> str:
    """Plain text as Markdown shows it: no markup, no HTML, one line."""
    # An underscore between letters is no markup, and names are full of them
    marked = re.sub(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^#", r"\\\g<0>", " ".join(text.split()))
    return html.escape(marked, quote=False)


def _one(block: Block, folder: Path, deeper: int) -> str:
    match block:
        case Heading():
            return f"{'#' * (block.level + deeper)} {escape(block.text)}"
        case Paragraph():
            return (f"**{escape(block.lead)}** " if block.lead else "") + escape(block.text)
        case Bullets():
            return "\n".join(f"- {escape(item)}" for item in block.items)
        case Table():
            sides = ["---" if i < block.labels else "---:" for i in range(len(block.header))]
            lines = [block.header, sides, *block.rows]
            cells = [line if line is sides else [escape(cell) for cell in line] for line in lines]
            return "\n".join([f"{escape(block.caption)}\n", *(f"| {' | '.join(line)} |" for line in cells)])
        case Picture():
            link = os.path.relpath(block.path, folder).replace(os.sep, "/")
            return f"![{escape(block.alt)}]({link})\n\n{escape(block.caption)}"
        case Fold():
            return f"**{escape(block.title)}**\n\n{render(block.blocks, folder, deeper).rstrip()}"
