"""A probe as text (Markdown that reads as it is), JSON and a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..cache import files
from ..plots import BLUE, GREEN, GREY, ORANGE, STYLE
from .probe_numbers import FULL, SATISFIED, AtBeta, Compatibility, Estimate, right
from .probe_scores import Scores

EVEN = 0.9  # effective share of pairs from which on nearly all carry the gradient
FEW = 0.5  # below which few do
MANY = 0.5  # share of satisfied pairs from which on a run has little to learn from

NOTES = f"""\
- A log-ratio is log p_policy - log p_ref of the data's completions: the difference of two cross-entropies on this data.
  It is no KL, may be negative, and is an estimate of KL(policy || ref) only of completions that the policy wrote: those
  of `--samples`. Per token: summed over all completions, over the number of their tokens.
- h: a pair's log-ratio of chosen less that of rejected, nats. DPO's loss is -log sigmoid(beta h), its gradient weight
  sigmoid(-beta h): 1/2 for every pair where the reference is the policy itself, at a loss of log 2 = {math.log(2):.4f}.
- Effective share: (sum of weights)^2 / (n x sum of their squares), Kish's effective sample size: the share of pairs
  that carry the gradient. A pair is satisfied if its weight is below {SATISFIED:g}, and in full above {FULL:g}.
- ± is one standard error, with pairs (of samples: prompts) as the independent units.
- Ranks right: log p(chosen) > log p(rejected), a tie is wrong; in brackets of logps per token.
- KL (k3): mean of exp(d) - 1 - d, d = log p_ref - log p_policy, on the policy's own tokens; never negative.
- In words, at a beta: nearly all pairs carry the gradient if the effective share is at least {EVEN:.0%}; few do if it
  is below {FEW:.0%}, or if at least {MANY:.0%} of the pairs are satisfied; else it is uneven.
- This is how a run would start. It says nothing of how it ends: a reference that ranks well may still be a bad one."""


class Probe(NamedTuple):
    """A probe's answer."""

    policy: Scores
    references: list[Compatibility]
    settings: dict[str, Any]  # what was asked for, for the report


def write(probe: Probe, folder: Path) -> str:
    """probe.md, probe.json and probe.png in a folder; returns the text of probe.md."""
    text = markdown(probe)
    files.write(folder / "probe.md", f"{text}\n".encode())
    files.write(folder / "probe.json", json.dumps(as_json(probe), indent=1, allow_nan=False).encode())
    picture(probe, folder / "probe.png")
    return text


def as_json(probe: Probe) -> dict[str, Any]:
    """Everything, as JSON: what is not known (a standard error of one pair) is null."""
    policy = {"ranks_right": float(right(probe.policy).mean())}
    policy["ranks_right_normalized"] = float(right(probe.policy, normalized=True).mean())
    references = [{**_plain(found), "in_words": in_words(found)} for found in probe.references]
    return {"settings": probe.settings, "policy": policy, "references": references}


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(inner) for name, inner in value._asdict().items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- words -----------------------------------------------------------------------------------------------------------


def in_words(found: Compatibility) -> str:
    """What this reference would do to a run, from the thresholds that NOTES states."""
    if found.is_policy:
        return "It is the policy itself: every pair starts at log 2 with weight 1/2, at any beta. This is ordinary DPO."
    said = [
        f"It ranks {found.ranks_right:.0%} of the pairs right, and {found.agreement:.0%} the way the policy does.",
        _lead(found.margin),
    ]
    kinds: dict[str, list[AtBeta]] = {}
    for at in found.at:
        kinds.setdefault(_kind(at), []).append(at)
    for kind, group in kinds.items():
        betas = ", ".join(f"{at.beta:g}" for at in group)
        worst = min(group, key=lambda at: at.effective_share)
        numbers = (
            f"effective share {worst.effective_share:.0%}, satisfied {worst.satisfied:.0%}, in full {worst.full:.0%}"
        )
        where = f" at {worst.beta:g}" if len(group) > 1 else ""
        said.append(f"At beta {betas} {kind} ({numbers}{where}).")
    if not found.same_tokens:
        said.append("Its tokens are others than the policy's, so nothing can be said per token.")
    return " ".join(said)


