"""One process's share of a study: a reference scored and measured, a cell trained and measured.

What comes out depends on the study's settings and the cell alone: not on the process, nor on what it ran before.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cache import Reference, ReferenceCache, ReferenceModel, files
from ..cache.rows import Preparation, load_tokenizer, sequence, vocabulary
from ..cache.score import Scorer as LogpScorer
from ..integrations.head_transform import head_transform
from . import data, degenerate, divergence, measures, scorer, tokens
from .cells import Cell
from .config import START, ReferencePolicy, StudyConfig, of_study, opened
from .errors import StudyError
from .measures import Measures, PairLogps
from .results import read_json
from .sampling import Answer, sample
from .training import arguments, finite, trained

_BATCH = 16  # sequences that are scored at once


class Lab:
    """Data, tokenizer and cache of a study, opened once for all that a process does of it.

    Args:
        folder: the study's, with its study.json.
        output: where a cell's answers and token logps go; None: DIR/cells.
    """

    def __init__(self, folder: Path, output: Path | None = None) -> None:
        self.folder, self.output = folder, output or folder / "cells"
        self.study = read_json(folder / "study.json")
        self.config: StudyConfig = of_study(self.study).with_paths(lambda path: opened(path, folder))
        self.pairs = data.read(self.config.data)
        self.tokenizer = load_tokenizer(self.config.policy, self.pairs.train[0], self.config.trust_remote_code)
        self.cache = ReferenceCache(folder / "refs")
        self.cut = {name: getattr(self.arguments(), name) for name in ("max_length", "truncation_mode")}
        prepare = Preparation(self.pairs.train[0], self.tokenizer)
        self.held_out = [prepare(row) for row in self.pairs.held_out]
        self.score = scorer.load(self.config.scorer, self.config.trust_remote_code) if self.config.scorer else None

    def policy(self, name: str) -> ReferencePolicy:
        """A reference by name; the start model is one of any study."""
        if name == START:
            return ReferencePolicy(START, self.config.policy, START)
        return self.config.reference(name)

    def arguments(self, cell: Cell | None = None) -> Any:
        """TRL's DPOConfig of a cell, or of all."""
        return arguments(self.config, self.folder / "work" / "trainers", cell)

    def _without(self, cell: Cell) -> bool:
        """Whether the cell's reward asks no reference."""
        return cell.parameterization == "posterior" or self.policy(cell.reference).model is None

    # --- references --------------------------------------------------------------------------------------------------

    def reference(self, policy: ReferencePolicy) -> dict[str, Any]:
        """Score a reference on all pairs into the cache, and measure its own answers. Returns what is kept of it."""
        from datasets import concatenate_datasets

        started = time.perf_counter()
        tokenizer = self._tokenizer(policy)
        model = ReferenceModel(
            policy.model, dtype=policy.dtype or self.config.dtype, trust_remote_code=self.config.trust_remote_code
        )
        self.cache.build(
            model.loaded,
            tokenizer,
            concatenate_datasets([self.pairs.held_out, self.pairs.train]),
            name=policy.name,
            prior="likelihood" in self.config.parameterizations,
            token_logps=True,
            progress=False,
            source=policy.name,
            **self.cut,
        )
        scored = time.perf_counter()
        own = model.loaded
        prepare = Preparation(self.pairs.train[0], tokenizer)
        answers, found = self._sampled(own, tokenizer, [prepare(row) for row in self.pairs.held_out], seed=0)
        if policy.name == START:
            zero = np.zeros(sum(len(one.ids) for one in answers))
            found |= measures.of_kl(START, zero, answers)
        chosen, rejected = self._reference_logps(policy.name, False)
        found |= dict(zip(("reward_accuracy", "reward_accuracy_se"), measures.mean(chosen > rejected), strict=True))
        if self.score is None:  # it has no reward whose accuracy could stand beside a run's
            found |= {"quality": None, "quality_se": None}
        return {
            "measures": found,
            "score_seconds": scored - started,
            "seconds": time.perf_counter() - started,
        }

    def _tokenizer(self, policy: ReferencePolicy) -> Any:
        """The policy's, where a reference has the same tokens: it is to score the very tokens that are trained on."""
        first, remote = self.pairs.train[0], self.config.trust_remote_code
        own = load_tokenizer(policy.tokenizer or policy.model or "", first, remote)
        return self.tokenizer if vocabulary(own) == vocabulary(self.tokenizer) else own

    def speaks(self, reference: str) -> bool:
        """Whether a reference has the policy's tokens."""
        return self.cache.reference(reference).vocabulary == vocabulary(self.tokenizer)

    @functools.lru_cache(maxsize=8)  # noqa: B019  a Lab lives as long as its process
    def _columns(self, reference: str) -> dict[str, list[Any]]:
        """column -> what the cache holds of each held-out pair."""
        prior = "likelihood" in self.config.parameterizations
        rows = self.cache.attach(
            list(self.pairs.held_out), reference, tokenizer=self.tokenizer, prior=prior, token_logps=True, **self.cut
        )
        return {name: [row[name] for row in rows] for name in rows[0] if name.startswith("ref_")}

    def _reference_logps(self, reference: str, prior: bool) -> PairLogps:
        """Sequence logps of the held-out pairs under a reference; with `prior`, without their prompts."""
        columns, kind = self._columns(reference), "_prior" if prior else ""
        return PairLogps(*(np.array(columns[f"ref_{side}{kind}_logps"]) for side in tokens.SIDES))

    # --- cells -------------------------------------------------------------------------------------------------------

    def cell(self, cell: Cell) -> dict[str, Any]:
        """Train and measure one cell. Its answers and token logps are written; returns what is to be of its JSON."""
        from ..integrations.trl import FastDPOTrainer

        started = time.perf_counter()
        without = self._without(cell)
        trainer, curves = trained(
            FastDPOTrainer,
            self.arguments(cell),
            self.config,
            self.tokenizer,
            self.pairs.train,
            parameterization="posterior" if without else cell.parameterization,
            reference_cache=None if without else self.cache,
            reference=None if without else cell.reference,
        )
        halfway = time.perf_counter()
        model = trained_model(trainer)
        if self.config.save_models:
            trainer.save_model(str(self.folder / "models" / cell.id))
        trainer.accelerator.free_memory()  # it and the trainer hold the optimizer, whose memory the measures can use
        del trainer
        _collect()
        try:
            found, reasons = self.measure(model, cell, curves)
        finally:
            del model
            _collect()
        ended = time.perf_counter()
        return {
            "seconds": ended - started,
            "train_seconds": halfway - started,
            "curves": curves,
            "measures": found,
            "degenerate": reasons,
        }

    def measure(self, model: Any, cell: Cell, curves: list[dict[str, Any]]) -> tuple[Measures, list[str]]:
        """(measures of a trained policy, why it is degenerate)"""
        names = ("length", "repetition", "quality", "kl_start", "kl_reference", "reward_accuracy", "reward_margin")
        if not all(bool(weights.isfinite().all()) for weights in model.parameters()):
            return dict.fromkeys((*names, "chosen_displacement", "rejected_displacement", "chosen_falls")), [
                degenerate.NOT_FINITE
            ]
        without = self._without(cell)
        found = self._on_pairs(model, cell, without)
        answers, of_answers = self._sampled(model, self.tokenizer, self.held_out, cell.seed, cell)
        found |= of_answers | self._kl(model, answers, cell, without)
        measured = self._with_quality(found)
        found = {name: finite(value) for name, value in measured.items()}
        reasons = degenerate.reasons(found, read_json(self.folder / "references" / f"{START}.json")["measures"])
        if any(one["loss"] is None for one in curves) or found != measured:
            reasons.append(degenerate.NOT_FINITE)
        return found, reasons

    def _on_pairs(self, model: Any, cell: Cell, without: bool) -> Measures:
        """Reward and displacement on the held-out pairs; writes the token logps of the first ones."""
        config = head_transform(model.config)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        logps = LogpScorer(model, Reference("", dtype, None, 1.0, *config))
        both = [[sequence(row, part, **self.cut, prefix=None) for row in self.held_out] for part in (0, 1)]
        policy = [
            [one for first in range(0, len(side), _BATCH) for one in logps(side[first : first + _BATCH])]
            for side in both
        ]
        sums = PairLogps(*(np.array([one.sum(dtype=np.float64) for one in side]) for side in policy))
        start = self._reference_logps(START, False)
        reference = None
        if not without:
            reference = self._reference_logps(cell.reference, cell.parameterization == "likelihood")
        self._keep_tokens(cell, both, policy, None if without or not self.speaks(cell.reference) else cell.reference)
        return measures.on_pairs(sums, start, reference, cell.beta, sum(len(one) for one in policy[0]))

    def _keep_tokens(self, cell: Cell, sequences: Any, policy: Any, reference: str | None) -> None:
        rows = []
        for i in range(min(self.config.token_rows, len(self.held_out))):
            row = {}
            for number, side in enumerate(tokens.SIDES):
                one = sequences[number][i]
                row[side] = {"ids": one.ids[1:][one.counted].astype(np.int64), "policy": policy[number][i]}
                for name, source in (("start", START), ("reference", reference)):
                    if source is not None:
                        row[side][name] = np.array(self._columns(source)[f"ref_{side}_token_logps"][i], np.float32)
            rows.append(row)
        prompts = [self.tokenizer.decode(self.held_out[i]["prompt_ids"]) for i in range(len(rows))]
        tokens.save(self.output / f"{cell.id}.tokens.npz", prompts, rows)

    def _sampled(
        self, model: Any, tokenizer: Any, held_out: list[Any], seed: int, cell: Cell | None = None
    ) -> tuple[list[Answer], Measures]:
        """Answers to the first different held-out prompts, and measures of them; a cell's are written."""
        longest = self.cut["max_length"] or math.inf
        different: dict[tuple[int, ...], Any] = {}
        for row in held_out:
            if len(row["prompt_ids"]) < longest:
                different.setdefault(tuple(row["prompt_ids"]), row)
        rows = list(different.values())[: self.config.sampling.prompts]
        if not rows:
            raise StudyError(f"data: no held-out prompt leaves room for an answer in max_length {longest} tokens")
        answers = sample(model, tokenizer, [row["prompt_ids"] for row in rows], self.config.sampling, seed)
        found = measures.on_answers(answers)
        asked = [rows[one.prompt] for one in answers]
        texts = [tokenizer.decode(one.ids, skip_special_tokens=True) for one in answers]
        scores: list[float | None] = [None] * len(answers)
        if self.score is not None:
            scored = self.score([row["prompt"] for row in asked], texts, asked)
            found |= measures.of_scores(scored, answers)
            scores = list(scored)
        if cell is not None:
            lines = [
                {"prompt": row["prompt"], "answer": text, "score": score}
                for row, text, score in zip(asked, texts, scores, strict=True)
            ]
            path = self.output / f"{cell.id}.answers.jsonl"
            files.write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        return answers, found

    def _kl(self, model: Any, answers: list[Answer], cell: Cell, without: bool) -> Measures:
        """KL of the policy to the start model and to the reference, on its answers. One other model at a time."""
        sequences = [one.sequence for one in answers]
        hidden = divergence.hidden_states(model, sequences)
        found: Measures = {"kl_reference": None, "kl_reference_se": None}
        known: dict[tuple[str, str], np.ndarray] = {}
        asked = [(START, self.policy(START))]
        if not without and self.speaks(cell.reference):
            asked.append(("reference", self.policy(cell.reference)))
        for name, other in asked:
            path = (other.model or "", other.dtype or self.config.dtype)
            if path not in known:
                loaded = self._open(*path)
                theirs = divergence.hidden_states(loaded, sequences)
                known[path] = divergence.token_kl(model, hidden, loaded, theirs)
                del loaded, theirs
            found = found | measures.of_kl(name, known[path], answers)
        return found

    def _open(self, path: str, dtype: str) -> Any:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), trust_remote_code=self.config.trust_remote_code
        )
        return model.to(torch.accelerator.current_accelerator() or "cpu")

    def _with_quality(self, found: Measures) -> Measures:
        """Without a scorer, quality is the reward accuracy."""
        if self.score is not None:
            return found
        return found | {"quality": found["reward_accuracy"], "quality_se": found["reward_accuracy_se"]}


def trained_model(trainer: Any) -> Any:
    """The model that a trainer has trained, computing in its weights' dtype as references do: not under autocast."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _collect() -> None:
    """Give back what nothing refers to any more; trainers are cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
