"""What each rank of tests/test_distributed.py does: one step of DPO on a small Llama, its parts on two processes."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastdpo
from fastdpo import SequenceParallel, VocabParallel

PAIRS, LENGTH, VOCAB = 4, 12, 97
KEYWORDS: dict[str, Any] = {"beta": 0.5, "stats": ("entropy",)}


def model(folder: str | None = None, **keywords: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    if folder is not None:
        return LlamaForCausalLM.from_pretrained(folder, **keywords)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    found = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes, **heads))
    with torch.no_grad():
        found.lm_head.weight.normal_(0, 1)  # logits that differ
    return found


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """ids and labels `[2B, T]`, chosen first; reference logps `[2B]`."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 9:] = -100
    labels = torch.cat([labels[:, 1:], torch.full((2 * PAIRS, 1), -100)], dim=1)
    return ids, labels, -30 - 3 * torch.rand(2 * PAIRS, generator=generator)


def gradients(of: nn.Module) -> dict[str, Tensor]:
    """By the names of a plain model, whole."""
    found = {}
    for name, parameter in of.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        name = name.removeprefix("module.").removeprefix("policy.")
        found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
    return found


class Policy(nn.Module):
    """The model and its loss in one forward, as DDP and FSDP2's hooks want it."""

    def __init__(self, policy: Any, **keywords: Any) -> None:
        super().__init__()
        self.policy, self.keywords = policy, KEYWORDS | keywords

    def forward(self, ids: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        hidden = self.policy.model(ids).last_hidden_state
        return fastdpo.linear_dpo_loss(hidden, self.policy.lm_head.weight, labels, ref, **self.keywords).loss


def alone(**keywords: Any) -> tuple[Tensor, dict[str, Tensor]]:
    policy = Policy(model(), **keywords)
    loss = policy(*batch())
    loss.backward()
    return loss.detach(), gradients(policy)


def _mine(rank: int) -> tuple[Tensor, ...]:
    """This rank's pairs: every second one."""
    ids, labels, ref = batch()
    rows = torch.cat([torch.arange(rank, PAIRS, 2), torch.arange(PAIRS + rank, 2 * PAIRS, 2)])
    return ids[rows], labels[rows], ref[rows]


def ddp(rank: int) -> Any:
    policy = DistributedDataParallel(Policy(model()))
    loss = policy(*_mine(rank))
    loss.backward()
    return loss.detach(), gradients(policy)


def fsdp(rank: int, how: str, keywords: dict[str, Any]) -> Any:
    """how: "whole" wraps the loss too, so FSDP2 gathers the head; "outside" reads the sharded head beside the model."""
    policy = Policy(model(), **keywords)
    llama = policy.policy
    for layer in llama.model.layers:
        fully_shard(layer)
    if how == "outside":
        fully_shard(llama.model)
        fully_shard(llama.lm_head)
    else:
        fully_shard(policy)
    loss = policy(*_mine(rank))
    loss.backward()
    sharded = llama.lm_head.weight
    local = sharded.to_local().shape[0]
    return loss.detach(), gradients(policy), local


def fused(rank: int | None, how: str) -> Any:
    """A model whose own forward has the fused head ("trl", or "transformers"); on two ranks FSDP2 with a head of its
    own unit. rank None: one process, all rows."""
    llama = model()
    if how == "transformers":
        from fastdpo.integrations.transformers import fused_head

        fused_head(llama)
    else:
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(llama)
    if rank is not None:
        for unit in (*llama.model.layers, llama.model, llama.lm_head, llama):
            fully_shard(unit)
    ids = batch()[0] if rank is None else _mine(rank)[0]
    if how == "transformers":
        loss = -llama(ids, labels=ids).token_logps.sum()
    else:
        from fastdpo.integrations.trl import patched
        from fastdpo.integrations.trl_head import whole_heads

        with patched() as function, whole_heads(function, [llama]):
            loss = -llama(ids, labels=ids, fused_lm_head=True).log_probs.sum()
    loss.backward()
    return loss.detach(), gradients(llama), type(llama.lm_head.weight).__name__


def sequence_parallel(rank: int, keywords: dict[str, Any], gradients_as: str) -> Any:
    """Each rank the tokens of its half; the model itself runs whole, only the head is split."""
    ids, labels, ref = batch()
    llama = model()
    part = slice(0, 5) if rank == 0 else slice(5, LENGTH)
    hidden = llama.model(ids).last_hidden_state[:, part]
    parallel = SequenceParallel(gradients=gradients_as)
    keywords = {"stats": ("entropy", "mean_logits")} | keywords
    out = fastdpo.linear_dpo_loss(
        hidden, llama.lm_head.weight, labels[:, part], ref, sequence_parallel=parallel, **keywords
    )
    out.loss.backward()
    total = gradients(llama)
    for grad in total.values():
        dist.all_reduce(grad)
        grad /= 2 if gradients_as == "mean" else 1
    rows = torch.tensor([True, False] * PAIRS)
    unpaired = fastdpo.linear_unpaired_loss(
        hidden.detach(), llama.lm_head.weight, labels[:, part], rows, ref, sequence_parallel=parallel
    )
    return out.loss.detach(), total, fastdpo.preference_metrics(out, ref), unpaired.loss.detach()


def tensor_parallel(rank: int, folder: str) -> Any:
    """transformers' own tensor parallelism; the head stays a DTensor, sharded over V."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size())}
    llama = model(folder, tp_plan="auto")
    ids, labels, ref = batch()
    weight = llama.lm_head.weight
    hidden = llama.model(ids).last_hidden_state
    parallel = VocabParallel.of(weight)
    loss = fastdpo.linear_dpo_loss(hidden, weight, labels, ref, vocab_parallel=parallel, **KEYWORDS).loss
    loss.backward()
    return loss.detach(), gradients(llama), weight.to_local().shape[0]


def dying(rank: int) -> str:
    """Rank 1 is killed before its part; what rank 0 is told."""
    parallel = VocabParallel(50)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        fastdpo.linear_token_logps(
            torch.randn(4, 8), torch.randn(50, 8), torch.tensor([1, 2, 3, 99]), vocab_parallel=parallel
        )
    except RuntimeError as error:
        return str(error)
    raise AssertionError("a rank went on without the other")
