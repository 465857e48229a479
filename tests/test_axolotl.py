"""The Axolotl plugin, on a stand-in with the interface of its published source: its hooks, in its order."""

from __future__ import annotations

import enum
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("pydantic")

import cache_kit as kit
import docs_kit
import pydantic
import trl
import yaml
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, KTOConfig
from trl_kit import assert_same_run, train

from fastdpo.cache import MissingEntry, ReferenceCache
from fastdpo.integrations import trl as trl_integration
from fastdpo.integrations.transformers import FusedOutput

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PLUGIN = "fastdpo.integrations.axolotl.FastDPOPlugin"
PAIRS = kit.rows(6)


class RLType(str, enum.Enum):
    DPO, IPO, KTO, ORPO = "dpo", "ipo", "kto", "orpo"


class DictDefault(dict):
    """A config: keys as attributes, None where missing."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


class BasePlugin:
    """The hooks that the stand-in calls; a real one has more."""

    def register(self, cfg):
        pass

    def get_input_args(self):
        return None

    def pre_model_load(self, cfg):
        pass

    def post_model_load(self, cfg, model):
        pass

    def get_trainer_cls(self, cfg):
        return None

    def post_trainer_create(self, cfg, trainer):
        pass

    def post_train_unload(self, cfg):
        pass


class AxolotlDPOTrainer(DPOTrainer):
    tag_names = ["axolotl", "dpo"]  # noqa: RUF012

    def __init__(self, *args, dataset_tags=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.dataset_tags = dataset_tags
        self.model_accepts_loss_kwargs = False


@pytest.fixture(autouse=True)
def axolotl(monkeypatch) -> ModuleType:
    """The package's stand-in, and the plugin's module as it is where Axolotl is installed."""
    names = ["axolotl", "axolotl.integrations", "axolotl.integrations.base", "axolotl.core", "axolotl.core.trainers"]
    for name in (*names, "axolotl.core.trainers.dpo", "axolotl.core.trainers.dpo.trainer"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin
    sys.modules["axolotl.core.trainers.dpo.trainer"].AxolotlDPOTrainer = AxolotlDPOTrainer
    monkeypatch.delitem(sys.modules, "fastdpo.integrations.axolotl", raising=False)
    before = trl_integration._current()
    yield importlib.import_module("fastdpo.integrations.axolotl")
    trl_integration.unpatch()
    assert trl_integration._current() == before
    sys.modules.pop("fastdpo.integrations.axolotl", None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return kit.save_model(tmp_path_factory.mktemp("tiny"))


def load_plugin(name: str) -> Any:
    module, cls = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), cls)()


def get_cls(name: str) -> Any:
    module, cls = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), cls)


def axolotl_train(settings: dict[str, Any], tiny: str, output: Path) -> Any:
    """`axolotl train`: register, validate, load, build, train, unload. Returns (trainer, references loaded)."""
    cfg = DictDefault(settings, plugins=[PLUGIN])
    plugin = load_plugin(cfg.plugins[0])
    plugin.register(cfg)
    arguments = get_cls(plugin.get_input_args())
    known = {"plugins": Any, "rl": Any, "adapter": Any, "trainer_cls": Any, "reward_model": Any}
    known |= {name: Any for name in cfg if not name.startswith("fastdpo_")}
    base = pydantic.create_model("AxolotlInputConfig", **{name: (kind, None) for name, kind in known.items()})
    merged = type("AxolotlInputConfig", (base, arguments), {"model_config": {"extra": "forbid"}})
    cfg = DictDefault(merged(**cfg).model_dump(exclude_none=True))
    if cfg.rl:
        cfg["rl"] = RLType(cfg.rl)
    plugin.pre_model_load(cfg)
    model = kit.model_of(tiny)
    plugin.post_model_load(cfg, model)
    reference = None
    if cfg.rl and not cfg.adapter:
        plugin.pre_model_load(cfg)
        reference = kit.model_of(tiny)
        plugin.post_model_load(cfg, reference)
    fixed = dict(max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, seed=1)
    fixed |= dict(save_strategy="no", report_to="none", disable_tqdm=True, bf16=False, use_cpu=True)
    if not cfg.rl:
        tokenizer = kit.tokenizer_of(tiny)
        ids = [tokenizer(pair["prompt"])["input_ids"] for pair in PAIRS]
        data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
        trainer = Trainer(model, TrainingArguments(str(output), **fixed), train_dataset=data)
    else:
        trainer_cls, trainer_args = plugin.get_trainer_cls(cfg), []
        if trainer_cls is None:
            dpo = cfg.rl in (RLType.DPO, RLType.IPO)
            trainer_cls, trainer_args = (AxolotlDPOTrainer, [model, reference]) if dpo else (trl.KTOTrainer, [model])
            if cfg.trainer_cls:
                trainer_cls = get_cls(cfg.trainer_cls)
        rows = PAIRS
        if cfg.rl == RLType.KTO:
            rows = [
                {"prompt": p["prompt"], "completion": p[s], "label": s == "chosen"}
                for p in PAIRS
                for s in ("chosen", "rejected")
            ]
        config = KTOConfig if cfg.rl == RLType.KTO else DPOConfig
        trainer = trainer_cls(
            *trainer_args,
            args=config(output_dir=str(output), **fixed),
            train_dataset=Dataset.from_list(rows),
            callbacks=[],
            processing_class=kit.tokenizer_of(tiny),
        )
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    plugin.post_train_unload(cfg)
    return trainer


@pytest.fixture
def rows_scored(monkeypatch) -> list[int]:
    """How many rows fastdpo's head has scored, call by call."""
    rows: list[int] = []
    spied = trl_integration.TokenLogpFunction.apply
    monkeypatch.setattr(
        trl_integration.TokenLogpFunction, "apply", lambda self, *a: rows.append(len(a[0])) or spied(self, *a)
    )
    return rows


