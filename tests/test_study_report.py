"""The report of a study: report.html, report.md, figures; from a folder alone."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("trl")
from study_folder import NO_REFERENCE, START, STRONG, write_study

from fastdpo.study import markdown, page, report, results
from fastdpo.study.blocks import Bullets, Heading, Paragraph, Table

EVIL = "<script>alert(1)</script>|**x**"


class Tags(HTMLParser):
    """All tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []  # of text, between tags
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.parts.append(" ".join(data.split()))

    def names(self) -> list[str]:
        return [tag for tag, _ in self.tags]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def law(cell):
        if cell.beta == 0.01 and cell.reference == "strong":
            return {"degenerate": ["62% of the answers do not end"]}
        return {"error": "CUDA out of memory"} if (cell.beta, cell.reference, cell.seed) == (1.0, "start", 1) else {}

    betas, references = (0.01, 0.1, 1.0), (START, STRONG, NO_REFERENCE)
    folder = write_study(tmp_path_factory.mktemp("study"), law, betas=betas, references=references)
    assert report.write(folder) == folder / "report.html"
    return folder


def files(folder: Path) -> dict[str, str]:
    made = [folder / "report.html", folder / "report.md", *sorted((folder / "figures").iterdir())]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in made}


def test_one_file_that_fetches_nothing(folder: Path) -> None:
    parsed = Tags((folder / "report.html").read_text())
    assert not {"script", "link", "iframe", "object", "embed"} & set(parsed.names())
    sources = [attributes["src"] for _, attributes in parsed.tags if "src" in attributes]
    assert len(sources) == 6 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(attributes["alt"] for tag, attributes in parsed.tags if tag == "img")
    policy = next(a["content"] for t, a in parsed.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-") and "script-src" not in policy
    assert (folder / "report.html").stat().st_size < 2**20


def test_both_say_the_same(folder: Path) -> None:
    """Every word of the page is in the Markdown, and its figures are where it links to."""
    text = (folder / "report.md").read_text()
    links = re.findall(r"\]\((figures/[\w-]+\.png)\)", text)
    assert len(links) == 6 and all((folder / link).read_bytes()[:4] == b"\x89PNG" for link in links)
    body = Tags((folder / "report.html").read_text().partition("<body>")[2])
    flat = " ".join(html.unescape(text.replace("\\", "")).split())
    missing = [part for part in body.parts if part not in flat]
    assert len(body.parts) > 500 and not missing


def test_every_cell_and_failure_is_named(folder: Path) -> None:
    text = html.unescape((folder / "report.md").read_text().replace("\\", ""))
    study = results.load(folder)
    assert len(study.cells) == 54
    for cell in study.cells:
        assert f"| {cell.id} | {cell.same_run_as or '–'} |" in text
    assert "2 runs failed:" in text and "- sigmoid-likelihood-start-beta1-seed1: CUDA out of memory" in text
    assert "62% of the answers do not end" in text and "[degenerate]" in text
    assert "The grid has 54 cells. 24 of them are the same training as another" in text
    row = next(line for line in text.splitlines() if line.startswith("| ratio | start | 1 |"))
    assert row.endswith("| 1 (1 failed) |")


def test_the_same_results_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    before = files(folder)
    report.write(folder)
    assert files(folder) == before
    for cell in (folder / "cells").iterdir():  # seconds differ from run to run
        record = json.loads(cell.read_text()) | {"seconds": 1e4}
        cell.write_text(json.dumps(record))
    report.write(folder)
    assert files(folder) == before and len(before) == 8


def test_text_of_models_and_data_is_escaped(tmp_path: Path) -> None:
    """A script tag in every text that a study folder holds."""

    def law(cell):
        return {"error": EVIL} if cell.seed else {"degenerate": [EVIL]}

    references = [{**START, "model": EVIL}, {**STRONG, "model": EVIL, "role": EVIL}]
    folder = write_study(
        tmp_path,
        law,
        references=references,
        policy=EVIL,
        quality=EVIL + "$x_1$",
        machine=EVIL,
        versions={EVIL: EVIL},
        data={EVIL: EVIL},
        training={EVIL: EVIL},
    )
    report.write(folder)
    page_text, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "script" not in Tags(page_text).names() and page_text.count("&lt;script&gt;alert(1)") > 8
    assert "<script" not in text.lower() and r"\|\*\*x\*\*" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {re.sub(r"\\\|", "", line).count("|") for line in tables}
    assert widths <= {4, 7, 10, 11}, "a bar in a text parted a cell"


@pytest.mark.parametrize(
    "settings",
    [
        {"law": lambda cell: {"error": "no\nmemory"}},
        {"seeds": [0]},
        {"betas": [0.1]},
        {"parameterizations": ["posterior"]},
        {"references": [NO_REFERENCE]},
        {"start": None, "reference_measures": {}},
        {"law": lambda cell: {"quality": None, "kl_start": None}},
        {"law": lambda cell: {"kl_start": -1e-4 * cell.beta}},
        {"loss_types": ["sigmoid", "ipo"], "betas": [0.1, 1.0]},
    ],
    ids=["failed", "one seed", "one beta", "posterior", "none", "no start", "unscored", "no KL", "two losses"],
)
def test_reports_of_less(tmp_path: Path, settings) -> None:
    small = {"betas": [0.03, 0.1, 0.3], "references": [START, STRONG]}
    folder = write_study(tmp_path, **{**small, **settings})
    report.write(folder)
    text = (folder / "report.md").read_text()
    assert "Three questions" in text and "nan" not in text and "None" not in text
    if "law" not in settings and "loss_types" not in settings:
        assert len(list((folder / "figures").iterdir())) == 6
    if settings.get("seeds") == [0]:
        assert "One seed a point, so there are no error bars." in text
    if "loss_types" in settings:
        assert (folder / "figures" / "quality-ipo.png").is_file() and "## Loss: ipo" in text


def test_unfinished_studies_have_a_report(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    for path in sorted((folder / "cells").iterdir())[3:]:
        path.unlink()
    report.write(folder)
    assert "The grid has 90 cells, of which 3 are there so far." in (folder / "report.md").read_text()


def test_cost_is_told_where_it_was_measured(tmp_path: Path) -> None:
    folder = write_study(tmp_path, lambda cell: {"error": "none"})
    side = dict.fromkeys(("startup_seconds", "reference_seconds", "train_seconds", "measure_seconds", "seconds"), 1.25)
    cost = {
        "timed": ["sigmoid-ratio-start-beta0.1-seed0"],
        "cells": 30,
        "workers": 2,
        "threads": 1,
        "machine": EVIL,
        "largest_difference_of_losses": 2e-7,
        "trl": {**side, "sweep_minutes": 40.0},
        "study": {**side, "sweep_minutes": 10.0},
    }
    (folder / "cost.json").write_text(json.dumps(cost))
    report.write(folder)
    text = (folder / "report.md").read_text()
    assert "| the sweep, min | 40.0 | 10.0 |" in text and "1 cell of the study" in text and "by 2e-07 at most" in text
    assert "<script" not in text + (folder / "report.html").read_text()


def test_a_large_loss_does_not_flatten_the_others(tmp_path: Path) -> None:
    folder = write_study(tmp_path, betas=[0.1], parameterizations=["ratio"], references=[START], seeds=[0])
    (path,) = (folder / "cells").iterdir()
    record = json.loads(path.read_text())
    for loss, logarithmic in ((0.7, ["margin"]), (500.0, ["Loss", "margin"])):
        record["curves"][0]["loss"] = loss
        path.write_text(json.dumps(record))
        report.write(folder)
        lines = [line for line in (folder / "report.md").read_text().splitlines() if "logarithmic beyond" in line]
        assert len(lines) == len(logarithmic)
        assert all(name in line for name, line in zip(logarithmic, lines, strict=True))


def test_figures_of_an_earlier_report_go(tmp_path: Path) -> None:
    folder = write_study(tmp_path, betas=[0.1], parameterizations=["ratio"], references=[START])
    (folder / "figures").mkdir()
    (folder / "figures" / "quality-ipo.png").write_bytes(b"of a loss that the study had")
    report.write(folder)
    assert "quality-ipo.png" not in files(folder) and "quality.png" in files(folder)


def test_markdown_shows_plain_text() -> None:
    """By a Markdown parser: what goes in comes out, and no tag with it."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    texts = ["a_b_c _d_ *e*f*", "`code` [link](x) ![i](y)", "<b>bold</b> & &amp;", "~~gone~~ \\n | bar", "# no heading"]
    made = markdown.render(
        [
            Heading("h_1_ *x*"),
            *(Paragraph(text, lead=text) for text in texts),
            Bullets(texts),
            Table(texts, [texts], "*"),
        ],
        Path("."),
    )
    shown = Tags(parser.render(made))
    assert not {"em", "code", "a", "img", "b", "s", "h1"} & set(shown.names())
    assert shown.names().count("h2") == 1 and shown.names().count("td") == len(texts)
    for text in texts:
        assert "".join(shown.parts).count(" ".join(text.split())) == 5, text


def test_a_browser_finds_nothing_to_refuse(folder: Path, tmp_path: Path) -> None:
    """Headless Chromium: style and pictures are let in by the page's own policy, and text stays text."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    evil = tmp_path / "evil.html"
    evil.write_text(page.document(EVIL, [Heading(EVIL), Paragraph(EVIL + "<img src=x onerror=alert(1)>", lead=EVIL)]))
    for path in (folder / "report.html", evil):
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
        done = subprocess.run(
            [chromium, *options, "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert ":CONSOLE" not in done.stderr, done.stderr
        assert {"script", "i"}.isdisjoint(Tags(done.stdout).names()) and "</html>" in done.stdout
    assert "img" not in Tags(done.stdout).names()
