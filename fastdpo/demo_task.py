"""The demo's task: sort four numbers written in words. An answer can be checked; bad ones come in two kinds.

prompt    sort nine two seventeen four :
right     two four nine seventeen
reversed  seventeen nine four two
rambling  well let me think we have nine and two and seventeen and four so maybe it is two nine ... or not
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUMBERS = tuple(
    """zero one two three four five six seven eight nine ten
    eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen""".split()  # noqa: SIM905
)
LENGTH = 4  # numbers in a prompt
END = "<end>"
_OPENINGS = (
    "well let me think we have",
    "that is a good question there are",
    "sorting is fun let me see you gave",
)
_MIDDLES = ("so maybe it is", "so i would say something like", "and then it could be")
_WORDS = sorted({w for text in (*_OPENINGS, *_MIDDLES, "sort : and or not sure") for w in text.split()})
MAX_NEW_TOKENS = LENGTH + 2  # a right answer and its end, and one more

# What the pretrained model has read: it learns to sort, but right and brief is the rarest kind of answer
MIX = {"right": 0.30, "reversed": 0.38, "rambling": 0.32}


class Pair(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


def prompts(seed: int, count: int) -> list[str]:
    """`count` different prompts; the order depends on nothing but the seed."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[f"sort {' '.join(rng.sample(NUMBERS, LENGTH))} :"] = None
    return list(found)


def answer(prompt: str, kind: str, rng: random.Random) -> str:
    """One answer of a kind of MIX, or "swapped", with the space that parts it from the prompt."""
    given = _given(prompt)
    right = sorted(given, key=NUMBERS.index)
    words = list(right)
    if kind == "reversed":
        words.reverse()
    elif kind == "swapped":
        at = rng.randrange(LENGTH - 1)
        words[at], words[at + 1] = words[at + 1], words[at]
    elif kind == "rambling":
        guess = answer(prompt, rng.choice(("right", "swapped")), rng).split()
        words = [rng.choice(_OPENINGS), " and ".join(given), rng.choice(_MIDDLES), *guess, "or not"]
    return " " + " ".join(words)


def is_right(prompt: str, text: str) -> bool:
    """Whether the answer is the sorted numbers and not a word more."""
    return text.split() == sorted(_given(prompt), key=NUMBERS.index)


def pairs(prompt_list: list[str], seed: int) -> list[Pair]:
    """A preference pair a prompt: chosen right and brief, rejected of one of the other kinds."""
    rng = random.Random(seed)
    bad = {kind: share for kind, share in MIX.items() if kind != "right"}
    result = []
    for prompt in prompt_list:
        kind = rng.choices(list(bad), weights=list(bad.values()))[0]
        result.append(Pair(prompt, answer(prompt, "right", rng), answer(prompt, kind, rng)))
    return result


def examples(prompt_list: list[str], seed: int, mix: dict[str, float] = MIX) -> Iterator[tuple[str, str]]:
    """Endless (prompt, answer) of a mix, kind -> share, to pretrain on."""
    rng = random.Random(seed)
    while True:
        prompt = rng.choice(prompt_list)
        yield prompt, answer(prompt, rng.choices(list(mix), weights=list(mix.values()))[0], rng)


def tokenizer(backwards: bool = False) -> PreTrainedTokenizerFast:
    """One token a word; backwards: another tokenizer, in which the same words have other ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", END, "<unknown>", *NUMBERS, *(w for w in _WORDS if w not in NUMBERS)]
    if backwards:
        words[3:] = words[:2:-1]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token=END, unk_token="<unknown>")


def save_pairs(path: Path, items: list[Pair]) -> None:
    """As JSON lines that `fastdpo train --data` reads."""
    import json

    path.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in items), encoding="utf-8")


def _given(prompt: str) -> list[str]:
    return [word for word in prompt.split() if word in NUMBERS]
