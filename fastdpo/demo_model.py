"""The demo's model: a small Llama, pretrained for some seconds on right, wrong and rambling answers alike."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import demo_task
from .head import linear_token_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo. The words of the task are a few dozen; the vocabulary is padded with tokens that never occur,
    so that the LM head weighs in the model as it does in real ones: most of the parameters and of the time."""

    seed: int = 1  # lr and beta were chosen on the held-out prompts of seed 0
    vocabulary: int = 16384
    hidden: int = 128
    layers: int = 3
    pretrain_steps: int = 300
    pretrain_batch: int = 64
    pretrain_prompts: int = 6000
    train_pairs: int = 480
    held_out_pairs: int = 200
    batch_pairs: int = 16
    learning_rate: float = 3e-5
    beta: float = 0.5

    def split(self) -> tuple[list[str], list[str], list[str]]:
        """Prompts to pretrain on, for DPO and held out; no prompt is in two of them."""
        sizes = (self.pretrain_prompts, self.train_pairs, self.held_out_pairs)
        found = iter(demo_task.prompts(self.seed, sum(sizes)))
        pretrain, train, held_out = (list(itertools.islice(found, size)) for size in sizes)
        return pretrain, train, held_out


def build(settings: Settings, tokenizer: Any) -> PreTrainedModel:
    """The untrained model, float32, weights from the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden,
            intermediate_size=3 * settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def pretrain(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: list[str],
    settings: Settings,
    mix: dict[str, float] = demo_task.MIX,
) -> None:
    """Next-token training on the answers of a mix of kinds, in place; the head is fastdpo's."""
    from tqdm import tqdm

    steps, rate = settings.pretrain_steps, 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    stream = demo_task.examples(prompts, settings.seed, mix)
    prompt_length = len(tokenizer(prompts[0])["input_ids"])  # the same for all: one token a word
    model.train()
    for _ in tqdm(range(steps), desc="pretraining", ncols=80):
        texts = [f"{p}{a} {demo_task.END}" for p, a in itertools.islice(stream, settings.pretrain_batch)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        labels[:, :prompt_length] = -100
        hidden = model.model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
        logps = linear_token_logps(hidden, model.lm_head.weight, labels, shift=True).logps
        loss = -logps.sum() / (labels >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def greedy_accuracy(model: PreTrainedModel, tokenizer: Any, prompts: list[str]) -> float:
    """Share of prompts whose greedy answer is right and ends there."""
    training = model.training
    model.eval()
    generate: Any = model.generate
    prompt_ids = tokenizer(prompts, return_tensors="pt")["input_ids"]  # equally long, so nothing is padded
    generated = generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=demo_task.MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.train(training)
    right = 0
    for prompt, ids in zip(prompts, generated[:, prompt_ids.shape[1] :].tolist(), strict=True):
        text, ended, _ = tokenizer.decode(ids).partition(demo_task.END)
        right += bool(ended) and demo_task.is_right(prompt, text)
    return right / len(prompts)
