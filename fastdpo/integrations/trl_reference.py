"""DPOTrainer whose reference is a cache: `reference_cache=`. No reference model is loaded, and none is asked.

And the three rewards of arXiv 2407.13709, in which the reference stands with the prompt, without it or not at all:
`parameterization=`. All three are TRL's own loss, on other reference logps.
"""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from typing import Any, cast
from unittest import mock

from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.utils import get_config_model_id

from ..cache import CacheError, NamedReference, ReferenceCache, record
from ..cache.columns import CHOSEN, REJECTED, speaks
from ..losses.keywords import check_keywords

_PRIOR = {CHOSEN: "ref_chosen_prior_logps", REJECTED: "ref_rejected_prior_logps"}  # as `attach` calls them


class CachedReferenceTrainer(DPOTrainer):
    """`trl.DPOTrainer` that reads its reference logps from a cache.

    Also without a cache: data sets that have the columns `ref_chosen_logps` and `ref_rejected_logps` are taken as they
    are with `precompute_ref_log_probs=True`, where TRL would compute them again.

    Args:
        reference_cache: a `fastdpo.cache.ReferenceCache`, or its folder.
        reference: name of the reference in it; None: the only one.
        parameterization: the reward (arXiv 2407.13709). "ratio": beta log p(y|x)/p_ref(y|x), DPO's. "posterior":
            beta log p(y|x); no reference is loaded or asked. "likelihood": beta log p(y|x)/p_ref(y), from a cache that
            was built with prior=True. The logged rewards are these.
        The others: `trl.DPOTrainer`. With a cache or the posterior, `ref_model` must be None.

    Raises:
        CacheError: a row that is not in the cache, numbered as TRL's preparation left it; `ld_alpha` with a reference
            that was built without token logps; an argument that contradicts the cache or the parameterization.
        ValueError: an unknown parameterization, or a loss that has none.
    """

    def __init__(
        self,
        *args: Any,
        reference_cache: ReferenceCache | str | os.PathLike[str] | None = None,
        reference: str | None = None,
        parameterization: str = "ratio",
        **keywords: Any,
    ) -> None:
        self._cache: tuple[ReferenceCache, NamedReference] | None = None
        self._parameterization = parameterization
        if reference_cache is None and reference is not None:
            raise CacheError(f"reference: {reference!r} without a reference_cache")
        if reference_cache is None and parameterization == "ratio":
            passed = inspect.signature(DPOTrainer.__init__).bind_partial(self, *args, **keywords).arguments
            self._given_reference = passed.get("ref_model") is not None
            super().__init__(*args, **keywords)
            return
        given = inspect.signature(DPOTrainer.__init__).bind(self, *args, **keywords).arguments
        del given["self"]
        given["args"] = config = copy.copy(given.get("args") or _default_config(given["model"]))
        if parameterization != "ratio":
            _check_parameterization(parameterization, config, reference_cache)
        _check_no_model(config, given)
        if reference_cache is not None:
            cache = reference_cache if isinstance(reference_cache, ReferenceCache) else ReferenceCache(reference_cache)
            self._cache = cache, cache.reference(reference)
            _check(self._cache[1], config, given)
        config.precompute_ref_log_probs = True
        # TRL hashes the policy, to name its own file of reference logps
        with mock.patch.object(dpo_trainer, "hash_module", return_value=""):
            super().__init__(**given)

    @property
    def _fills_columns(self) -> bool:
        """Whether `_prepare_dataset` gives the data their reference logps."""
        return self._cache is not None or self._parameterization == "posterior"

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if self._cache is None:
            prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            return _without_reference(prepared, dataset_name) if self._fills_columns else prepared
        cache, named = self._cache
        prior = self._parameterization == "likelihood"
        keywords = {
            "tokenizer": processing_class,
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
            "ld_alpha": args.ld_alpha,
            "prior": prior,
        }
        if speaks(named, processing_class):
            prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            prepared = cache.attach(prepared, named.name, **keywords)
        else:
            # Another tokenizer reads the text as it was, without the policy's end of text
            attached = cache.attach(dataset, named.name, **keywords)
            prepared = super()._prepare_dataset(attached, processing_class, args, dataset_name)
        return _prior_alone(prepared) if prior else prepared

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if {CHOSEN, REJECTED} <= set(next(iter(dataset), {})):
            if not self._fills_columns:
                _check_columns(dataset, name, cast(DPOConfig, self.args), self._given_reference)
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `trl.DPOTrainer.evaluate`; with a cache or the posterior also on new data after the first step."""
        if not self._fills_columns or eval_dataset is None or isinstance(eval_dataset, str):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if isinstance(eval_dataset, dict):
            metrics: dict[str, float] = {}
            for name, dataset in eval_dataset.items():
                metrics |= self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        prepared = self._prepare_dataset(eval_dataset, self.processing_class, self.args, "eval")
        return super(DPOTrainer, self).evaluate(prepared, ignore_keys, metric_key_prefix)


def _without_reference(dataset: Any, name: str) -> Any:
    """The columns that TRL reads, 0: no reference is log p_ref = 0 everywhere."""
    if {CHOSEN, REJECTED} & set(next(iter(dataset))):
        raise CacheError(f"{name} data: has {CHOSEN}, which parameterization='posterior' does not read; drop it")
    return dataset.map(lambda _: {CHOSEN: 0.0, REJECTED: 0.0})


def _prior_alone(dataset: Any) -> Any:
    """log p_ref(y) in the columns that TRL reads, in place of log p_ref(y|x)."""
    return dataset.remove_columns(list(_PRIOR)).rename_columns({prior: name for name, prior in _PRIOR.items()})


def _check_parameterization(parameterization: str, config: DPOConfig, cache: Any) -> None:
    """Raise for a reward that the loss does not have, or that needs what is not there."""
    check_keywords(config.beta, config.loss_type, config.label_smoothing, {"parameterization": parameterization})
    if parameterization == "posterior" and cache is not None:
        raise CacheError("reference_cache: parameterization='posterior' has no reference, expected None")
    if parameterization == "likelihood":
        if cache is None:
            raise CacheError(
                "parameterization: 'likelihood' reads the logps of completions without their prompt from a "
                "reference_cache that was built with prior=True; expected one"
            )
        if config.ld_alpha is not None:
            raise CacheError(f"ld_alpha: parameterization='likelihood' cannot weigh tokens, got {config.ld_alpha!r}")


def _check_no_model(config: DPOConfig, given: dict[str, Any]) -> None:
    """Raise CacheError for a reference model: another reference has taken its place."""
    if given.get("ref_model") is not None:
        raise CacheError(
            "ref_model: expected None with a reference_cache, which takes its place, and with "
            "parameterization='posterior', which has none"
        )
    if config.sync_ref_model:
        raise CacheError("sync_ref_model: a cached reference does not change, expected False")


def _default_config(model: Any) -> DPOConfig:
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    return DPOConfig(f"{name.split('/')[-1]}-DPO")


def _check_columns(dataset: Any, name: str, config: DPOConfig, given_reference: bool) -> None:
    """Raise CacheError for columns that were made otherwise than this trainer would make them."""
    if given_reference:
        raise CacheError(f"ref_model: expected None, as the {name} data has {CHOSEN} and {REJECTED}")
    wanted = {
        "temperature": 1.0,
        "max_length": config.max_length,
        "truncation_mode": config.truncation_mode,
        "ld_alpha": config.ld_alpha,
    }
    found = record.read(dataset)
    if not found:
        warnings.warn(
            f"{name} data: {CHOSEN} and {REJECTED} are taken as they are; nothing says which reference, max_length and "
            "truncation_mode they were made with (ReferenceCache.attach to a Dataset records it)",
            stacklevel=2,
        )
    for made in found:
        for key, value in wanted.items():
            if getattr(made, key) != value:
                raise CacheError(
                    f"{key}: the {name} data's {CHOSEN} were made with {getattr(made, key)!r}, the trainer has "
                    f"{value!r}; attach them again"
                )
    if len({made.reference for made in found}) > 1:
        raise CacheError(f"{name} data: its {CHOSEN} are of {len(found)} references, expected one")


def _check(named: NamedReference, config: DPOConfig, given: dict[str, Any]) -> None:
    """Raise CacheError for what would be ignored, or scored otherwise than the cache was."""
    if config.ld_alpha is not None and not named.token_logps:
        raise CacheError(
            f"ld_alpha: needs the token logps of the reference; {named.name!r} was built without (token_logps=True)"
        )
    if named.reference.temperature != 1:
        raise CacheError(
            f"reference: {named.name!r} was scored at temperature {named.reference.temperature:g}; DPO needs 1"
        )
    collator = given.get("data_collator")
    cut = (config.max_length, config.truncation_mode)
    if collator is not None and (getattr(collator, "max_length", 0), getattr(collator, "truncation_mode", "")) != cut:
        raise CacheError(f"data_collator: expected one that cuts as args do, max_length {cut[0]}, {cut[1]}")