def _lead(margin: Estimate) -> str:
    size = f"{abs(margin.value):.3g} nats a pair on average"
    if not abs(margin.value) > 2 * margin.se:  # nor where the error is not known
        return "Its margins differ from the policy's in no one direction (within two standard errors)."
    if margin.value < 0:
        return f"Its margins are ahead of the policy's by {size}, which the run has to make up for first."
    return f"The policy's margins are ahead of its by {size}, so the loss takes part of the preference as learned."


def _kind(at: AtBeta) -> str:
    if at.effective_share < FEW or at.satisfied >= MANY:
        return "few pairs carry the gradient"
    return "nearly all pairs carry the gradient" if at.effective_share >= EVEN else "the gradient is uneven"


# --- text ------------------------------------------------------------------------------------------------------------


def markdown(probe: Probe) -> str:
    """Tables, a sentence a reference, and what the numbers are."""
    settings = probe.settings
    length = settings["max_length"] or "any number of"
    policy_right = _percent(right(probe.policy).mean(), right(probe.policy, normalized=True).mean())
    pairs = [["policy", "", "", "", "", policy_right, ""]]
    answers = [["reference", "KL per token", "KL (k3) per token", "KL per answer", "answers", "tokens"]]
    starts = [["reference", "beta", "loss", "weight: mean", "10%", "50%", "90%", "effective", "satisfied", "in full"]]
    for found in probe.references:
        pairs.append(_pairs_row(found))
        if found.sampled is not None:
            kl = found.sampled
            estimates = [_number(one) for one in (kl.per_token, kl.nonnegative, kl.per_answer)]
            answers.append([found.name, *estimates, str(kl.answers), str(kl.tokens)])
        elif settings["samples"]:
            answers.append([found.name, "n/a", "n/a", "n/a", "", ""])
        for at in found.at:
            weights = (at.weight_mean, at.weight_p10, at.weight_p50, at.weight_p90)
            shares = (at.effective_share, at.satisfied, at.full)
            numbers = [f"{weight:.3f}" for weight in weights] + [f"{share:.0%}" for share in shares]
            starts.append([found.name, f"{at.beta:g}", _number(at.loss), *numbers])
    head = ["", "chosen, per token", "rejected, per token", "chosen, per answer", "h", "ranks right", "as the policy"]
    left_out, cut = settings["pairs_left_out"], settings["completions_cut"]
    said = f" {cut} completions are cut short." if cut else ""
    said += (
        f" {left_out} further pairs are left out: no token of a completion of theirs is within that."
        if left_out
        else ""
    )
    blocks = [
        "# Which reference for this policy?",
        f"Policy: {settings['policy']}, in {settings['dtype']}. Data: {settings['pairs']} pairs of {settings['data']}, "
        f"{length} tokens at most.{said}",
        "\n".join(f"- **{found.name}** ({found.model}): {in_words(found)}" for found in probe.references),
        "## On the pairs: log-ratios in nats, and ranks",
        _table([head, *pairs]),
        "## The first step, by beta",
        _table(starts),
    ]
    if len(answers) > 1:
        blocks += [
            "## On the policy's own answers: KL(policy || reference) in nats",
            f"{settings['samples']} sampled answers a prompt, of at most {settings['max_new_tokens']} tokens, seed "
            f"{settings['seed']}; prompts that leave no room for that are left out.",
            _table(answers),
        ]
    return "\n\n".join([*blocks, "## What the numbers are", NOTES])


def _pairs_row(found: Compatibility) -> list[str]:
    tokens = [found.chosen_per_token, found.rejected_per_token]
    return [
        found.name,
        *("n/a" if one is None else _number(one) for one in tokens),
        _number(found.chosen_per_answer),
        _number(found.margin),
        _percent(found.ranks_right, found.ranks_right_normalized),
        f"{found.agreement:.0%}",
    ]


