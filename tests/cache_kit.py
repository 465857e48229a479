"""What the tests of the cache share: a tiny model in a folder, rows, and builders in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("pyarrow")

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastdpo import demo_task
from fastdpo.cache import ReferenceCache, build, claims, journal, shard

VOCAB = 203  # ragged


def rows(count: int = 12, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of the demo's task."""
    return [pair._asdict() for pair in demo_task.pairs(demo_task.prompts(seed, count), seed)]


def save_model(folder: Path, seed: int = 0, **config: Any) -> str:
    """A random model and the demo's tokenizer."""
    tokenizer = demo_task.tokenizer()
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,
    }
    LlamaForCausalLM(LlamaConfig(**{**settings, **config})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tokenizer_of(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def model_of(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def entries(cache: ReferenceCache, name: str | None = None) -> dict[bytes, float]:
    """key -> logp, from the shards; a key that two of them hold fails."""
    named = cache.reference(name)
    found: dict[bytes, float] = {}
    for path in cache.shards(named).glob("*.parquet"):
        part = shard.read(path, named.reference.id)
        for key, logp in zip(part.keys, part.logp.tolist(), strict=True):
            assert key.tobytes() not in found, "doubled"
            found[key.tobytes()] = logp
    return found


def shard_paths(cache: ReferenceCache) -> list[Path]:
    return sorted((cache.path / "shards").glob("*/*.parquet"))


# --- builders in processes of their own ------------------------------------------------------------------------------


def processes() -> Any:
    """Processes that start at once: forked from a server that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    heavy = (
        "trl.trainer.dpo_trainer",
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.modeling_auto",
    )
    context.set_forkserver_preload(["fastdpo.cache", "fastdpo.demo_task", "tokenizers", "peft", "accelerate", *heavy])
    return context


#: Where a builder can be made to die: before the second call of a function
MOMENTS = {
    "the rows": (journal.Journal, "add"),
    "the shard": (shard, "save"),
    "the rename": (os, "replace"),
    "the release": (claims.Claims, "release"),
}


def slow_build(
    folder: str, model: str, pairs: list, log: str, seconds: float = 0, die_before: str | None = None, **keywords: Any
) -> None:
    """Build, noting each scored sequence as a byte in `log`, and dawdling over each batch."""
    torch.set_num_threads(1)
    batches = build.Builder._batches

    def noted(self: Any, *arguments: Any) -> Any:
        for batch in batches(self, *arguments):
            time.sleep(seconds)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, b"." * len(batch))
            os.close(descriptor)
            yield batch

    build.Builder._batches = noted  # type: ignore[method-assign]
    if die_before is not None:
        where, name = MOMENTS[die_before]
        function, calls = getattr(where, name), []

        def deadly(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        setattr(where, name, deadly)
    ReferenceCache(folder).build(model, tokenizer_of(model), pairs, progress=False, **keywords)


def wait_until(condition: Any, process: Any) -> None:
    """Until it holds, or the process has ended."""
    deadline = time.monotonic() + 60
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline, "the builder hangs"
        time.sleep(random.random() * 0.005)
