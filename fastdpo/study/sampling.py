"""Answers of a policy, drawn from what it computes and nothing else, with a seed of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from ..cache.key import Sequence
from ..evaluating import evaluating
from .config import Sampling


class Answer(NamedTuple):
    """One sampled answer."""

    prompt: int  # which of the prompts
    prompt_ids: list[int]
    ids: list[int]  # with the end of text, if it came to one
    ended: bool

    @property
    def words(self) -> list[int]:
        """Its tokens without the end of text."""
        return self.ids[:-1] if self.ended else self.ids

    @property
    def sequence(self) -> Sequence:
        """Prompt and answer, of which the answer counts; the end of text too, which was drawn as well."""
        ids = np.array([*self.prompt_ids, *self.ids], np.int32)
        return Sequence(ids, np.arange(len(ids)) >= len(self.prompt_ids))


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Answer]:
    """Ancestral samples from softmax(logits / temperature), `sampling.per_prompt` of each prompt, in their order.

    No top-k, top-p or penalty, whatever the model's generation config says; only its ends of text are kept. The same
    model, settings and seed give the same answers; torch's global generators come out as they went in.

    Args:
        model: a causal LM of transformers; sampled in evaluation mode.
        prompts: token ids of each.
        sampling: its `prompts` is not looked at.
        seed: of these answers.
    """
    ends, pad = _ends(model, tokenizer), tokenizer.pad_token_id
    pad = ends[0] if pad is None else pad
    asked = [(i, ids) for i, ids in enumerate(prompts) for _ in range(sampling.per_prompt)]
    answers = []
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with evaluating(model), torch.random.fork_rng(devices), _plain_generation(model, sampling, ends, pad):
        torch.manual_seed(seed)
        for first in range(0, len(asked), sampling.batch):
            batch = asked[first : first + sampling.batch]
            length = max(len(ids) for _, ids in batch)
            padded = torch.tensor([[pad] * (length - len(ids)) + ids for _, ids in batch], device=model.device)
            attended = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for _, ids in batch])
            found = model.generate(input_ids=padded, attention_mask=attended.to(model.device))[:, length:].tolist()
            answers += [_answer(i, ids, drawn, ends) for (i, ids), drawn in zip(batch, found, strict=True)]
    return answers


def _answer(prompt: int, prompt_ids: list[int], drawn: list[int], ends: list[int]) -> Answer:
    end = next((at for at, token in enumerate(drawn) if token in ends), None)
    return Answer(prompt, prompt_ids, drawn if end is None else drawn[: end + 1], end is not None)


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: those of the model's generation config, and the tokenizer's."""
    given = getattr(model.generation_config, "eos_token_id", None)
    ends = [] if given is None else [given] if isinstance(given, int) else list(given)
    return [*dict.fromkeys([*ends, tokenizer.eos_token_id])]


@contextmanager
def _plain_generation(model: Any, sampling: Sampling, ends: list[int], pad: int) -> Iterator[None]:
    """`generate` takes what it is not told from the model's generation config: for this block one that says all."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=pad,
    )
    try:
        yield
    finally:
        model.generation_config = before
