"""Rows of a preference data set to the token sequences that a trainer scores: TRL's own preparation, row by row.

TRL 1.16 prepares whole data sets: it finds the shared prompt, appends the end of text, renders the chat template and
cuts where prompt and prompt + completion part. Its steps are functions of one row each, handed to `dataset.map`; here
they are taken from it once and applied to whatever rows are needed. So the tokens are the trainer's by construction.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from jinja2 import TemplateError

from ..train_data import plain_chat_template, read_pairs
from .errors import CacheError
from .key import Sequence

Row = dict[str, Any]
PARTS = ("chosen", "rejected", "chosen prior", "rejected prior")  # what is scored of a row
TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")  # what TRL's preparation adds to it
MAX_LENGTH = 1024  # DPOConfig's default


class Preparation:
    """Row -> row with `prompt_ids`, `chosen_ids` and `rejected_ids`, as TRL's DPOTrainer makes them.

    Args:
        first: the first row; what columns it has decides for all, as in TRL.
        tokenizer: or a processor that has one; None for rows that have their tokens already.

    Raises:
        CacheError: no tokens and no tokenizer; columns missing; no chat template for messages.
    """

    def __init__(self, first: Row, tokenizer: Any) -> None:
        self._steps: list[Callable[[Row], Row]] = []
        if tokenized(first):
            return
        missing = [name for name in ("chosen", "rejected") if name not in first]
        if missing:
            raise CacheError(f"data: missing column {', '.join(missing)}; has {', '.join(first)}")
        if tokenizer is None:
            raise CacheError("tokenizer: expected one, for data that has no prompt_ids, chosen_ids and rejected_ids")
        from accelerate import PartialState
        from trl.data_utils import is_conversational
        from trl.trainer import dpo_trainer

        if is_conversational(first) and tokenizer.chat_template is None:
            raise CacheError("tokenizer: has no chat_template, and the data is conversational")
        PartialState()  # TRL's warnings ask it who is the main process
        self._first = first
        # The data set that TRL sees is this object. Without max_length it drops no row; and the rows that count are
        # not here, so no process has to wait for another
        with mock.patch.object(dpo_trainer, "global_then_local_main_first", contextlib.nullcontext):
            prepare: Any = dpo_trainer.DPOTrainer._prepare_dataset
            prepare(
                SimpleNamespace(_tokenizer=text_tokenizer(tokenizer)),
                self,
                tokenizer,
                SimpleNamespace(max_length=None),
                "",
            )

    def map(self, step: Callable[..., Row], fn_kwargs: dict[str, Any] | None = None) -> Preparation:
        """What TRL calls `dataset.map` on."""
        self._steps.append(functools.partial(step, **(fn_kwargs or {})))
        return self

    def __iter__(self) -> Iterator[Row]:
        yield self.numbered(self._first, "row 0")

    def __call__(self, row: Row) -> Row:
        for step in self._steps:
            row = {**row, **step(dict(row))}
        return row

    def numbered(self, row: Row, place: str) -> Row:
        """The same, with `place` in the error.

        Raises:
            CacheError: the chat template refuses the row, or a value of it is no text, messages or tokens.
        """
        try:
            return self(row)
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise CacheError(f"{place}: cannot be made into tokens: {type(error).__name__}: {error}") from error


def tokenized(row: Row) -> bool:
    """Whether a row holds its tokens already."""
    return all(name in row for name in TOKENS)


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, of a processor."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def origin(tokenizer: Any) -> str:
    """The folder, absolute, or hub id that a tokenizer came from; "" for none."""
    name = "" if tokenizer is None else text_tokenizer(tokenizer).name_or_path
    return os.path.abspath(name) if os.path.isdir(name) else name


def sequence(row: Row, part: int, max_length: int | None, truncation_mode: str, prefix: int | None) -> Sequence:
    """What is scored of a prepared row.

    Args:
        part: index into PARTS.
        max_length, truncation_mode: as in DPOConfig; the collator of TRL cuts prompt + completion so.
        prefix: for the priors: the token that stands for no prompt.
    """
    prompt, completion = row["prompt_ids"], row[f"{PARTS[part].split()[0]}_ids"]
    ids = np.array([*prompt, *completion], np.int32)
    mask = np.zeros(len(ids), np.bool_)
    mask[len(prompt) :] = True
    if max_length is not None:
        kept = slice(None, max_length) if truncation_mode == "keep_start" else slice(-max_length, None)
        ids, mask = ids[kept], mask[kept]
    if part < 2:
        return Sequence(ids, mask)
    # Of the very tokens that count given the prompt, so that the two can be compared
    counted = ids[1:][mask[1:]]
    return Sequence(np.array([prefix, *counted], np.int32), np.arange(len(counted) + 1) > 0, prior=True)


def prior_prefix(tokenizer: Any) -> int | None:
    """The token that stands for no prompt: the beginning of text, else the end of text (as lm-evaluation-harness)."""
    tokenizer = text_tokenizer(tokenizer)
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def vocabulary(tokenizer: Any) -> str:
    """A hash of which token is which id, 64 hex digits: equal for two tokenizers whose ids mean the same."""
    tokenizer = text_tokenizer(tokenizer)
    return _vocabulary(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any, size: int) -> str:  # size: tokens may have been added since
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def check_truncation(max_length: int | None, truncation_mode: str) -> None:
    """Raise CacheError for values that DPOConfig would not take."""
    if max_length is not None and (not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1):
        raise CacheError(f"max_length: expected an int above 0, or None, got {max_length!r}")
    if truncation_mode not in ("keep_start", "keep_end"):
        raise CacheError(f"truncation_mode: expected 'keep_start' or 'keep_end', got {truncation_mode!r}")


def peek(data: Any) -> tuple[Row, Any]:
    """(first row, all rows) of a .jsonl file, a data set, or any iterable of rows."""
    if isinstance(data, (str, os.PathLike)):
        data = read_pairs(os.fspath(data))
    if isinstance(data, dict):
        raise CacheError(f"data: expected one data set, got a dict of {', '.join(map(str, data))}")
    if hasattr(data, "with_format"):
        data = data.with_format(None)
    again = iter(data)
    first = next(again, None)
    if first is None:
        raise CacheError("data: has no rows")
    return first, data if iter(data) is not again else itertools.chain([first], again)


def load_tokenizer(path: str, first: Row, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id, with a plain chat template where the data needs one and it has none.

    Raises:
        CacheError: there is none.
    """
    from transformers import AutoTokenizer
    from trl.data_utils import is_conversational

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CacheError(f"tokenizer: {path}: {error}") from None
    if is_conversational(first) and tokenizer.chat_template is None:
        tokenizer.chat_template = plain_chat_template(tokenizer)
    return tokenizer
