"""Axolotl: a plugin. In the YAML:

    plugins:
      - fastdpo.integrations.axolotl.FastDPOPlugin
    fastdpo_reference_cache: refs        # optional, rl: dpo and ipo: a folder that `fastdpo cache build` made
    fastdpo_grad_tol: auto               # optional; fastdpo_workspace_mb and fastdpo_backend too

`rl: dpo`, `ipo` and `kto` are TRL's trainers underneath: the plugin patches TRL (`fastdpo.integrations.trl.patch`)
before the model is loaded, and undoes that after the training. Without `rl` (SFT) the model gets a fused head
(`fastdpo.integrations.transformers.fused_head`). What it cannot speed up, or what would run in its place, raises.

Written against Axolotl's published plugin interface (BasePlugin, PluginManager, HFRLTrainerBuilder), and tested on a
stand-in with that interface, as Axolotl pins other versions of torch and TRL than this package is tested with. The
installed TRL has to be one that `fastdpo.integrations.trl` knows; `patch()` raises otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or importlib.util.find_spec("axolotl") is None:
    BasePlugin = object
else:
    from axolotl.integrations.base import BasePlugin

_TRL = ("dpo", "ipo", "kto")
_PAIRS = ("dpo", "ipo")
_HEAD = ("grad_tol", "workspace_mb", "backend")
# Keys of Axolotl's that put another loss in the place of the head: in preference training, and in SFT
_OTHERS_OF_PAIRS = ("dpo_use_liger_kernel",)
_OTHERS_OF_SFT = (
    *("cut_cross_entropy", "liger_fused_linear_cross_entropy", "liger_cross_entropy", "chunked_cross_entropy"),
    "label_smoothing_factor",
)
_TRAINER = "fastdpo.integrations.axolotl.CachedDPOTrainer"

# Of the reference cache, from the plugin to the trainer that Axolotl builds: it hands its trainers no keys
_reference: dict[str, Any] = {}


class FastDPOPlugin(BasePlugin):  # type: ignore[misc, valid-type]
    """fastdpo's head in Axolotl's DPO, IPO, KTO and SFT training; the module says how, and its YAML keys.

    Raises (in the hooks, which Axolotl calls):
        ValueError: an `rl` whose trainer makes logits by itself; another key that replaces the loss; a
            `fastdpo_reference_cache` without `rl: dpo` or `ipo`, or beside a `trainer_cls`; `fastdpo_reference` alone.
        As `fastdpo.integrations.trl.patch` and `fused_head`.
    """

    def get_input_args(self) -> str:
        """The pydantic model of the plugin's keys, which Axolotl merges into its own."""
        return "fastdpo.integrations.axolotl.FastDPOArgs"

    def register(self, cfg: Any) -> None:
        """Before the config is validated: a cache needs a trainer class, which is Axolotl's key `trainer_cls`.

        `get_trainer_cls` would not do: Axolotl's RL builder then passes neither model nor reference.
        """
        cache = cfg.get("fastdpo_reference_cache")
        if cache is None:
            if cfg.get("fastdpo_reference") is not None:
                raise ValueError(
                    f"fastdpo_reference: {cfg.get('fastdpo_reference')!r} without a fastdpo_reference_cache"
                )
            return
        if _rl(cfg) not in _PAIRS:
            raise ValueError(f"fastdpo_reference_cache: needs rl: {' or '.join(_PAIRS)}, got {cfg.get('rl')!r}")
        if cfg.get("trainer_cls") not in (None, _TRAINER):
            raise ValueError(f"fastdpo_reference_cache: not with trainer_cls, {cfg.get('trainer_cls')!r}")
        cfg["trainer_cls"] = _TRAINER

    def pre_model_load(self, cfg: Any) -> None:
        """Before the policy, and before the reference."""
        rl = _rl(cfg)
        if rl is not None and rl not in _TRL:
            raise ValueError(
                f"rl: {rl!r} computes logits in a trainer of its own, which FastDPOPlugin does not replace; expected "
                f"{', '.join(_TRL)} or none (SFT)"
            )
        for name in _OTHERS_OF_SFT if rl is None else _OTHERS_OF_PAIRS:
            if cfg.get(name):
                raise ValueError(
                    f"{name}: {cfg.get(name)!r} puts another loss in the place of fastdpo's head; unset it"
                )
        if rl is None:
            return
        # Not at the module's head: Axolotl logs an ImportError of a plugin's module, and trains without the plugin
        from . import trl

        trl.patch(**_head_keywords(cfg))
        _reference.clear()
        if cfg.get("fastdpo_reference_cache") is not None:
            if cfg.get("trainer_cls") != _TRAINER:
                raise ValueError(f"fastdpo_reference_cache: this Axolotl needs trainer_cls: {_TRAINER} beside it")
            _reference.update(
                reference_cache=cfg.get("fastdpo_reference_cache"), reference=cfg.get("fastdpo_reference")
            )

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """After adapters, before the trainer. A reward model has no LM head."""
        if _rl(cfg) is None and not cfg.get("reward_model") and not cfg.get("process_reward_model"):
            from .transformers import fused_head

            fused_head(model, **_head_keywords(cfg))

    def post_train_unload(self, cfg: Any) -> None:
        """TRL as it was."""
        if _rl(cfg) is not None:
            from . import trl

            trl.unpatch()
            _reference.clear()


def _rl(cfg: Any) -> str | None:
    """The key `rl`: a string, after validation an enum of strings."""
    rl = cfg.get("rl")
    return getattr(rl, "value", rl)


def _head_keywords(cfg: Any) -> dict[str, Any]:
    return {name: value for name in _HEAD if (value := cfg.get(f"fastdpo_{name}")) is not None}


def __getattr__(name: str) -> Any:
    """What needs pydantic, TRL or Axolotl, made when it is asked for."""
    if name not in ("FastDPOArgs", "CachedDPOTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _arguments() if name == "FastDPOArgs" else _trainer()
    globals()[name] = made
    return made


def _arguments() -> Any:
    from pydantic import create_model

    keys: dict[str, Any] = {
        "fastdpo_grad_tol": (float | str | None, None),
        "fastdpo_workspace_mb": (float | None, None),
        "fastdpo_backend": (str | None, None),
        "fastdpo_reference_cache": (str | None, None),
        "fastdpo_reference": (str | None, None),
    }
    return create_model("FastDPOArgs", __doc__="Keys of `FastDPOPlugin`.", __module__=__name__, **keys)


def _trainer() -> Any:
    axolotl = importlib.import_module("axolotl.core.trainers.dpo.trainer")
    from .trl import FastDPOTrainer

    class CachedDPOTrainer(FastDPOTrainer, axolotl.AxolotlDPOTrainer):  # type: ignore[misc, name-defined]
        """AxolotlDPOTrainer that reads its reference from the cache of `fastdpo_reference_cache`.

        Without an adapter Axolotl has loaded a reference all the same, and it is dropped here.
        """

        def __init__(self, model: Any, ref_model: Any = None, **keywords: Any) -> None:
            super().__init__(model, **_reference, **keywords)

    return CachedDPOTrainer
