"""One cell: what is trained and measured is what its settings say, alone or after others."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import cache_kit as kit
import numpy as np
import pytest
import study_kit
import torch

from fastdpo.study import results, tokens
from fastdpo.study.cell_run import Lab
from fastdpo.study.cells import Cell
from fastdpo.study.errors import StudyError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PARAMETERIZATIONS = ["ratio", "posterior", "likelihood"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_kit.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def lab(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    references = {
        "start": "policy",
        "better": str(world / "better"),
        "foreign": str(world / "foreign"),
        "none": None,
    }
    folder = tmp_path_factory.mktemp("study") / "DIR"
    changes: dict[str, Any] = {"references": references, "parameterizations": PARAMETERIZATIONS, "save_models": True}
    return study_kit.lab(world, folder, "better", "foreign", **changes)


def logps(folder: Path, rows: list[dict[str, str]], side: str, with_prompt: bool = True) -> np.ndarray:
    """Sequence logps of completions by the model's own logits, end of text included."""
    model, tokenizer = kit.model_of(str(folder)), kit.tokenizer_of(str(folder))
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"] if with_prompt else [tokenizer.eos_token_id]
        completion = [*tokenizer(row[side])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            table = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        found.append(sum(float(table[len(prompt) - 1 + i, token]) for i, token in enumerate(completion)))
    return np.array(found)


@pytest.mark.parametrize(
    ("parameterization", "reference"),
    [("ratio", "better"), ("likelihood", "better"), ("ratio", "foreign"), ("posterior", "better"), ("ratio", "none")],
)
def test_measures_are_those_of_the_trained_model(lab, world, parameterization, reference):
    cell = Cell("sigmoid", parameterization, reference, 0.5, 3)
    record = lab.cell(cell)
    measures, rows = record["measures"], kit.rows(14)[8:]
    trained = lab.folder / "models" / cell.id
    chosen, rejected = (logps(trained, rows, side) for side in tokens.SIDES)
    start = logps(world / "policy", rows, "chosen")
    margin = chosen - rejected
    without = parameterization == "posterior" or reference == "none"
    if not without:
        of = [logps(world / reference, rows, side, parameterization == "ratio") for side in tokens.SIDES]
        margin = margin - (of[0] - of[1])
    assert measures["reward_margin"] == pytest.approx(0.5 * margin.mean(), abs=1e-4)
    assert measures["reward_accuracy"] == (margin > 0).mean()
    assert measures["chosen_displacement"] == pytest.approx((chosen - start).mean(), abs=1e-4)
    assert measures["kl_start"] > 0 and measures["kl_start_se"] > 0
    assert (measures["kl_reference"] is None) == (without or reference == "foreign")
    if measures["kl_reference"] is not None:
        assert measures["kl_reference"] > measures["kl_start"], "another model altogether"
    answers = [json.loads(line) for line in (lab.output / f"{cell.id}.answers.jsonl").read_text().splitlines()]
    assert [one["prompt"] for one in answers] == [row["prompt"] for row in rows[:4]]
    assert [one["score"] for one in answers] == [len(one["answer"].split()) for one in answers]
    assert measures["quality"] == np.mean([one["score"] for one in answers])
    assert [one["step"] for one in record["curves"]] == [1, 2]
    assert record["degenerate"] == []


def test_the_first_step_asks_the_cells_reference(lab, world):
    """Before the first update the logged margin is the start model's against the reference."""
    train = kit.rows(14)[:8]
    for name, with_prompt in (("ratio", True), ("likelihood", False)):
        (first, _) = lab.cell(Cell("sigmoid", name, "better", 1.0, 0))["curves"]
        start, of = (
            [logps(world / model, train, side, prompt) for side in tokens.SIDES]
            for model, prompt in (("policy", True), ("better", with_prompt))
        )
        margins = (start[0] - start[1]) - (of[0] - of[1])
        pairs = [(margins[i] + margins[j]) / 2 for i in range(8) for j in range(i)]  # batches of two rows
        assert np.abs(np.array(pairs) - first["rewards/margins"]).min() < 1e-4


def test_a_cell_depends_on_its_settings_and_seed_alone(lab):
    cell = Cell("sigmoid", "ratio", "start", 0.1, 0)
    timing = ("seconds", "train_seconds")

    def run(of: Cell) -> dict[str, Any]:
        return {name: value for name, value in lab.cell(of).items() if name not in timing}

    first = run(cell)
    torch.manual_seed(99)
    other = run(cell._replace(seed=1))
    assert run(cell) == first
    assert other["curves"] != first["curves"], "another order"
    assert run(cell._replace(loss_type="ipo"))["curves"] != first["curves"]


def test_the_optimizer_is_gone_before_anything_is_measured(lab, monkeypatch):
    """Its state is twice the weights, where the measures load other models."""
    alive = []

    def measure(*_: Any) -> Any:
        alive.extend(type(one) for one in gc.get_objects() if issubclass(type(one), torch.optim.Optimizer))
        return {}, []

    monkeypatch.setattr(lab, "measure", measure)
    lab.cell(Cell("sigmoid", "ratio", "start", 0.1, 0))
    assert alive == []


def test_nothing_is_measured_under_the_trainers_autocast(world, tmp_path, monkeypatch):
    """bf16=True, TRL's default; references are scored and sampled without."""
    lab = study_kit.lab(world, tmp_path / "DIR", training={**study_kit.TRAINING, "bf16": True})
    dtypes = []

    def measure(model: Any, *_: Any) -> Any:
        model.lm_head.register_forward_hook(lambda module, given, logits: dtypes.append(logits.dtype))
        model(torch.tensor([[3, 4]]))
        return {}, []

    monkeypatch.setattr(lab, "measure", measure)
    lab.cell(Cell("sigmoid", "ratio", "start", 0.1, 0))
    assert dtypes == [torch.float32]


def test_prompts_that_leave_no_room_are_an_error(world, tmp_path):
    with pytest.raises(StudyError, match="no held-out prompt leaves room for an answer in max_length 6 tokens"):
        study_kit.lab(world, tmp_path / "DIR", training={**study_kit.TRAINING, "max_length": 6})


def test_a_reference_is_measured_and_the_start_is_its_own(lab):
    start = results.read_json(lab.folder / "references" / "start.json")["measures"]
    assert start["kl_start"] == 0 and {"quality", "length", "repetition", "reward_accuracy"} <= set(start)
    better = results.read_json(lab.folder / "references" / "better.json")["measures"]
    assert better["quality"] != start["quality"]
    assert lab.speaks("better") and not lab.speaks("foreign")


def test_token_rows(lab, world):
    for cell in (Cell("sigmoid", "ratio", "better", 0.5, 9), Cell("sigmoid", "ratio", "foreign", 0.5, 9)):
        lab.cell(cell)
        path = lab.output / f"{cell.id}.tokens.npz"
        rows = tokens.load(path, lab.tokenizer, cell.beta)
        assert len(rows) == 2, "token_rows"
        expected = kit.rows(14)[8]
        assert rows[0].prompt == expected["prompt"] and rows[0].beta == 0.5
        assert " ".join(rows[0].chosen.tokens).split() == [*expected["chosen"].split(), lab.tokenizer.eos_token]
        side = rows[0].rejected
        assert len(side.tokens) == len(side.policy) == len(side.start)
        assert sum(side.start) == pytest.approx(logps(world / "policy", [expected], "rejected")[0], abs=1e-4)
        if cell.reference == "foreign":
            assert side.reference is None
        else:
            assert sum(side.reference) == pytest.approx(logps(world / "better", [expected], "rejected")[0], abs=1e-4)


def test_weights_that_are_not_finite(lab):
    model = kit.model_of(lab.config.policy)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    measures, reasons = lab.measure(model, Cell("sigmoid", "ratio", "start", 0.1, 0), [])
    assert reasons == ["loss or weights are not finite"]
    assert set(measures.values()) == {None} and "quality" in measures


def test_an_adapter(world, tmp_path):
    lab = study_kit.lab(world, tmp_path / "DIR", peft={"r": 4, "target_modules": ["q_proj", "v_proj"]})
    found = lab.cell(Cell("sigmoid", "ratio", "start", 0.1, 0))["measures"]
    # B of an adapter is 0 at first: two small steps move little, but they do
    assert 0 < found["kl_start"] < 0.5 and found["kl_reference"] == found["kl_start"]


def test_texts_of_tokens_join_to_the_text():
    """Byte pairs: the halves of a character show at its last token."""

    class Bytes:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    text = "é<b>ü"
    pieces = tokens._texts(list(text.encode()), Bytes())
    assert pieces == ["", "é", "<", "b", ">", "", "ü"] and "".join(pieces) == text