def _number(estimate: Estimate) -> str:
    value = f"{estimate.value:.3f}" if abs(estimate.value) < 10 else f"{estimate.value:.1f}"
    if not math.isfinite(estimate.se):
        return value
    return f"{value} ± {estimate.se:.3f}" if estimate.se < 10 else f"{value} ± {estimate.se:.1f}"


def _percent(share: float, normalized: float) -> str:
    return f"{share:.0%} ({normalized:.0%})"


def _table(rows: list[list[str]]) -> str:
    """A Markdown table whose columns stand under each other."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


# --- picture ---------------------------------------------------------------------------------------------------------


def picture(probe: Probe, path: Path) -> None:
    """Loss, effective share and gradient weights over beta, and log-ratios on the pairs, as one PNG."""
    colours = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", GREY)  # Okabe and Ito
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 7.5), layout="constrained")
        (loss, share), (weights, ratios) = figure.subplots(2, 2)
        betas = np.array([one.beta for one in probe.references[0].at])
        for i, found in enumerate(probe.references):
            look: dict[str, Any] = {"color": colours[i % 6], "marker": "osD^vP"[i % 6], "ms": 5, "label": found.name}
            beside = betas * 1.06 ** (i - (len(probe.references) - 1) / 2)  # so that bars do not hide each other
            losses = np.array([(one.loss.value, _bar(one.loss)) for one in found.at]).T
            loss.errorbar(beside, losses[0], losses[1], capsize=3, **look)
            share.plot(betas, [one.effective_share for one in found.at], **look)
            low, middle, high = np.array([(one.weight_p10, one.weight_p50, one.weight_p90) for one in found.at]).T
            weights.errorbar(beside, middle, [middle - low, high - middle], capsize=3, ls="none", **look)
        loss.axhline(math.log(2), color="black", lw=1, ls=":")
        loss.annotate("log 2", (1.01, math.log(2)), xycoords=loss.get_yaxis_transform(), va="center")
        loss.set(title="Loss at the first step, ± 1 standard error")
        share.set(title="Effective share of pairs in the gradient", ylim=(0, 1.05))
        weights.axhline(0.5, color="black", lw=1, ls=":")
        weights.set(title="Gradient weights: median, 10% to 90%", ylim=(-0.03, 1.03))
        for axes in (loss, share, weights):
            axes.set(xscale="log", xlabel="beta")
            axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
            axes.minorticks_off()
        share.legend(loc="lower left")
        _ratios(ratios, probe.references)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def _bar(estimate: Estimate) -> float:
    return estimate.se if math.isfinite(estimate.se) else 0.0


def _ratios(axes: Any, references: list[Compatibility]) -> None:
    """Chosen and rejected log-ratios per token, a row a reference."""
    sides = (("chosen", -0.13, BLUE, "o"), ("rejected", 0.13, ORANGE, "s"))
    for side, offset, colour, marker in sides:
        found = [(i, getattr(one, f"{side}_per_token")) for i, one in enumerate(references)]
        known = [(i + offset, one.value, _bar(one)) for i, one in found if one is not None]
        if known:
            places, values, errors = zip(*known, strict=True)
            axes.errorbar(values, places, xerr=errors, color=colour, marker=marker, ls="none", capsize=3, label=side)
    for i, one in enumerate(references):
        if not one.same_tokens:
            axes.annotate("n/a: other tokens", (0.5, i), xycoords=axes.get_yaxis_transform(), ha="center", fontsize=9)
    axes.axvline(0, color="black", lw=1, ls=":")
    axes.set_yticks(range(len(references)), [one.name for one in references])
    axes.set(
        title="log p policy - log p reference on the pairs, ± 1 standard error",
        xlabel="nats per token",
        ylim=(len(references) - 0.5, -0.5),
    )
    axes.grid(visible=False, axis="y")
    if any(one.same_tokens for one in references):
        axes.legend(loc="best")
