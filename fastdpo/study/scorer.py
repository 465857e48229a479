"""How good answers are, in numbers: by the user's own function, or by a reward model.

    scorer: scoring.py:right          # or package.module:right
    scorer: org/reward-model          # or its folder

A function takes (prompts, answers, rows) and returns one number an answer: `prompts` as the data hold them, `answers`
as text, `rows` the held-out pairs that the prompts are from.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .errors import StudyError

Rows = list[dict[str, Any]]
Scorer = Callable[[list[Any], list[str], Rows], list[float]]
_BATCH = 8  # texts that a reward model reads at once


def load(scorer: str, trust_remote_code: bool = False) -> Scorer:
    """What a study's `scorer` names; its numbers are checked.

    Raises:
        StudyError: no such function or model.
    """
    module, _, name = scorer.rpartition(":")
    if not module:
        return _checked(scorer, RewardModel(scorer, trust_remote_code))
    try:
        function = getattr(_module(module), name)
    except (ImportError, OSError, AttributeError) as error:
        raise StudyError(f"scorer: {scorer}: {error}") from None
    if not callable(function):
        raise StudyError(f"scorer: {scorer} is no function, got {type(function).__name__}")
    return _checked(scorer, function)


def fingerprint(scorer: str | None) -> str | None:
    """A hash of a scorer that is a file's function, 32 hex digits; None for any other."""
    path = Path((scorer or "").rpartition(":")[0])
    known = path.suffix == ".py" and path.is_file()
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() if known else None


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name)
    spec = importlib.util.spec_from_file_location(f"fastdpo_scorer_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError("no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in it look themselves up
    spec.loader.exec_module(module)
    return module


def _checked(name: str, scorer: Scorer) -> Scorer:
    def scored(prompts: list[Any], answers: list[str], rows: Rows) -> list[float]:
        given = scorer(prompts, answers, rows)
        try:
            found = [float(score) for score in given]
        except (TypeError, ValueError):
            raise StudyError(f"scorer: {name}: expected a list of numbers, got {given!r:.80}") from None
        if len(found) != len(answers):
            raise StudyError(f"scorer: {name}: expected one number an answer, {len(answers)}, got {len(found)}")
        wrong = next((i for i, score in enumerate(found) if not math.isfinite(score)), None)
        if wrong is not None:
            raise StudyError(f"scorer: {name}: expected finite numbers, got {found[wrong]} for {answers[wrong]!r:.80}")
        return found

    return scored


class RewardModel:
    """A sequence classifier with one output. It is in memory while it scores, not while others train.

    Args:
        model: folder or hub id.
    """

    def __init__(self, model: str, trust_remote_code: bool = False) -> None:
        self._model, self._remote = model, {"trust_remote_code": trust_remote_code}

    def __call__(self, prompts: list[Any], answers: list[str], rows: Rows) -> list[float]:
        """The model's output on prompt and answer, or on its chat template of them."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._model, **self._remote)
            model = AutoModelForSequenceClassification.from_pretrained(self._model, **self._remote)
        except (OSError, ValueError) as error:
            raise StudyError(f"scorer: {self._model}: {error}") from None
        if model.config.num_labels != 1:
            raise StudyError(
                f"scorer: {self._model} has {model.config.num_labels} outputs, expected a reward model's 1"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        model = model.eval().to(torch.accelerator.current_accelerator() or "cpu")
        texts = [_text(prompt, answer, tokenizer) for prompt, answer in zip(prompts, answers, strict=True)]
        scores: list[float] = []
        with torch.no_grad():
            for first in range(0, len(texts), _BATCH):
                # The template has written the beginning of text itself
                batch = tokenizer(
                    texts[first : first + _BATCH],
                    padding=True,
                    return_tensors="pt",
                    add_special_tokens=isinstance(prompts[0], str),
                )
                scores += model(**batch.to(model.device)).logits[:, 0].float().tolist()
        return scores


def _text(prompt: Any, answer: str, tokenizer: Any) -> str:
    if isinstance(prompt, str):
        return prompt + answer
    return tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
