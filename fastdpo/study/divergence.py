"""KL between two policies on sampled answers: exact at each token, summed over the vocabulary.

For answers y drawn from p, the mean over answers of

    sum_t KL(p(.|x, y_<t) || q(.|x, y_<t)) = sum_t sum_v p(v|x, y_<t) log(p(v|x, y_<t) / q(v|x, y_<t))

is the Rao-Blackwell estimator of KL(p || q) (Amini et al. 2025, "Better Estimation of the KL Divergence Between
Language Models", arXiv 2504.10637): unbiased as the plain one, mean log(p(y)/q(y)), never negative and less noisy.
Answers that are cut at max_new_tokens count as far as they go.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache.key import Sequence
from ..cache.score import padded
from ..eager import transformed
from ..evaluating import evaluating
from ..integrations.head_transform import head_transform
from ..options import Transform

_BATCH_TOKENS = 8192  # of a forward, padding included
_WORKSPACE = 64 * 2**20  # entries of logits at once, both models and their temporaries: 256 MiB


@torch.no_grad()
def hidden_states(model: Any, sequences: list[Sequence]) -> Tensor:
    """`[N, H]` in the model's dtype: the last hidden states that predict the counted tokens, sequence after sequence.

    In evaluation mode. N x H is little beside N x V, which is never made.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = []
    with evaluating(model):
        for batch in _batches(sequences):
            ids, attended, counted = padded(batch)
            given = [torch.from_numpy(array).to(model.device) for array in (ids, attended.astype(np.int64), counted)]
            hidden = base.base_model(input_ids=given[0], attention_mask=given[1], use_cache=False).last_hidden_state
            found.append(hidden[:, :-1][given[2][:, 1:]])
    return torch.cat(found)


def _batches(sequences: list[Sequence]) -> list[list[Sequence]]:
    """In their order, so that the hidden states come out in it."""
    batches: list[list[Sequence]] = []
    length = 0
    for one in sequences:
        length = max(length, len(one.ids))
        if not batches or length * (len(batches[-1]) + 1) > _BATCH_TOKENS:
            batches.append([])
            length = len(one.ids)
        batches[-1].append(one)
    return batches


@torch.no_grad()
def token_kl(p: Any, hidden_p: Tensor, q: Any, hidden_q: Tensor) -> np.ndarray:
    """float64 `[N]`, nats: KL(p || q) of the next token at each position, over the whole vocabulary.

    Logits come a tile of positions at a time. Heads of one tokenizer may be padded to different sizes: then both
    distributions are over the tokens that both have.

    Args:
        p, q: causal LMs of transformers.
        hidden_p, hidden_q: `[N, H]` of each, on its device, as `hidden_states` gives them.
    """
    vocabulary = min(model.get_output_embeddings().weight.shape[0] for model in (p, q))
    tile = max(1, _WORKSPACE // (6 * vocabulary))
    found = []
    for first in range(0, len(hidden_p), tile):
        ours = _log_probs(p, hidden_p[first : first + tile], vocabulary)
        theirs = _log_probs(q, hidden_q[first : first + tile], vocabulary).to(ours.device)
        found.append((ours.exp() * (ours - theirs)).sum(-1).double().cpu())
    return torch.cat(found).clamp(min=0).numpy() if found else np.zeros(0)  # below 0 by rounding alone


def _log_probs(model: Any, hidden: Tensor, vocabulary: int) -> Tensor:
    """float32 `[n, V]`, the head's transform included."""
    softcap, scale = head_transform(model.config)
    logits = model.get_output_embeddings()(hidden)[:, :vocabulary]
    return transformed(logits, Transform(scale, softcap))[0].log_softmax(-1)
