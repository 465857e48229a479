"""What is measured, against numbers worked by hand and brute force; when a run is called degenerate; scorers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl")

import cache_kit as kit
import torch

from fastdpo.study import degenerate, divergence, measures, scorer
from fastdpo.study.config import Sampling
from fastdpo.study.errors import StudyError
from fastdpo.study.measures import PairLogps
from fastdpo.study.sampling import Answer, sample


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """(a model, another, the tokenizer of both)"""
    folder = tmp_path_factory.mktemp("models")
    paths = [kit.save_model(folder / str(seed), seed=seed) for seed in (1, 2)]
    return kit.model_of(paths[0]), kit.model_of(paths[1]), kit.tokenizer_of(paths[0])


def answer(prompt: int, ids: list[int], ended: bool = False) -> Answer:
    return Answer(prompt, [7, 8], ids, ended)


# --- numbers by hand -------------------------------------------------------------------------------------------------


def test_of_pairs() -> None:
    """Two pairs; margins of log-ratios: (-1+3) - (-3+3) = 2 and (-5+4) - (-2+6) = -5."""
    policy = PairLogps(np.array([-1.0, -5.0]), np.array([-3.0, -2.0]))
    start = PairLogps(np.array([-2.0, -2.0]), np.array([-2.0, -2.0]))
    reference = PairLogps(np.array([-3.0, -4.0]), np.array([-3.0, -6.0]))
    found = measures.on_pairs(policy, start, reference, 0.5, chosen_tokens=8)
    assert found["reward_accuracy"] == 0.5
    assert found["reward_accuracy_se"] == pytest.approx(0.5)  # sqrt(2 * 2 * 0.25) / 2
    assert found["reward_margin"] == pytest.approx(0.5 * (2 - 5) / 2)
    assert found["chosen_displacement"] == pytest.approx((1 - 3) / 2)
    assert found["rejected_displacement"] == pytest.approx((-1 + 0) / 2)
    assert found["chosen_displacement_token"] == pytest.approx(-2 / 8)
    assert found["chosen_falls"] == 0.5
    posterior = measures.on_pairs(policy, start, None, 0.5, chosen_tokens=8)
    assert posterior["reward_margin"] == pytest.approx(0.5 * (2 - 3) / 2)


def test_of_answers() -> None:
    found = measures.on_answers(
        [answer(0, [1, 2, 3], True), answer(1, [5, 5, 5, 5, 5, 5]), answer(2, [9], True), answer(3, [1, 2, 3, 4], True)]
    )
    assert found["length"] == (2 + 6 + 0 + 3) / 4, "the end is no token of the answer"
    assert found["length_se"] == pytest.approx(np.std([2, 6, 0, 3], ddof=1) / 2)
    assert found["repetition"] == pytest.approx((2 / 3) / 4), "three 4-grams, one kind"
    assert (found["empty"], found["endless"]) == (0.25, 0.25)
    assert measures.repetition([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)


def test_errors_are_over_prompts_not_answers() -> None:
    values = [0.0, 0.0, 1.0, 1.0]
    assert measures.clustered(values, [0, 0, 1, 1]) == (0.5, pytest.approx(0.5)), "two draws"
    assert measures.clustered(values, [0, 1, 2, 3])[1] == pytest.approx(np.std(values, ddof=1) / 2)
    assert measures.clustered([3.0], [0]) == (3.0, 0.0)


def test_the_error_of_a_ratio_is_its_spread_over_samples() -> None:
    """Totals and lengths that go together, as KL and tokens of answers do: 20,000 samples of 50 answers."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, (20000, 50)).astype(float)
    totals = lengths * rng.gamma(2.0, 1.0, lengths.shape)
    ratios = totals.sum(1) / lengths.sum(1)
    errors = [measures.clustered(t, range(50), n)[1] for t, n in zip(totals[:500], lengths[:500], strict=True)]
    assert np.mean(errors) == pytest.approx(ratios.std(), rel=0.06)


def test_of_kl() -> None:
    answers = [answer(0, [1, 2]), answer(1, [3, 4, 5, 6])]
    found = measures.of_kl("start", np.array([1.0, 2.0, 0.5, 0.5, 0.5, 0.5]), answers)
    assert found["kl_start"] == pytest.approx(5 / 6)
    assert found["kl_start_sequence"] == pytest.approx((3 + 2) / 2)
    residual = 3 - 2 * 5 / 6  # and the other's is its negative
    assert found["kl_start_se"] == pytest.approx(math.sqrt(2 * 2 * residual**2) / 6)


