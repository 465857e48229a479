"""A study's settings: YAML -> StudyConfig, checked; one clear error each. `command.EXAMPLE` explains them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cache.model import DTYPES
from ..inputs import check_flag
from ..losses.keywords import PARAMETERIZATIONS
from ..losses.table import ALIASES, LOSSES, TRL_LOSSES
from ..names import did_you_mean
from ..options import check_number
from .errors import StudyError
from .mapping import build

ROLES = ("start", "stronger", "weaker", "none", "other")
START = "start"  # the policy before training, as a reference; always in the study's cache
# sft asks no reference anything
LOSS_TYPES = tuple(name for name in TRL_LOSSES if "parameterization" in LOSSES[name].uses)


@dataclass(frozen=True)
class ReferencePolicy:
    """A reference, by the name that the study's cells and its cache have for it."""

    name: str
    model: str | None = None  # folder or hub id; None: no reference
    role: str = ""  # of ROLES; "": start for the policy itself, none for None, else other
    dtype: str | None = None  # it is scored in; None: the policy's
    tokenizer: str | None = None  # None: the model's own

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+]*", self.name):
            raise StudyError(f"references: expected names of letters, digits, '.', '_' and '+', got {self.name!r}")
        if self.name == "none" and self.model is not None:  # as the report calls runs without one
            raise StudyError(f"references.none: stands for no reference, expected null, got {self.model!r}")
        if self.role not in ("", *ROLES):
            raise StudyError(
                f"references.{self.name}.role: unknown {self.role!r}, expected one of {', '.join(ROLES)}"
                f"{did_you_mean(self.role, ROLES)}"
            )
        if (self.role == "none") != (self.model is None) and self.role:
            raise StudyError(f"references.{self.name}.role: {self.role!r} contradicts model {self.model!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise StudyError(f"references.{self.name}.dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True)
class Data:
    """Preference pairs in .jsonl files, as `fastdpo train --data` reads them."""

    train: str
    held_out: str | None = None  # another file; its prompts must not be in train
    held_out_share: float | None = None  # or this share of train's prompts, chosen by a hash of prompt and seed
    seed: int = 0  # of that choice
    train_rows: int | None = None  # only the first ones
    held_out_rows: int | None = None

    def __post_init__(self) -> None:
        if (self.held_out is None) == (self.held_out_share is None):
            raise StudyError("data: expected held_out (a file) or held_out_share (a number), one of the two")
        if self.held_out_share is not None:
            check_number("held_out_share", self.held_out_share, above=0)
            if self.held_out_share >= 1:
                raise StudyError(f"held_out_share: expected a number below 1, got {self.held_out_share!r}")
        _integer("seed", self.seed, 0)
        for name in ("train_rows", "held_out_rows"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 2)


@dataclass(frozen=True)
class Sampling:
    """Answers of a policy to held-out prompts: drawn from softmax(logits / temperature), nothing cut off."""

    prompts: int = 100  # the first ones of the held-out pairs
    per_prompt: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0  # at 1, KL is measured where the policy itself goes
    batch: int = 32  # answers at once

    def __post_init__(self) -> None:
        for name in ("prompts", "per_prompt", "max_new_tokens", "batch"):
            _integer(name, getattr(self, name), 2 if name == "prompts" else 1)
        check_number("temperature", self.temperature, above=0)


@dataclass(frozen=True)
class StudyConfig:
    """All that a study's results depend on, and how it is run."""

    policy: str  # folder or hub id: where every run starts
    data: Data
    references: tuple[ReferencePolicy, ...]
    betas: tuple[float, ...]
    parameterizations: tuple[str, ...] = PARAMETERIZATIONS
    loss_types: tuple[str, ...] = ("sigmoid",)
    seeds: tuple[int, ...] = (0,)
    dtype: str = "float32"  # of the policy's weights
    training: dict[str, Any] = field(default_factory=dict)  # keywords of trl.DPOConfig
    peft: dict[str, Any] | None = None  # keywords of peft.LoraConfig; None: all weights are trained
    sampling: Sampling = field(default_factory=Sampling)
    scorer: str | None = None  # "module:function", or a reward model: folder or hub id; None: reward accuracy
    quality: str | None = None  # what the scorer measures, in words
    higher_is_better: bool = True
    workers: int | str = "auto"  # processes; auto: one a GPU, without one a core each
    threads: int | str = "auto"  # of a worker; auto: the cores over the workers
    save_models: bool = False  # keep each cell's model in DIR/models
    token_rows: int = 32  # held-out pairs kept for the token page
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise StudyError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        _check_grid(self)
        for name in ("workers", "threads"):
            if getattr(self, name) != "auto":
                _integer(name, getattr(self, name), 1, " or auto")
        for name in ("higher_is_better", "save_models", "trust_remote_code"):
            check_flag(name, getattr(self, name))
        _integer("token_rows", self.token_rows, 1)

    def reference(self, name: str) -> ReferencePolicy:
        """One of the references, by name."""
        return next(one for one in self.references if one.name == name)

    def with_paths(self, change: Callable[[str], str]) -> StudyConfig:
        """The same with `change` applied to everything that may be a file or folder."""

        def changed(path: str | None) -> str | None:
            return None if path is None else change(path)

        data = dataclasses.replace(self.data, train=change(self.data.train), held_out=changed(self.data.held_out))
        references = tuple(
            dataclasses.replace(one, model=changed(one.model), tokenizer=changed(one.tokenizer))
            for one in self.references
        )
        scorer = self.scorer
        if scorer is not None and (":" not in scorer or scorer.rpartition(":")[0].endswith(".py")):
            file, colon, function = scorer.rpartition(":") if ":" in scorer else (scorer, "", "")
            scorer = change(file) + colon + function
        return dataclasses.replace(self, policy=change(self.policy), data=data, references=references, scorer=scorer)


