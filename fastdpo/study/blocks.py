"""What a report is made of, for HTML (page.py) and Markdown (markdown.py). All text is plain: these escape it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, Union


class Heading(NamedTuple):
    text: str
    level: int = 2


class Paragraph(NamedTuple):
    text: str
    lead: str = ""  # in bold, before the text


class Bullets(NamedTuple):
    items: Sequence[str]


class Table(NamedTuple):
    """Rows of text; the first `labels` columns are names, the others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    labels: int = 1


class Picture(NamedTuple):
    path: Path  # of a PNG
    alt: str  # what it shows, for those who cannot see it
    caption: str


class Fold(NamedTuple):
    """Blocks that are folded away until asked for; printed in full."""

    title: str
    blocks: Sequence[Block]


Block: TypeAlias = Union[Heading, Paragraph, Bullets, Table, Picture, "Fold"]
