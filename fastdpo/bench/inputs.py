"""Batches to measure on: hidden states of a real model over real or sampled text, or random ones.

What a contender may leave out depends on how peaked the softmax is, so random inputs come in two kinds: peaked, like a
trained model's, and dense, of which nothing can be left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .providers import Batch

# Standard deviation of a token's logits over the vocabulary, and the part of it that all tokens share. Chosen after
# Gemma 3 270M on real pairs: 256 of its tokens have all but 2^-10 of their probability in 4 to 8% of the columns, and
# an entropy of 1.9 nats; these, with its V and H, in 4%, and 2.4
SPREAD, SHARED = 6.0, 5.4
SAMPLED_LENGTH = 128  # tokens of a sampled sequence


def real_batch(
    model_name: str,
    data: Path,
    pairs: int,
    max_length: int,
    tokens: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    exact: bool = True,
    device: torch.device | None = None,
) -> Batch:
    """The completions of the first pairs in `dtype`, chosen first; of `tokens` tokens, as one pair, if that is given.

    The model runs on `device` (the CPU by default); the batch is on the CPU.

    Raises:
        ValueError: the data has fewer tokens; not with `exact=False`, which then takes what there is.
    """
    from tqdm import tqdm

    from ..cache.rows import Preparation, load_tokenizer, sequence
    from ..train_data import read_pairs

    rows: Any = read_pairs(data)
    prepare = Preparation(rows[0], load_tokenizer(model_name, rows[0]))
    model = load_model(model_name, dtype, device)
    sides: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
    found, progress = 0, tqdm(total=tokens or pairs, unit="token" if tokens else "pair", desc="hidden states")
    for number, row in enumerate(rows if tokens else rows.select(range(pairs))):
        prepared = prepare.numbered(row, f"row {number}")
        for side, sequences in enumerate(sides):
            ids, counted, _ = sequence(prepared, side, max_length, "keep_start", None)
            counted[:1] = False  # nothing comes before it that could predict it
            if counted.any():
                sequences.append(_completion(model, ids.tolist(), int(counted.argmax())))
                found += int(counted.sum())
        progress.update(min(tokens, found) - progress.n if tokens else 1)
        if tokens and found >= tokens:
            break
    progress.close()
    if tokens and found < tokens and exact:
        raise ValueError(f"--tokens {tokens}: the data has {found} completion tokens")
    return _batch(model, [*sides[0], *sides[1]], min(tokens, found) if tokens else None)


def sampled_batch(model_name: str, tokens: int, dtype: torch.dtype, device: torch.device | None = None) -> Batch:
    """What the model itself says after its beginning of text (or a random token), `tokens` tokens, as one pair.

    The model runs on `device` (the CPU by default); the batch is on the CPU.
    """
    model = load_model(model_name, dtype, device)
    rows = -(-tokens // SAMPLED_LENGTH)
    begin = model.config.get_text_config().bos_token_id
    vocab = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(vocab, (rows, 1), generator=generator) if begin is None else torch.full((rows, 1), begin)
    torch.manual_seed(0)
    ids = model.generate(
        start.to(model.device),
        attention_mask=torch.ones_like(start, device=model.device),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        min_new_tokens=SAMPLED_LENGTH,
        max_new_tokens=SAMPLED_LENGTH,
        pad_token_id=0,
    )
    return _batch(model, [_completion(model, row, 1) for row in ids.tolist()], tokens)


def random_batch(kind: str, tokens: int, vocab: int, width: int, dtype: torch.dtype) -> Batch:
    """Random hidden and weight, one pair: "peaked" as a trained model's softmax is, or "dense".

    Peaked: a token's logits are normal over the vocabulary with a standard deviation of SPREAD, most of it shared by
    all tokens, and its label is drawn from its softmax. Dense: with a standard deviation of 1, labels at random.
    """
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(dtype)
    hidden = torch.randn(tokens, width, generator=generator)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    if kind == "peaked":
        shared = torch.randn(width, generator=generator)
        hidden = SHARED * shared + (SPREAD**2 - SHARED**2) ** 0.5 * hidden
        for part, drawn in zip(hidden.to(dtype).split(64), labels.split(64), strict=True):
            probs = (part @ weight.T).float().softmax(-1)
            drawn.copy_(probs.multinomial(1, generator=generator).squeeze(-1))
    return Batch(hidden.to(dtype), weight, labels, halves(tokens), slopes(tokens))


def dense_batch(like: Batch) -> Batch:
    """Random hidden and weight, whose softmax is not sparse; its shapes, dtype, labels and lengths."""
    (tokens, width), vocab = like.hidden.shape, like.weight.shape[0]
    dense = random_batch("dense", tokens, vocab, width, like.hidden.dtype)
    return dense._replace(labels=like.labels, lengths=like.lengths)


def load_model(name: str, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(device or "cpu").eval()


def halves(tokens: int) -> tuple[int, int]:
    """The lengths of one pair of sequences."""
    return tokens - tokens // 2, tokens // 2


def slopes(tokens: int) -> Tensor:
    """A gradient of each token logp."""
    return torch.randn(tokens, generator=torch.Generator().manual_seed(0))


def _completion(model: Any, ids: list[int], prompt: int) -> tuple[Tensor, Tensor]:
    """(hidden, labels) of the tokens after the first `prompt`."""
    with torch.no_grad():
        states = model.base_model(torch.tensor([ids], device=model.device)).last_hidden_state[0]
    # Granite, Cohere: a scale of the logits is one of the hidden states
    from ..integrations.head_transform import head_transform

    scale = head_transform(model.config).logit_scale
    return (states[prompt - 1 : len(ids) - 1] * scale).cpu(), torch.tensor(ids[prompt:], dtype=torch.int64)


def _batch(model: Any, sequences: list[tuple[Tensor, Tensor]], tokens: int | None) -> Batch:
    hidden, labels = (torch.cat(parts) for parts in zip(*sequences, strict=True))
    lengths = tuple(len(part) for _, part in sequences)
    if tokens:
        hidden, labels, lengths = hidden[:tokens], labels[:tokens], halves(tokens)
    weight = model.get_output_embeddings().weight.detach().to("cpu", copy=True)
    return Batch(hidden, weight, labels, lengths, slopes(len(labels)))
