"""The report's tables: those of the paper's form, every measure of every point, and every cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import wording
from .blocks import Block, Paragraph, Table
from .results import Study, read_json
from .summary import NONE, Group, best, groups, of

# Measure -> heading; docs/study.md says what each is
ON_PAIRS = {
    "reward_accuracy": "reward accuracy",
    "reward_margin": "reward margin",
    "chosen_displacement": "Δ log p(chosen)",
    "rejected_displacement": "Δ log p(rejected)",
    "chosen_falls": "chosen falls",
}
ON_ANSWERS = {
    "kl_start": "KL to start, nats/token",
    "kl_start_sequence": "KL to start, nats/answer",
    "kl_reference": "KL to reference, nats/token",
    "length": "length, tokens",
    "repetition": "repetition",
}


def _groups(study: Study, loss_type: str) -> list[Group]:
    return [group for group in groups(study) if group.setting.loss_type == loss_type]


def _decimals(found: Sequence[Group], measure: str) -> int:
    return wording.digits(mean and mean.value for mean in (group.mean(measure) for group in found))


def _quality(group: Group, decimals: int) -> str:
    """As the paper writes it: degenerate runs by that word."""
    if not group.cells:
        return "failed"
    shown = wording.show(group.mean("quality"), decimals)
    return f"{shown} [degenerate]" if group.degenerate else shown


def over_beta(study: Study, loss_type: str) -> Table | None:
    """Quality, a row a beta, a column a reference of one parameterization: the paper's form for questions 1 and 3.

    Of the ratio, or what there is in its place; the best of each column has a star.
    """
    found = _groups(study, loss_type)
    there = {group.setting.parameterization for group in found}
    speaking = next((one for one in ("ratio", "likelihood", "posterior") if one in there), None)
    if speaking is None:
        return None
    names = list(dict.fromkeys(g.setting.reference for g in found if g.setting.parameterization == speaking))
    decimals, higher = _decimals(found, "quality"), study.config["higher_is_better"]
    cells: dict[tuple[float, str], str] = {}
    for name in names:
        column = of(found, loss_type, speaking, name)
        top = best(column, higher)
        for group in column:
            cells[group.beta, name] = _quality(group, decimals) + (" *" if group is top else "")
    rows = [
        [f"{beta:g}", *(cells.get((beta, name), wording.EMPTY) for name in names)]
        for beta in sorted({beta for beta, _ in cells}, reverse=True)
    ]
    header = ["β", *(wording.reference(name, study.config) for name in names)]
    quality = wording.sentence(study.config["quality"])
    return Table(header, rows, f"{quality} of the {speaking}, for each β and reference; * the best of a column.")


def best_of_each(study: Study, loss_type: str) -> Table | None:
    """The best beta of each setting: the paper's form for question 2, with every reference."""
    found = _groups(study, loss_type)
    decimals, kl = _decimals(found, "quality"), _decimals(found, "kl_start")
    moved = _decimals(found, "chosen_displacement")
    rows = []
    for setting in dict.fromkeys(group.setting for group in found):
        top = best([group for group in found if group.setting == setting], study.config["higher_is_better"])
        start = [setting.parameterization, wording.reference(setting.reference, study.config)]
        if top is None:
            rows.append([*start, wording.EMPTY, "no healthy run", wording.EMPTY, wording.EMPTY])
            continue
        shown = [
            wording.show(top.mean(measure), places)
            for measure, places in (("quality", decimals), ("kl_start", kl), ("chosen_displacement", moved))
        ]
        rows.append([*start, f"{top.beta:g}", *shown])
    header = ["reward", "reference", "best β", study.config["quality"], ON_ANSWERS["kl_start"]]
    caption = "The best β of each parameterization and reference. ± is one standard error over seeds."
    return Table([*header, ON_PAIRS["chosen_displacement"]], rows, caption, labels=2) if rows else None


def everything(study: Study, loss_type: str) -> list[Table]:
    """All measures of every point of the grid, means over seeds: first on held-out pairs, then on sampled answers."""
    found = _groups(study, loss_type)
    columns = {"quality": study.config["quality"], **ON_PAIRS}
    seeds = _measured(found, columns, "seeds", _seeds)
    ill = _measured(found, ON_ANSWERS, "degenerate", lambda group: "; ".join(group.degenerate))
    caption = "means over seeds ± one standard error, in the grid's order. docs/study.md says what each measure is."
    tables = (
        seeds._replace(caption=f"The quality, and measures on held-out pairs; {caption}"),
        ill._replace(caption=f"Measures on sampled answers; {caption}"),
    )
    return [table for table in tables if table.rows]


def _measured(found: Sequence[Group], columns: dict[str, str], last: str, tell: Callable[[Group], str]) -> Table:
    """A row a group: its setting, measures, and what `tell` says of it."""
    places = {measure: _decimals(found, measure) for measure in columns}
    rows = []
    for group in found:
        name = wording.EMPTY if group.setting.reference == NONE else group.setting.reference
        shown = [wording.show(group.mean(measure), places[measure]) for measure in columns]
        rows.append([group.setting.parameterization, name, f"{group.beta:g}", *shown, tell(group)])
    return Table(["reward", "reference", "β", *columns.values(), last], rows, "", labels=2)


def _seeds(group: Group) -> str:
    return f"{len(group.cells)}" + (f" ({len(group.failed)} failed)" if group.failed else "")


def every_cell(study: Study) -> Table:
    """Each cell of the grid by its id."""
    healthy = [cell.measures for cell in study.cells if cell.status == "done"]
    measures = ("quality", "reward_accuracy", "kl_start")
    places = {measure: wording.digits(one.get(measure) for one in healthy) for measure in measures}
    rows = []
    for cell in study.cells:
        done = cell.status == "done"
        shown = [wording.number(cell.measures.get(one) if done else None, places[one]) for one in measures]
        state = cell.error or "failed" if not done else "; ".join(cell.degenerate)
        rows.append([cell.id, cell.same_run_as or wording.EMPTY, *shown, state])
    header = ["cell", "same run as", study.config["quality"], "reward accuracy", "KL to start", "failed or degenerate"]
    return Table(header, rows, "Every cell. results.csv holds all of its measures.", labels=2)


def cost(study: Study) -> list[Block]:
    """What cost.json says, if `fastdpo study --cost` wrote one: runs here, and as runs of TRL alone."""
    found = read_json(study.folder / "cost.json")
    if found is None:
        return []
    parts = {
        "start-up, s": "startup_seconds",
        "reference's log-probabilities, s": "reference_seconds",
        "training, s": "train_seconds",
        "measures, s": "measure_seconds",
        "in all, s": "seconds",
        "the sweep, min": "sweep_minutes",
    }
    rows = [[name, f"{found['trl'][key]:.1f}", f"{found['study'][key]:.1f}"] for name, key in parts.items()]
    told = (
        f"{wording.count(len(found['timed']), 'cell')} of the study ran again, each as a run of TRL's DPOTrainer in a "
        "process of its own with the reference model in memory, and was measured in the same way; the losses differ "
        f"from the study's by {found['largest_difference_of_losses']:.0e} at most, relative. TRL's time for the sweep "
        "is reckoned from their mean."
    )
    caption = (
        f"Seconds of a worker per run, means; the sweep: {found['cells']} cells of the ratio on {found['workers']} "
        f"workers of {wording.count(found['threads'], 'thread')}. {found['machine']}."
    )
    return [Paragraph(told), Table(["", "TRL", "fastdpo study"], rows, caption)]
