"""Preference tuning with transformers' own Trainer: a collator of pairs, and a loss for `compute_loss_func`.

fused_head(model)
collator = PreferenceCollator(tokenizer.pad_token_id)
rows = add_reference(rows, model, collator)                 # ref_chosen_logps and ref_rejected_logps, once
args = TrainingArguments(..., remove_unused_columns=False)
Trainer(model, args, collator, rows, compute_loss_func=PreferenceLoss(beta=0.1)).train()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ...batch import IGNORE_INDEX
from ...evaluating import evaluating
from ...losses.table import find_loss
from ...metrics import preference_metrics
from ...modules import check_construction
from ...preference import loss_of_tokens
from .compute import FusedOutput

_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass
class PreferenceCollator:
    """Rows of token ids to a pair batch `[2B, T]`, chosen first, padded on the right.

    Rows: `prompt_ids`, `chosen_ids`, `rejected_ids` (TRL's columns after tokenising), lists of ints; in all rows or
    none `ref_chosen_logps` and `ref_rejected_logps`, the sums of the reference.

    A batch: `input_ids`, `attention_mask`, `completion_labels` (-100 on prompt and padding) `[2B, T]`, `ref_logps`
    `[2B]` float32, and `labels` `[B, 2]`, (-100, 1) per pair: what the Trainer counts, so that a loss is a mean over
    all pairs of an optimiser step, however they are spread over accumulated batches and processes.

    Args:
        pad_token_id: an int.
        max_length: longer sequences are cut; None: none is.
        truncation_mode: "keep_start" or "keep_end".

    Raises:
        KeyError, ValueError: a row without one of the columns; reference logps in some rows only; a bad argument.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token_id, int):
            raise ValueError(f"pad_token_id: expected an int, got {self.pad_token_id!r} (a tokenizer without padding?)")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length: expected a number above 0 or None, got {self.max_length!r}")
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"truncation_mode: expected 'keep_start' or 'keep_end', got {self.truncation_mode!r}")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        for row in rows:
            for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
                if column not in row:
                    raise KeyError(
                        f"{column}: not in the row, which has {', '.join(row)} (remove_unused_columns=False?)"
                    )
        sides = [(row["prompt_ids"], row[column]) for column in ("chosen_ids", "rejected_ids") for row in rows]
        ids = [self._cut([*prompt, *completion]) for prompt, completion in sides]
        labels = [self._cut([IGNORE_INDEX] * len(prompt) + list(completion)) for prompt, completion in sides]
        batch = {
            "input_ids": _pad(ids, self.pad_token_id),
            "attention_mask": _pad([[1] * len(row) for row in ids], 0),
            "completion_labels": _pad(labels, IGNORE_INDEX),
            "labels": torch.tensor([[IGNORE_INDEX, 1]] * len(rows)),
        }
        found = [column in row for column in _REFERENCE for row in rows]
        if any(found):
            if not all(found):
                raise ValueError(f"{' and '.join(_REFERENCE)}: in some rows only; expected them in all rows or none")
            batch["ref_logps"] = torch.tensor([row[column] for column in _REFERENCE for row in rows]).float()
        return batch

    def _cut(self, ids: list[int]) -> list[int]:
        if self.max_length is None:
            return ids
        return ids[: self.max_length] if self.truncation_mode == "keep_start" else ids[-self.max_length :]


