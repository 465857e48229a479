"""Runs that are no longer policies to compare: why, by thresholds that stand here and nowhere else.

arXiv 2407.13709 marks such runs: with too weak a constraint its policies' outputs became endless or repetitive.
"""

from __future__ import annotations

from .measures import GRAM, Measures

MOST_EMPTY = 0.5  # share of answers without a token
MOST_ENDLESS = 0.5  # share of answers that max_new_tokens cut off
MOST_REPETITION = 0.5  # share of repeated 4-grams
TIMES_START = 2  # an answer's flaw is the run's only where the start model has at most half of it
CHANCE = 0.55  # reward accuracy at most
COLLAPSE = -2.0  # nats that a chosen token lost on average, and more
NOT_FINITE = "loss or weights are not finite"


def reasons(measures: Measures, start: Measures) -> list[str]:
    """Why a finished run is degenerate, in words with the numbers; empty: it is not.

    Args:
        measures: of the run.
        start: of the untrained policy.
    """
    found = []
    for name, most, text in (
        ("empty", MOST_EMPTY, "of the answers are empty"),
        ("endless", MOST_ENDLESS, "of the answers do not end"),
        ("repetition", MOST_REPETITION, f"of the {GRAM}-grams of an answer are repeats"),
    ):
        value, before = measures[name], start.get(name)
        if value is not None and value > most and value > TIMES_START * (before or 0):
            found.append(f"{value:.0%} {text}")
    accuracy, moved = measures["reward_accuracy"], measures["chosen_displacement_token"]
    if accuracy is not None and moved is not None and accuracy <= CHANCE and moved <= COLLAPSE:
        found.append(f"reward accuracy {accuracy:.2f} at chance, chosen tokens lost {-moved:.1f} nats each")
    return found