def read(path: Path) -> StudyConfig:
    """The settings of a YAML file. A path in it that exists below the file's own folder is that; others stay.

    Raises:
        StudyError: no such file, not YAML, or settings that cannot be.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's numbers: PyYAML takes 1e-6 for text."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789"
    )
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: not YAML: {error}") from None

    def resolved(name: str) -> str:
        beside = path.parent / name
        return str(beside.resolve()) if beside.exists() else name

    try:
        return from_dict(given).with_paths(resolved)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None


def from_dict(given: Any) -> StudyConfig:
    """The settings of a mapping as YAML or `to_dict` gives it; checked.

    Raises:
        StudyError: an unknown name (the nearest is suggested), one that is missing, or a value out of range.
    """
    if isinstance(given, dict) and given.get("references") is not None:
        given = {**given, "references": _references(given["references"], given.get("policy"))}
    return build(StudyConfig, given)


def of_study(study: dict[str, Any]) -> StudyConfig:
    """The settings in a study.json."""
    return from_dict({one.name: study[one.name] for one in dataclasses.fields(StudyConfig)})


def to_dict(config: StudyConfig) -> dict[str, Any]:
    """What `from_dict` reads, as JSON and YAML can hold it."""
    return dataclasses.asdict(config)


def _references(given: Any, policy: Any) -> list[Any]:
    """name -> model, null or a mapping; or what `to_dict` made of that. The policy is `policy`, or its own name."""
    if isinstance(given, dict):
        items = [
            {"name": str(name), **(value if isinstance(value, dict) else {"model": value})}
            for name, value in given.items()
        ]
    elif isinstance(given, (list, tuple)):
        items = [dict(one) if isinstance(one, dict) else one for one in given]
    else:
        raise StudyError(f"references: expected names with a model each, or null for none, got {given!r}")
    for one in items:
        if not isinstance(one, dict):
            raise StudyError(f"references: expected names with a model each, got {one!r}")
        if one.get("model") == "policy":
            one["model"] = policy
        if not one.get("role"):
            one["role"] = "none" if one.get("model") is None else START if one["model"] == policy else "other"
    return items


def _check_grid(config: StudyConfig) -> None:
    """Raise StudyError for a grid that cannot be run, or that holds a cell twice."""
    _known("parameterizations", config.parameterizations, PARAMETERIZATIONS)
    _known("loss_types", config.loss_types, LOSS_TYPES)
    for beta in config.betas:
        check_number("betas", beta, above=0)
    for seed in config.seeds:
        _integer("seeds", seed, 0)
    if not config.references:
        raise StudyError("references: expected at least one name with a model, or null for none")
    shown = {
        "betas": [f"{beta:g}" for beta in config.betas],
        "references": [one.name for one in config.references],
        **{name: list(getattr(config, name)) for name in ("seeds", "parameterizations", "loss_types")},
    }
    for name, values in shown.items():
        if len(set(values)) < len(values):
            raise StudyError(f"{name}: expected each once, got {', '.join(map(str, values))}")
    for one in config.references:
        if one.name == START and (one.model != config.policy or one.dtype not in (None, config.dtype)):
            raise StudyError(f"references.start: is the policy itself, expected model {config.policy!r} in its dtype")
        if one.role == START and one.model != config.policy:
            raise StudyError(f"references.{one.name}.role: start is the policy itself, got model {one.model!r}")


def _known(name: str, values: Sequence[str], known: Iterable[str]) -> None:
    for value in values:
        if value not in known:
            raise StudyError(
                f"{name}: unknown {value!r}, expected some of {', '.join(known)}{did_you_mean(value, known, ALIASES)}"
            )


def _integer(name: str, value: Any, least: int, more: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise StudyError(f"{name}: expected a whole number of at least {least}{more}, got {value!r}")


def local(path: str, folder: Path) -> str:
    """How a study in `folder` writes down a path: within it relative, outside absolute, a hub id as it is."""
    if not os.path.exists(path):
        return path
    whole, root = Path(path).resolve(), folder.resolve()
    return str(whole.relative_to(root)) if whole.is_relative_to(root) else str(whole)


def opened(path: str, folder: Path) -> str:
    """What `local` wrote down, as a path to open."""
    within = folder / path
    return str(within) if within.exists() else path
