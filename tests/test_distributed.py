"""Two gloo processes: the loss and the gradients of one process, to 1e-5 in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distributed_workers as workers
import pytest
import ranks
import torch
from torch import Tensor

pytest.importorskip("transformers")

import fastdpo
from fastdpo import SequenceParallel, VocabParallel


def assert_same(loss: Tensor, grads: dict[str, Tensor], truth: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(loss, truth[0], rtol=1e-5, atol=1e-5)
    assert set(grads) == set(truth[1])
    for name, grad in grads.items():
        torch.testing.assert_close(grad, truth[1][name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_ddp() -> None:
    both, truth = ranks.run(workers.ddp), workers.alone()
    mean = (both[0][0] + both[1][0]) / 2
    for _, grads in both:
        assert_same(mean, grads, truth)


@pytest.mark.parametrize("how", ["whole", "outside"])
@pytest.mark.parametrize("keywords", [{}, {"grad_tol": 2.0**-10}], ids=["exact", "compact"])
def test_fsdp2(how: str, keywords: dict[str, Any]) -> None:
    both, truth = ranks.run(workers.fsdp, how, keywords), workers.alone()
    mean = (both[0][0] + both[1][0]) / 2
    for rank, (_, grads, rows) in enumerate(both):
        if not keywords:
            assert_same(mean, grads, truth)
        else:
            assert abs(mean - truth[0]) < 1e-5
            for name, grad in grads.items():
                assert (grad - truth[1][name]).norm() < 5e-3 * truth[1][name].norm(), name
        assert rows == (49, 48)[rank], "the head stays sharded between the steps"


@pytest.mark.parametrize("how", ["transformers", "trl"])
def test_fsdp2_with_the_head_in_the_models_forward(how: str) -> None:
    pytest.importorskip(how)
    both, truth = ranks.run(workers.fused, how), workers.fused(None, how)
    for _, grads, kind in both:
        assert kind == "DTensor"
        # FSDP2 averages, and each rank has half of the sum
        assert_same(both[0][0] + both[1][0], {name: 2 * grad for name, grad in grads.items()}, truth[:2])


@pytest.mark.parametrize("gradients", ["mean", "sum"])
@pytest.mark.parametrize(
    "keywords",
    [
        {"beta": 0.5},
        {"beta": 0.5, "loss_type": "ipo"},
        {"beta": 0.5, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "use_weighting": True},
    ],
    ids=["sigmoid", "means", "weighted"],
)
def test_sequence_parallel(keywords: dict[str, Any], gradients: str) -> None:
    both = ranks.run(workers.sequence_parallel, keywords, gradients)
    stats = ("entropy", "mean_logits")
    truth = workers.alone(**keywords, stats=stats)
    llama = workers.model()
    ids, labels, ref = workers.batch()
    hidden, head = llama.model(ids).last_hidden_state, llama.lm_head.weight
    out = fastdpo.linear_dpo_loss(hidden, head, labels, ref, **keywords, stats=stats)
    metrics = fastdpo.preference_metrics(out, ref)
    rows = torch.tensor([True, False] * workers.PAIRS)
    unpaired = fastdpo.linear_unpaired_loss(hidden, head, labels, rows, ref).loss
    for loss, grads, theirs, unpaired_loss in both:
        assert_same(loss, grads, truth)
        torch.testing.assert_close(theirs, metrics, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(unpaired_loss, unpaired.detach(), rtol=1e-5, atol=1e-5)


def test_tensor_parallel_model(tmp_path: Path) -> None:
    workers.model().save_pretrained(tmp_path)
    both, truth = ranks.run(workers.tensor_parallel, str(tmp_path)), workers.alone()
    for rank, (loss, grads, rows) in enumerate(both):
        assert_same(loss, grads, truth)
        assert rows == (49, 48)[rank], "the head is never gathered"


def test_a_rank_that_dies_does_not_hang_the_others() -> None:
    survived, _ = ranks.run(workers.dying, patience=20, limit=60, dying=(1,))
    assert "rank 1" in survived or "peer" in survived.lower(), survived


def test_without_a_group() -> None:
    for make in (lambda: VocabParallel(5), SequenceParallel):
        with pytest.raises(RuntimeError, match="init_process_group"):
            make()


def test_places_in_split_sequences_are_refused_before_the_head_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdpo.preference.from_hidden", lambda *_, **__: pytest.fail("the head ran"))
    labels = torch.zeros(2, 3, dtype=torch.long)
    split = object.__new__(SequenceParallel)
    with pytest.raises(NotImplementedError, match="ld_alpha: with sequence_parallel"):
        fastdpo.linear_dpo_loss(torch.zeros(2, 3, 4), torch.zeros(5, 4), labels, ld_alpha=0.5, sequence_parallel=split)
    with pytest.raises(NotImplementedError, match="ld_alpha: with sequence_parallel"):
        fastdpo.sequence_logps(torch.zeros(2, 3), labels, ld_alpha=0.5, sequence_parallel=split)