# --- KL --------------------------------------------------------------------------------------------------------------


def test_kl_is_brute_force_over_the_vocabulary(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q, _ = models
    monkeypatch.setattr(divergence, "_WORKSPACE", 6 * kit.VOCAB * 2)  # tiles of two positions
    monkeypatch.setattr(divergence, "_BATCH_TOKENS", 12)  # batches of two, then one
    answers = [answer(0, [3, 4, 5]), answer(1, [9]), answer(2, [11, 12, 13, 14, 2], True)]
    sequences = [one.sequence for one in answers]
    hidden = [divergence.hidden_states(model, sequences) for model in (p, q)]
    found = divergence.token_kl(p, hidden[0], q, hidden[1])
    expected = []
    for one in answers:
        ids = torch.tensor([[*one.prompt_ids, *one.ids]])
        with torch.no_grad():
            ours, theirs = (model.double()(ids).logits[0].log_softmax(-1) for model in (p, q))
        kl = (ours.exp() * (ours - theirs)).sum(-1)
        expected += kl[len(one.prompt_ids) - 1 : -1].tolist()
    for model in (p, q):
        model.float()
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert divergence.token_kl(p, hidden[0], p, hidden[0]).max() < 1e-6


def test_sampled_kl_is_the_plain_estimators_mean_with_less_noise(models: Any) -> None:
    """Rao-Blackwell: the same expectation as mean log p(y)/q(y)."""
    p, q, tokenizer = models
    answers = sample(p, tokenizer, [[7, 8]], Sampling(per_prompt=600, max_new_tokens=3, batch=600), seed=5)
    sequences = [one.sequence for one in answers]
    hidden = [divergence.hidden_states(model, sequences) for model in (p, q)]
    exact = divergence.token_kl(p, hidden[0], q, hidden[1])
    labels = torch.tensor([token for one in answers for token in one.ids])
    logps = [
        divergence._log_probs(model, h, kit.VOCAB).gather(1, labels[:, None])[:, 0]
        for model, h in zip((p, q), hidden, strict=True)
    ]
    ids = [i for i, one in enumerate(answers) for _ in one.ids]
    plain = np.bincount(ids, (logps[0] - logps[1]).detach().numpy())
    smooth = np.bincount(ids, exact)
    error = math.hypot(plain.std(), smooth.std()) / math.sqrt(len(answers))
    assert abs(plain.mean() - smooth.mean()) < 3 * error
    assert smooth.std() < 0.5 * plain.std()


def test_heads_of_two_sizes_are_compared_over_the_tokens_of_both(models: Any, tmp_path: Path) -> None:
    p, _, _ = models
    wider = kit.model_of(kit.save_model(tmp_path, seed=1))
    wider.resize_token_embeddings(kit.VOCAB + 5)
    sequences = [answer(0, [3, 4]).sequence]
    hidden = [divergence.hidden_states(model, sequences) for model in (p, wider)]
    assert divergence.token_kl(p, hidden[0], wider, hidden[1]).max() < 1e-5


# --- sampling --------------------------------------------------------------------------------------------------------


def test_samples_depend_on_their_seed_alone(models: Any) -> None:
    model, _, tokenizer = models
    asked = ([[7, 8, 9], [7], [8, 9]], Sampling(per_prompt=2, max_new_tokens=4, batch=4))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(model, tokenizer, *asked, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0  # would be greedy
    assert sample(model, tokenizer, *asked, seed=3) == first
    assert model.generation_config.top_k == 1, "as it was"
    model.generation_config.top_k, model.generation_config.repetition_penalty = None, None
    assert sample(model, tokenizer, *asked, seed=4) != first
    assert [one.prompt for one in first] == [0, 0, 1, 1, 2, 2]
    assert all(one.prompt_ids == asked[0][one.prompt] for one in first)
    assert all(1 <= len(one.ids) <= 4 for one in first)


def test_samples_are_of_the_model(models: Any) -> None:
    """First tokens after one prompt, left-padded beside a longer one, come as often as the softmax says."""
    model, _, tokenizer = models
    sampling = Sampling(per_prompt=4000, max_new_tokens=1, batch=8000, temperature=2.0)
    drawn = [one.ids[0] for one in sample(model, tokenizer, [[7, 8], [9, 9, 9, 9]], sampling, seed=0) if not one.prompt]
    with torch.no_grad():
        expected = (model(torch.tensor([[7, 8]])).logits[0, -1] / 2).softmax(-1).numpy()
    shares = np.bincount(drawn, minlength=kit.VOCAB) / len(drawn)
    assert np.abs(shares - expected).max() < 5 * math.sqrt(expected.max() / len(drawn))


def test_an_answer_ends_at_the_first_end(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, tokenizer = models
    end = tokenizer.eos_token_id
    drawn = torch.tensor([[7, 4, end, 0, 0], [7, 4, 5, 6, 6], [7, end, 0, 0, 0]])
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: drawn)
    found = sample(model, tokenizer, [[7], [7], [7]], Sampling(max_new_tokens=4), seed=0)
    assert [(one.ids, one.words, one.ended) for one in found] == [
        ([4, end], [4], True),
        ([4, 5, 6, 6], [4, 5, 6, 6], False),
        ([end], [], True),
    ]


# --- degenerate ------------------------------------------------------------------------------------------------------

HEALTHY = {"empty": 0.0, "endless": 0.0, "repetition": 0.0, "reward_accuracy": 0.9, "chosen_displacement_token": -5.0}


@pytest.mark.parametrize(
    ("changes", "start", "reason"),
    [
        ({}, {}, None),
        ({"endless": 0.6}, {"endless": 0.1}, "60% of the answers do not end"),
        ({"endless": 0.9}, {"endless": 0.5}, None),  # so were the start model's
        ({"empty": 0.7}, {}, "70% of the answers are empty"),
        ({"repetition": 0.8}, {"repetition": 0.1}, "80% of the 4-grams of an answer are repeats"),
        ({"reward_accuracy": 0.5}, {}, "reward accuracy 0.50 at chance, chosen tokens lost 5.0 nats each"),
        ({"reward_accuracy": 0.5, "chosen_displacement_token": -1.0}, {}, None),
    ],
)
def test_degenerate(changes: dict[str, float], start: dict[str, float], reason: str | None) -> None:
    assert degenerate.reasons({**HEALTHY, **changes}, start) == ([] if reason is None else [reason])


# --- scorers ---------------------------------------------------------------------------------------------------------


def test_a_function_by_module_and_by_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
        "def score(prompts, answers, rows):\n    return [A(len(a)).x for a in answers]\n"
        "def short(prompts, answers, rows):\n    return [1]\n"
        "def nan(prompts, answers, rows):\n    return [float('nan') for _ in answers]\n"
        "def one(prompts, answers, rows):\n    return 0.5\n"
        "def none(prompts, answers, rows):\n    return [None for _ in answers]\n"
        "number = 1\n"
    )
    file = str(tmp_path / "mine.py")
    assert scorer.load(f"{file}:score")(["p", "q"], ["ab", "c"], [{}, {}]) == [2.0, 1.0]
    right = scorer.load("fastdpo.study.demo_study:right")
    assert right(["sort nine two :"] * 2, ["two nine", "nine two"], [{}, {}]) == [1.0, 0.0]
    for name, message in (
        ("short", "one number an answer, 2, got 1"),
        ("nan", "finite numbers, got nan for 'ab'"),
        ("one", "a list of numbers, got 0.5"),
        ("none", r"a list of numbers, got \[None, None\]"),
    ):
        with pytest.raises(StudyError, match=message):
            scorer.load(f"{file}:{name}")(["p", "q"], ["ab", "c"], [{}, {}])
    for name, message in ((f"{file}:other", "other"), (f"{file}:number", "is no function"), ("no.such:f", "No module")):
        with pytest.raises(StudyError, match=f"scorer: .*{message}"):
            scorer.load(name)


def test_a_reward_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = kit.demo_task.tokenizer()
    small = {"vocab_size": kit.VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    settings = LlamaConfig(**small, num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForSequenceClassification(settings).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = scorer.load(str(tmp_path))(["sort one two :", "sort :"], [" one two", " two"], [{}, {}])
    for text, score in zip(("sort one two : one two", "sort : two"), found, strict=True):
        with torch.no_grad():
            assert score == pytest.approx(float(model(**tokenizer(text, return_tensors="pt")).logits), abs=1e-5)
    settings.num_labels = 2
    LlamaForSequenceClassification(settings).save_pretrained(tmp_path)
    with pytest.raises(StudyError, match="has 2 outputs"):
        scorer.load(str(tmp_path))(["p"], ["a"], [{}])


def test_what_is_not_finite_is_none() -> None:
    from fastdpo.study.training import finite

    assert [finite(x) for x in (1, 0.5, None, float("nan"), float("-inf"))] == [1.0, 0.5, None, None, None]
