"""What the examples share: a small model and pairs made in place, or those of --model and --data."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import demo_model, demo_task
from fastdpo.train_data import read_pairs


def load(argv: list[str] | None = None) -> tuple[Any, Any, Dataset]:
    """A causal LM in float32, its tokenizer, and preference pairs: prompt, chosen, rejected.

    Without arguments, a random Llama of 2,048 tokens and pairs of the demo's task: numbers, sorted well and badly.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="folder or hub id of a causal LM")
    parser.add_argument("--data", help=".jsonl of prompt, chosen and rejected, as text or as messages")
    chosen = parser.parse_args(argv)
    torch.manual_seed(0)
    if chosen.model:
        tokenizer = AutoTokenizer.from_pretrained(chosen.model)
        model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    else:
        tokenizer = demo_task.tokenizer()
        model = demo_model.build(demo_model.Settings(vocabulary=2048, hidden=64, layers=2), tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chosen.data:
        return model, tokenizer, read_pairs(chosen.data)
    pairs = demo_task.pairs(demo_task.prompts(seed=0, count=80), seed=0)
    return model, tokenizer, Dataset.from_list([pair._asdict() for pair in pairs])


def tokenize(pairs: Dataset, tokenizer: Any) -> Dataset:
    """prompt_ids, chosen_ids and rejected_ids, what PreferenceCollator takes."""

    if "prompt" not in pairs.column_names:
        raise ValueError(f"prompt: not a column of the data, which has {', '.join(pairs.column_names)}")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def row(pair: dict[str, Any]) -> dict[str, list[int]]:
        prompt, sides = pair["prompt"], ("chosen", "rejected")
        if isinstance(prompt, str):
            completions = {f"{side}_ids": [*ids(pair[side]), tokenizer.eos_token_id] for side in sides}
            return {"prompt_ids": tokenizer(prompt)["input_ids"], **completions}
        start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = {side: tokenizer.apply_chat_template(prompt + pair[side], tokenize=False) for side in sides}
        return {"prompt_ids": ids(start), **{f"{side}_ids": ids(whole[side][len(start) :]) for side in sides}}

    return pairs.map(row, remove_columns=pairs.column_names, load_from_cache_file=False)


def print_steps(trainer: Any) -> None:
    """A line for each step that the trainer logged."""
    for record in trainer.state.log_history[:-1]:
        loss, accuracy, margin = (record[name] for name in ("loss", "rewards/accuracies", "rewards/margins"))
        print(f"step {record['step']}  loss {loss:.4f}  accuracy {accuracy:.2f}  margin {margin:.3f}")
