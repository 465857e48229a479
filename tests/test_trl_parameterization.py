"""FastDPOTrainer's rewards without the reference, or with it without the prompt, are those of `fastdpo.dpo_loss`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
from datasets import Dataset
from trl.trainer import dpo_trainer
from trl_kit import PAIRS, make, save_model, tokenizer_of, train

import fastdpo
from fastdpo.cache import CacheError, MissingEntry, ReferenceCache
from fastdpo.integrations.trl import FastDPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
BETA = 0.3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cache(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> ReferenceCache:
    """Of another model, so that no log-ratio is 0."""
    other = save_model(tmp_path_factory.mktemp("other"), seed=3)
    found = ReferenceCache(tmp_path_factory.mktemp("cache"))
    found.build(other, tokenizer_of(tiny), PAIRS, prior=True, progress=False)
    return found


def built(tiny: str, output: Path, parameterization: str, cache: Any = None, **settings: Any) -> FastDPOTrainer:
    arguments = {"parameterization": parameterization, "reference_cache": cache}
    return make(FastDPOTrainer, tiny, output, arguments=arguments, **{"beta": BETA, **settings})


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "apo_zero", "ipo"])
@pytest.mark.parametrize("parameterization", ["ratio", "posterior", "likelihood"])
def test_loss_and_gradient_are_dpo_losses(tiny, cache, tmp_path, parameterization, loss_type):
    given = None if parameterization == "posterior" else cache
    trainer = built(tiny, tmp_path, parameterization, given, loss_type=[loss_type])
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    head = trainer.model.lm_head.weight
    gradient, head.grad = head.grad.clone(), None

    rows = [row for row in trainer.train_dataset if row["chosen_ids"] in completions(batch)]
    prior = "_prior" if parameterization == "likelihood" else ""
    ref_logps = None
    if parameterization != "posterior":
        every = cache.attach(PAIRS, prior=True)
        order = [next(one for one in every if one["prompt"] == row["prompt"]) for row in in_order(rows, batch)]
        ref_logps = torch.tensor([one[f"ref_{side}{prior}_logps"] for side in ("chosen", "rejected") for one in order])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    hidden = trainer.model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    out = fastdpo.linear_dpo_loss(
        *(hidden, head, labels, ref_logps),
        shift=True,
        beta=BETA,
        loss_type=loss_type,
        parameterization=parameterization,
    )
    out.loss.backward()
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, head.grad, rtol=1e-4, atol=1e-6)


def completions(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """Chosen completions of a batch, in its order."""
    masks = batch["completion_mask"].bool().chunk(2)[0]
    return [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=False)]


def in_order(rows: list[Any], batch: dict[str, torch.Tensor]) -> list[Any]:
    return [next(row for row in rows if row["chosen_ids"] == ids) for ids in completions(batch)]


def test_the_posterior_loads_and_asks_no_reference(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo_trainer, "create_model_from_path", lambda *_, **__: pytest.fail("loaded a reference"))
    monkeypatch.setattr(FastDPOTrainer, "compute_ref_log_probs", lambda *_: pytest.fail("asked a reference"))
    run = train(FastDPOTrainer, tiny, tmp_path, arguments={"parameterization": "posterior"}, beta=BETA)
    log = run.state.log_history[0]
    assert run.ref_model is None
    # At the first step a reference would give rewards of 0
    assert log["rewards/chosen"] == pytest.approx(BETA * log["logps/chosen"], rel=1e-5)
    assert run.evaluate(Dataset.from_list(PAIRS[:2]))["eval_loss"] > 0, "also after training"


@pytest.mark.parametrize("parameterization", ["posterior", "likelihood"])
def test_streams(tiny, cache, tmp_path, parameterization):
    given = None if parameterization == "posterior" else cache
    losses = []
    for name, rows in (("map", Dataset.from_list(PAIRS)), ("stream", Dataset.from_list(PAIRS).to_iterable_dataset())):
        arguments = {"train_dataset": rows, "parameterization": parameterization, "reference_cache": given}
        shuffled = {"max_steps": 1, "per_device_train_batch_size": 6}  # one batch of all rows: no order
        run = train(FastDPOTrainer, tiny, tmp_path / name, arguments=arguments, **shuffled)
        losses.append(run.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_cannot_be_is_refused(tiny, cache, tmp_path):
    with pytest.raises(ValueError, match="unknown 'posteriour'.*did you mean 'posterior'"):
        built(tiny, tmp_path, "posteriour")
    with pytest.raises(ValueError, match="loss .sft. does not use it"):
        built(tiny, tmp_path, "posterior", loss_type=["sft"])
    with pytest.raises(CacheError, match="reference_cache: parameterization='posterior' has no reference"):
        built(tiny, tmp_path, "posterior", cache)
    with pytest.raises(CacheError, match="built with prior=True"):
        built(tiny, tmp_path, "likelihood")
    with pytest.raises(CacheError, match=r"ld_alpha: .*cannot weigh tokens, got 0\.5"):
        built(tiny, tmp_path, "likelihood", cache, ld_alpha=0.5)
    with pytest.raises(CacheError, match="sync_ref_model"):
        built(tiny, tmp_path, "posterior", sync_ref_model=True)
    reference = make(FastDPOTrainer, tiny, tmp_path).model
    with pytest.raises(CacheError, match="ref_model: expected None"):
        make(FastDPOTrainer, tiny, tmp_path, arguments={"parameterization": "posterior", "ref_model": reference})
    attached = Dataset.from_list(cache.attach(PAIRS))
    with pytest.raises(CacheError, match="ref_chosen_logps, which parameterization='posterior' does not read"):
        make(FastDPOTrainer, tiny, tmp_path, arguments={"parameterization": "posterior", "train_dataset": attached})


def test_a_cache_without_priors(tiny, tmp_path):
    found = ReferenceCache(tmp_path / "refs")
    found.build(tiny, tokenizer_of(tiny), PAIRS, progress=False)
    with pytest.raises(MissingEntry):
        built(tiny, tmp_path, "likelihood", found)
