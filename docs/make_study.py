"""A section of docs/study.md and its pictures, from the folder of a study: `python docs/make_study.py FOLDER`.

All numbers and sentences are the folder's own report's; nothing else in docs/study.md is touched.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from fastdpo.study import answers, figures, markdown, report, results, tables
from fastdpo.study.blocks import Block, Bullets, Heading, Paragraph, Picture
from fastdpo.study.results import Study

PAGE = Path(__file__).parent / "study.md"
BEGIN, END = "<!-- demo study -->", "<!-- end of demo study -->"
PICTURES = ("quality", "frontier")


def write(folder: Path, page: Path = PAGE) -> None:
    """Put the section between the page's two marks, and study_<name>.png beside the page.

    Raises:
        StudyError: the folder holds no study.
        ValueError: the page has not exactly one of each mark.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page}: expected one {BEGIN} and one {END}")
    section = markdown.render(blocks(results.load(folder), page.parent), page.parent)
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{section}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def blocks(study: Study, beside: Path) -> list[Block]:
    """The section: how it was run, the paper's tables for this study, the answers, and what they do not show."""
    loss_type = study.config["loss_types"][0]
    known = [table for table in (tables.over_beta(study, loss_type), tables.best_of_each(study, loss_type)) if table]
    cost = tables.cost(study)
    return [
        *report.asked(study),
        *known,
        *pictures(study, loss_type, beside),
        *report.questions(study, loss_type),
        Paragraph(answers.rule()),
        Heading("What this does not show", 3),
        Bullets(answers.caveats(study)),
        *([Heading("Cost", 3), *cost] if cost else []),
    ]


def pictures(study: Study, loss_type: str, beside: Path) -> list[Picture]:
    """Some of the report's pictures, drawn again and kept beside the page."""
    kept = []
    with tempfile.TemporaryDirectory() as scratch:
        for picture in figures.draw(study, loss_type, Path(scratch)):
            name = picture.path.stem.split("-")[0]
            if name in PICTURES:
                target = beside / f"study_{name}.png"
                shutil.copyfile(picture.path, target)
                kept.append(picture._replace(path=target))
    return kept


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
