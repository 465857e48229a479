"""DPO losses of stock TRL and of fastdpo on the same weights and batches, against the head in float32 mathematics.

    python -m benchmarks.bf16_agreement --model FOLDER --data PAIRS.jsonl [--batches 6]

Two bf16 trainers that start alike part after the first step, and a loss curve cannot tell which of them rounds more.
Here one step of stock TRL (the Trainer's defaults: AdamW, lr 1e-6; bf16 weights) moves the policy off its reference;
then nothing moves any more, and each head gets the very same hidden states.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import trl.trainer.utils
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from fastdpo.bench.measure import machine
from fastdpo.integrations.trl import TokenLogpFunction, patched
from fastdpo.train_data import plain_chat_template, read_pairs


class Float32Head(TokenLogpFunction):
    """Float32 products and logits from the same bf16 hidden states and weight."""

    def apply(self, hidden, weight, bias, *rest):  # type: ignore[no-untyped-def, override]
        with torch.autocast(hidden.device.type, enabled=False):
            return super().apply(hidden.float(), weight.float(), bias, *rest)


@contextmanager
def float32_head() -> Iterator[None]:
    with patched():
        trl.trainer.utils._ChunkedLogProbFunction = Float32Head()
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=6)
    return parser


def main() -> None:
    options = _parser().parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = plain_chat_template(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            folder,
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            max_length=512,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            model_init_kwargs={"dtype": "bfloat16"},
        )
        trainer = DPOTrainer(
            options.model, args=config, train_dataset=read_pairs(options.data), processing_class=tokenizer
        )
        trainer.train()
        heads = {"float32": float32_head, "TRL": nullcontext, "fastdpo": patched}
        print(f"{machine()}; {options.model}, loss of 2 pairs, same weights and hidden states")
        print(f"{'batch':>5}{'float32 head':>14}{'TRL':>10}{'off':>9}{'fastdpo':>10}{'off':>9}")
        worst = dict.fromkeys(heads, 0.0)
        batches = iter(trainer.get_train_dataloader())
        for number in range(options.batches):
            inputs = trainer._prepare_inputs(next(batches))
            loss = {}
            for name, head in heads.items():
                with torch.no_grad(), head(), trainer.compute_loss_context_manager():
                    loss[name] = trainer.compute_loss(trainer.model, inputs).item()
            off = {name: abs(value / loss["float32"] - 1) for name, value in loss.items()}
            worst = {name: max(worst[name], off[name]) for name in heads}
            print(
                f"{number:5}{loss['float32']:14.5f}{loss['TRL']:10.5f}{off['TRL']:9.2%}"
                f"{loss['fastdpo']:10.5f}{off['fastdpo']:9.3%}",
                flush=True,
            )
        print(f"worst: TRL {worst['TRL']:.2%}, fastdpo {worst['fastdpo']:.3%}")


if __name__ == "__main__":
    main()
