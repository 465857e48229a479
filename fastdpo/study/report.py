"""A study's report, from its folder alone: report.html, one self-contained page, and report.md with figures/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..cache import files
from . import answers, figures, markdown, page, results, tables, wording
from .blocks import Block, Bullets, Fold, Heading, Paragraph
from .results import Study
from .summary import groups

TITLE = "The reference policy: a study"
PICTURES = {  # picture -> heading above it
    "quality": "Quality over β",
    "frontier": "Quality against KL",
    "displacement": "Likelihood displacement",
    "curves": "Learning curves",
}


def write(folder: Path) -> Path:
    """Write report.html, report.md and figures/ into a study's folder; the same results give the same bytes.

    Args:
        folder: of a study, finished or not; what is not there yet is named.

    Returns:
        The path of report.html.

    Raises:
        StudyError: the folder holds no study.
    """
    study = results.load(folder)
    for old in (folder / "figures").glob("*.png"):  # of an earlier report with other losses
        old.unlink()
    blocks = make(study)
    html = folder / "report.html"
    files.write(html, page.document(TITLE, blocks).encode())
    files.write(folder / "report.md", markdown.render(blocks, folder).encode())
    return html


def make(study: Study) -> list[Block]:
    """The report, block by block; draws its pictures into the study's folder."""
    losses = study.config["loss_types"]
    blocks: list[Block] = [Heading(TITLE, 1), *asked(study), *_state(study)]
    for loss_type in losses:
        if len(losses) > 1:
            blocks.append(Heading(f"Loss: {loss_type}"))
        blocks += of_loss(study, loss_type)
    blocks += [Heading("What this does not show"), Bullets(answers.caveats(study))]
    cost = tables.cost(study)
    blocks += [Heading("Cost"), *cost] if cost else []
    blocks.append(Fold("Every cell", [tables.every_cell(study)]))
    return blocks


def of_loss(study: Study, loss_type: str) -> list[Block]:
    """Answers, pictures and tables of the runs with one loss."""
    blocks: list[Block] = [Heading("Three questions"), Paragraph(answers.rule())]
    blocks += questions(study, loss_type)
    blocks += [table for table in (tables.best_of_each(study, loss_type), tables.over_beta(study, loss_type)) if table]
    heading = ""
    for picture in figures.draw(study, loss_type, study.folder / "figures"):
        found = PICTURES[picture.path.stem.split("-")[0]]
        blocks += [Heading(found)] if found != heading else []
        blocks.append(picture)
        heading = found
    everything = tables.everything(study, loss_type)
    return [*blocks, Heading("All measures"), *everything] if everything else blocks


def questions(study: Study, loss_type: str) -> list[Block]:
    """The three answers, each with the paper's beside it."""
    blocks: list[Block] = []
    for number, answer in enumerate(answers.answers(study, loss_type), start=1):
        blocks += [
            Heading(f"{number}. {answer.question}", 3),
            Paragraph(answer.here, lead="Here:"),
            Paragraph(answer.paper, lead="In the paper (arXiv 2407.13709):"),
            Paragraph(answer.beside, lead="Side by side:"),
        ]
    return blocks


def asked(study: Study) -> list[Block]:
    """What was asked, of what, where."""
    config = study.config
    better = "higher" if config["higher_is_better"] else "lower"
    references = [
        f"{one['name']}: {'no reference' if one['model'] is None else one['model']}"
        + (f" ({wording.ROLES[one['role']]})" if one["role"] in wording.ROLES else "")
        for one in config["references"]
    ]
    items = [
        f"Policy: {config['policy']}",
        f"References: {'; '.join(references)}",
        f"Rewards: {wording.listed(config['parameterizations'])}",
        f"β: {wording.listed([f'{beta:g}' for beta in config['betas']])}",
        f"Loss: {wording.listed(config['loss_types'])}",
        f"Seeds: {wording.listed(config['seeds'])}",
        f"Quality: {config['quality']} ({better} is better)",
        *_mapping("Data", config.get("data")),
        *_mapping("Training", config.get("training")),
        *_mapping("Sampled answers", config.get("sampling")),
        *_mapping("Versions", config.get("versions")),
    ]
    if config.get("machine"):
        items.append(f"Machine: {config['machine']}")
    asked = (
        "How strong should the KL constraint of DPO be, is a reference needed, and does a stronger one help? These are "
        "the questions of arXiv 2407.13709, Understanding Reference Policies in Direct Preference Optimization. The "
        "answers below are computed from the runs of this study."
    )
    return [Paragraph(asked), Bullets(items)]


def _mapping(name: str, values: Any) -> list[str]:
    """One line for a mapping of settings, without those that are not set."""
    if not isinstance(values, dict):
        return [f"{name}: {values}"] if values else []
    told = [f"{key} {value}" for key, value in values.items() if value is not None]
    return [f"{name}: {', '.join(told)}"] if told else []


def _state(study: Study) -> list[Block]:
    """How many cells there are; which failed, share a run or are degenerate."""
    names = ("loss_types", "parameterizations", "references", "betas", "seeds")
    planned = 1
    for name in names:
        planned *= len(study.config[name])
    there = len(study.cells)
    shared = [cell for cell in study.cells if cell.same_run_as]
    failed = [cell for cell in study.cells if cell.status != "done" and not cell.same_run_as]
    told = f"The grid has {wording.count(planned, 'cell')}"
    told += "." if there == planned else f", of which {there} {'is' if there == 1 else 'are'} there so far."
    if shared:
        told += (
            f" {len(shared)} of them {'is' if len(shared) == 1 else 'are'} the same training as another by "
            "construction, run once: the posterior's reward β log p(y|x) asks no reference anything, and without a "
            f"reference the other rewards are that one. So there {_runs(there - len(shared))}."
        )
    ill = [group for group in groups(study) if group.degenerate]
    if ill:
        runs = sum(group.degenerate_seeds for group in ill)
        told += f" {wording.count(runs, 'run')} {'is' if runs == 1 else 'are'} degenerate and marked so."
    blocks: list[Block] = [Heading("The runs"), Paragraph(told)]
    if failed:
        blocks.append(Paragraph(f"{wording.count(len(failed), 'run')} failed:"))
        blocks.append(Bullets([f"{cell.id}: {cell.error or 'no reason known'}" for cell in failed]))
    return blocks


def _runs(number: int) -> str:
    return f"{'is' if number == 1 else 'are'} {wording.count(number, 'run')}"
