"""What padding-free batches and shared prompts save, by the prompt's share of a sequence.

    python -m benchmarks.shared_prompts --output DIR [--model FOLDER] [--pairs 4] [--length 1024] [--rounds 3]

Forward and backward of the whole model with the DPO loss, as FastDPOTrainer runs them with a cached reference: padded,
padding-free, shared prompt, in turn. Without --model a random Llama of 110 million parameters. Pairs of random tokens:
the longer sequence of a pair has --length / 2 to --length tokens, the shorter completion half to all of the longer one.
Before, in float32 on a short batch: the log-probabilities and the gradients are those of the padded batch.
DIR/shared_prompts.json, DIR/shared_prompts.png.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl.trainer.utils import add_fused_lm_head

from fastdpo.bench.gate import check
from fastdpo.bench.measure import alternate, machine
from fastdpo.integrations.trl import patched
from fastdpo.integrations.trl_packing.forward import PackedForward, packed
from fastdpo.integrations.trl_packing.layout import layout
from fastdpo.plots import BLUE, GREEN, GREY, STYLE

OPTIONS = {"padded": None, "padding-free": "padding_free", "shared prompt": "shared_prompt"}
COLOURS = {"padded": GREY, "padding-free": GREEN, "shared prompt": BLUE}
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # as TRL's DPOTrainer asks for
BETA = 0.1


def build(folder: str | None, layers: int, width: int, vocab: int, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    else:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.train()
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model


def batch_of(share: float, pairs: int, length: int, vocab: int) -> dict[str, Tensor]:
    """A pair batch as TRL's collator pads it; the same lengths for every share."""
    generator = torch.Generator().manual_seed(0)
    rows: list[list[Tensor]] = [[], []]
    prompts = []
    for longest, ratio in torch.rand(pairs, 2, generator=generator).tolist():
        total = int(length * (1 + longest) / 2)
        prompt = min(max(round(share * total), 1), total - 2)
        completions = [total - prompt, max(int((total - prompt) * (1 + ratio) / 2), 1)]
        start = torch.randint(vocab, (prompt,), generator=generator)
        for side, count in zip(rows, completions, strict=True):
            side.append(torch.cat([start, torch.randint(vocab, (count,), generator=generator)]))
        prompts.append(prompt)
    every = rows[0] + rows[1]
    ids = torch.nn.utils.rnn.pad_sequence(every, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in every], batch_first=True)
    outside = torch.arange(ids.shape[1]) < torch.tensor(prompts * 2)[:, None]
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(outside | (mask == 0), -100)}


def step(model: Any, forward: PackedForward | None, batch: dict[str, Tensor]) -> Tensor:
    """One forward and backward; returns the log-probabilities `[2B, T - 1]`."""
    model.zero_grad(set_to_none=True)
    with patched(), packed(*([forward] if forward else [])):
        logps = model(**batch, fused_lm_head=True, use_cache=False).log_probs
    chosen, rejected = logps.sum(1).chunk(2)
    # A reference that holds the margin where the loss has a slope
    loss = -logsigmoid(BETA * (chosen - rejected - (chosen - rejected).detach())).mean()
    loss.backward()
    return logps.detach()


def gate(model: Any, share: float, vocab: int) -> None:
    """In float32 on a short batch: what packing returns, and its gradients, against padded."""
    batch = batch_of(share, 2, 48, vocab)
    truth = None
    for name, option in OPTIONS.items():
        logps = step(model, PackedForward(model, option) if option else None, batch)
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        if truth is None:
            truth = logps, gradients
        check(f"{name}, share {share}: logps", logps, truth[0], 1e-5)
        for weight, gradient in gradients.items():
            check(f"{name}, share {share}: gradient of {weight}", gradient, truth[1][weight], 1e-3)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    dtype = getattr(torch, options.dtype)
    shape = options.model, options.layers, options.width, options.vocab
    model = build(*shape, torch.float32)
    vocab = model.config.get_text_config().vocab_size
    for share in options.shares:
        gate(model, share, vocab)
    del model
    model = build(*shape, dtype)
    points = []
    for share in options.shares:
        batch = batch_of(share, options.pairs, options.length, vocab)
        forwards = {name: PackedForward(model, option) if option else None for name, option in OPTIONS.items()}
        results = {name: step(model, forward, batch) for name, forward in forwards.items()}
        for name, result in results.items():
            check(f"{name}, share {share}: logps", result, results["padded"], 2e-2)
        contenders = {name: partial(step, model, forward, batch) for name, forward in forwards.items()}
        seconds = alternate(contenders, options.rounds, warmup=0)
        tokens = {"padded": batch["input_ids"].numel()}
        for name in ("padding-free", "shared prompt"):
            tokens[name] = len(layout(**batch, shared_prompt=name == "shared prompt").source)
        points.append({"share": share, "seconds": seconds, "tokens": tokens})
        print(table(points[-1:], head=len(points) == 1), flush=True)
    return points


def table(points: list[dict[str, Any]], head: bool = True) -> str:
    """Markdown: a row for each share; seconds, the gain over padded, and the tokens that the model runs."""
    lines = ["| prompt's share | " + " | ".join(OPTIONS) + " |", "|---|" + "---|" * len(OPTIONS)] if head else []
    for p in points:
        cells = [
            f"{p['seconds'][name]:.2f} s, {p['seconds']['padded'] / p['seconds'][name]:.2f} x, "
            f"{p['tokens'][name]:,} tokens"
            for name in OPTIONS
        ]
        lines.append(f"| {p['share']:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(points: list[dict[str, Any]], path: Path) -> None:
    """Seconds of a step, and the gain over padded beside the gain in tokens."""
    shares = [p["share"] for p in points]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        seconds, gain = figure.subplots(1, 2)
        for name, colour in COLOURS.items():
            seconds.plot(shares, [p["seconds"][name] for p in points], "o-", color=colour, label=name)
            for key, style in (("seconds", "o-"), ("tokens", ":")):
                label = name if key == "seconds" else f"{name}: fewer tokens"
                gains = [p[key]["padded"] / p[key][name] for p in points]
                if name != "padded":
                    gain.plot(shares, gains, style, color=colour, label=label)
        seconds.set(title="Seconds of forward and backward", ylim=(0, None))
        gain.axhline(1, color=GREY, lw=1)
        gain.set(title="Times faster than padded", ylim=(0, None))
        for axes in (seconds, gain):
            axes.set(xlabel="prompt's share of the longer sequence", xlim=(0, 1))
            axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
            axes.legend(fontsize=9)
        figure.savefig(path, dpi=120)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="a folder; default: random, of --layers, --width and --vocab")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def main() -> None:
    options = _parser().parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    points = measure(options)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    settings["model"] = options.model and Path(options.model).name
    result = {"machine": machine(), "settings": settings, "points": points}
    (options.output / "shared_prompts.json").write_text(json.dumps(result, indent=1) + "\n")
    picture(points, options.output / "shared_prompts.png")
    print(machine())
    print(options.output / "shared_prompts.png")


if __name__ == "__main__":
    main()
