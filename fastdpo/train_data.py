"""Preference pairs from a JSON-lines file, and a chat template for tokenizers that have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


class DataError(ValueError):
    """A data file that cannot be trained on; the message names file, line and what was expected."""


def read_pairs(path: str | Path) -> Dataset:
    """TRL's preference columns from a .jsonl file: one JSON object per line with `chosen`, `rejected` and, unless the
    two begin with the prompt themselves, `prompt`; each a string, or a list of {"role", "content"} messages.

    Further columns (tools, chat_template_kwargs, ...) are kept. Blank lines are skipped.

    Raises:
        DataError: a missing or empty file; a line that is not a JSON object, lacks a column or differs from the first.
    """
    from datasets import Dataset
    from pyarrow.lib import ArrowInvalid, ArrowTypeError

    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected JSON lines with prompt, chosen and rejected")
    rows: list[dict[str, Any]] = []
    kinds: dict[str, str] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8: {error}") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON: {error}") from None
            found = _kinds(row, f"{path}, line {number}")
            kinds = kinds or found
            if found != kinds:
                raise DataError(f"{path}, line {number}: has {_show(found)}, but the lines before have {_show(kinds)}")
            rows.append(row)
    if not rows:
        raise DataError(f"{path}: has no pairs, expected one JSON object per line")
    try:
        return Dataset.from_list(rows)
    except (ArrowInvalid, ArrowTypeError) as error:
        raise DataError(f"{path}: a column holds values of different types: {error}") from None


def _kinds(row: Any, where: str) -> dict[str, str]:
    """column -> "text" or "messages", for the columns of a pair"""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    missing = [name for name in ("chosen", "rejected") if name not in row]
    if missing:
        raise DataError(
            f"{where}: missing column {', '.join(missing)}; has {', '.join(row) or 'none'}, "
            "expected prompt (optional), chosen, rejected"
        )
    kinds = {}
    for name in ("prompt", "chosen", "rejected"):
        if name not in row:
            continue
        value = row[name]
        if isinstance(value, str):
            kinds[name] = "text"
        elif (
            isinstance(value, list)
            and value
            and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
        ):
            kinds[name] = "messages"
        else:
            raise DataError(
                f"{where}: column {name}: expected a string or a list of messages with role and content, "
                f"got {value!r:.80}"
            )
    return kinds


def _show(kinds: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def plain_chat_template(tokenizer: Any) -> str:
    """A Jinja template for a tokenizer without one: the role on a line of its own, then the message.

    The rendered prompt is a prefix of the rendered prompt and answer, as TRL needs; an assistant's message ends with
    the tokenizer's end of text, and the text begins as the tokenizer begins its texts.
    """
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    return (
        ("{{ bos_token }}" if begins else "")
        + "{% for message in messages %}"
        + "{{ '### ' + message['role'] + '\\n' + message['content'] }}"
        + "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
        + "{% endfor %}"
        + "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
    )