class PreferenceLoss(TrainerCallback):
    """A preference loss for `Trainer(fused_head(model), ..., compute_loss_func=PreferenceLoss(...))`.

    The batches are `PreferenceCollator`'s. The loss is a mean over the pairs of the whole optimiser step: with gradient
    accumulation and several processes too (a loss that is no mean over pairs is so within each batch: sft over the
    tokens, aot over the sorted batch). Given also as a callback (`callbacks=[loss]`), it adds rewards, accuracies and
    the other names of `fastdpo.preference_metrics` to what the Trainer logs, means over its process's batches
    since it last did.

    Args:
        reference_free: a loss on log-ratios takes the reference's logps as 0 where batches have none; False: it raises.
        keywords: `beta`, `loss_type`, `label_smoothing` and the options of `fastdpo.dpo_loss`; a schedule for beta
            cannot be had here, as nothing tells the loss the step.

    Raises:
        TypeError, ValueError: as `fastdpo.dpo_loss`; a beta schedule.
    """

    def __init__(self, *, reference_free: bool = False, **keywords: Any) -> None:
        check_construction(loss_of_tokens, keywords)
        if callable(keywords.get("beta")) or keywords.get("betas") is not None:
            raise ValueError("beta: expected one number, as transformers' Trainer gives a loss neither step nor vector")
        self.keywords = keywords
        asked = keywords.get("loss_type", "sigmoid")
        losses = [find_loss(one) for one in (asked if isinstance(asked, (list, tuple)) else [asked])]
        ratios = keywords.get("parameterization") != "posterior" and any("ref_logps" in loss.uses for loss in losses)
        self._needs_reference = ratios and not reference_free
        self._is_callback = False
        self._metrics: dict[str, list[dict[str, Tensor]]] = {"": [], "eval_": []}

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """The loss `[]` of one batch. num_items_in_batch: pairs in the optimiser step; None: the mean of this batch.

        Raises:
            ValueError: outputs of a model whose head is not fused, or that had no completion_labels; labels that do not
                count the pairs; no ref_logps for a loss on log-ratios, unless `reference_free`.
        """
        logps = outputs.get("token_logps") if isinstance(outputs, dict) else None
        if logps is None:
            raise ValueError(
                "outputs: have no token_logps; expected those of a model with a fused head, fused_head(model), and "
                "batches of PreferenceCollator"
            )
        pairs = logps.shape[0] // 2
        if num_items_in_batch is not None and (labels is None or tuple(labels.shape) != (pairs, 2)):
            raise ValueError(
                f"labels: expected PreferenceCollator's, [{pairs}, 2], which count the pairs of a step; got "
                f"{None if labels is None else list(labels.shape)}"
            )
        ref_logps = outputs.get("ref_logps")
        if ref_logps is None and self._needs_reference:
            raise ValueError(
                "ref_logps: not in the batch, and the loss compares with a reference; expected rows of add_reference "
                "or of `fastdpo cache attach`, or PreferenceLoss(reference_free=True)"
            )
        fused = FusedOutput(**{k: v for k, v in outputs.items() if k != "loss"})
        out = loss_of_tokens(fused.tokens, fused.counted, ref_logps, **self.keywords)
        if self._is_callback:
            self._metrics["" if torch.is_grad_enabled() else "eval_"].append(preference_metrics(out, ref_logps))
        router_loss = outputs.get("router_loss")
        loss = out.loss if router_loss is None else out.loss + router_loss
        return loss if num_items_in_batch is None else loss * pairs / num_items_in_batch

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer that has this as a callback."""
        if getattr(args, "label_smoothing_factor", 0):
            raise ValueError(
                f"label_smoothing_factor: {args.label_smoothing_factor}; it is of a loss from logits. Expected 0, and "
                "PreferenceLoss(label_smoothing=...)"
            )
        self._is_callback = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Called by the Trainer: adds the metrics to `logs` and to `state.log_history`."""
        # The Trainer's own losses: loss, and one of each evaluation, under its prefix
        key = next(
            (key for key in logs or {} if key == "loss" or (key.endswith("_loss") and key != "train_loss")), None
        )
        if logs is None or key is None:
            return
        prefix = key.removesuffix("loss")
        kind = "eval_" if prefix else ""
        batches, self._metrics[kind] = self._metrics[kind], []
        if not batches:
            return
        means = {prefix + name: float(torch.stack([batch[name] for batch in batches]).mean()) for name in batches[0]}
        logs.update(means)
        state.log_history[-1].update(means)


def add_reference(rows: Any, model: Any, collator: PreferenceCollator, batch_size: int = 8) -> Any:
    """A `datasets.Dataset` with the reference's sums, `ref_chosen_logps` and `ref_rejected_logps`, of a fused model as
    it is now, in evaluation mode. For references of whole runs and machines: `fastdpo cache build`."""
    names = ("input_ids", "attention_mask", "completion_labels")
    sums: list[list[float]] = [[], []]
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = collator(list(rows.select(range(start, min(start + batch_size, len(rows))))))
            logps = model(**{name: batch[name].to(model.device) for name in names}).token_logps
            for found, half in zip(sums, logps.sum(-1).chunk(2), strict=True):
                found += half.tolist()
    for column, values in zip(_REFERENCE, sums, strict=True):
        rows = rows.add_column(column, values)
    return rows


def _pad(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