def test_dpo_trains_as_with_trl(tiny, tmp_path, rows_scored):
    theirs = train(DPOTrainer, tiny, tmp_path / "trl")
    assert not rows_scored
    mine = axolotl_train({"rl": "dpo", "fastdpo_workspace_mb": 8, "fastdpo_grad_tol": "auto"}, tiny, tmp_path / "ax")
    assert type(mine) is AxolotlDPOTrainer
    assert len(rows_scored) >= 3
    assert_same_run(theirs, mine)


def test_keys_reach_the_head(axolotl, tiny):
    plugin = axolotl.FastDPOPlugin()
    plugin.pre_model_load(
        DictDefault(rl="dpo", fastdpo_workspace_mb=8.0, fastdpo_grad_tol=0.0, fastdpo_backend="eager")
    )
    keywords = trl.kernels.ChunkedLogProbFunction.head_keywords
    assert keywords == {"workspace_mb": 8.0, "grad_tol": 0.0, "backend": "eager"}
    with pytest.raises(ValueError, match="backend: unknown backend"):
        plugin.pre_model_load(DictDefault(rl="dpo", fastdpo_backend="cuda"))


def test_kto(tiny, tmp_path, rows_scored):
    trainer = axolotl_train({"rl": "kto"}, tiny, tmp_path)
    assert len(rows_scored) >= 3
    assert all("loss" in record for record in trainer.state.log_history[:3])


def test_reference_cache(tiny, tmp_path, monkeypatch, rows_scored):
    """With the settings that docs/trainers.md shows."""
    (page,) = docs_kit.blocks("docs/trainers.md", "yaml")
    settings = yaml.safe_load(page)
    assert settings["plugins"] == [PLUGIN] and settings["fastdpo_reference_cache"] == "refs"
    monkeypatch.chdir(tmp_path)
    cache = ReferenceCache(tmp_path / "refs")
    cache.build(tiny, kit.tokenizer_of(tiny), PAIRS, progress=False)
    theirs = train(DPOTrainer, tiny, tmp_path / "trl")
    mine = axolotl_train(settings, tiny, tmp_path / "ax")
    assert isinstance(mine, AxolotlDPOTrainer) and mine.ref_model is None
    assert len(rows_scored) == 3, "three steps, and no forward of a reference"
    assert_same_run(theirs, mine)
    (tmp_path / "empty").mkdir()
    other = ReferenceCache(tmp_path / "empty")
    other.build(tiny, kit.tokenizer_of(tiny), PAIRS[:2], progress=False)
    with pytest.raises(MissingEntry):
        axolotl_train({"rl": "dpo", "fastdpo_reference_cache": str(tmp_path / "empty")}, tiny, tmp_path / "ax2")


def test_sft(tiny, tmp_path):
    trainer = axolotl_train({}, tiny, tmp_path)
    ids = trainer.train_dataset[0]["input_ids"]
    assert isinstance(trainer.model(kit.torch.tensor([ids]), labels=kit.torch.tensor([ids])), FusedOutput)


def test_an_axolotl_that_registers_no_plugin(axolotl):
    with pytest.raises(ValueError, match="needs trainer_cls: fastdpo.integrations.axolotl.CachedDPOTrainer beside it"):
        axolotl.FastDPOPlugin().pre_model_load(DictDefault(rl="dpo", fastdpo_reference_cache="refs"))


def test_a_reward_model_is_left_alone(axolotl):
    model = SimpleNamespace()
    axolotl.FastDPOPlugin().post_model_load(DictDefault(reward_model=True), model)
    assert vars(model) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rl": "orpo"}, "rl: 'orpo' computes logits in a trainer of its own"),
        ({"rl": "dpo", "dpo_use_liger_kernel": True}, "dpo_use_liger_kernel: True puts another loss"),
        ({"cut_cross_entropy": True}, "cut_cross_entropy: True puts another loss"),
        ({"rl": "kto", "fastdpo_reference_cache": "refs"}, "fastdpo_reference_cache: needs rl: dpo or ipo, got 'kto'"),
        ({"rl": "dpo", "fastdpo_reference_cache": "refs", "trainer_cls": "a.B"}, "not with trainer_cls, 'a.B'"),
        ({"rl": "dpo", "fastdpo_reference": "base"}, "fastdpo_reference: 'base' without a fastdpo_reference_cache"),
    ],
)
def test_what_it_refuses(settings, message, tiny, tmp_path):
    with pytest.raises(ValueError, match=message):
        axolotl_train(settings, tiny, tmp_path)


def test_a_misspelt_key_is_axolotls_to_refuse(tiny, tmp_path):
    with pytest.raises(pydantic.ValidationError, match="fastdpo_grad_to"):
        axolotl_train({"rl": "dpo", "fastdpo_grad_to": 0}, tiny, tmp_path)


def test_without_axolotl(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "axolotl" or name == "fastdpo.integrations.axolotl":
            monkeypatch.delitem(sys.modules, name)
    module = importlib.import_module("fastdpo.integrations.axolotl")
    assert module.FastDPOPlugin.__mro__[1] is object
    module.FastDPOPlugin().pre_model_load(DictDefault(rl="dpo"))
    module.FastDPOPlugin().post_train_unload(DictDefault(rl="dpo"))
    with pytest.raises(ImportError, match="axolotl"):
        _ = module.CachedDPOTrainer
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        _ = module.Other
