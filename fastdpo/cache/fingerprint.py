"""Which model: one hash over its weights, architecture and adapters, equal in every process.

    SHA-256(class, architecture config, adapters, (name, dtype, shape, SHA-256 of the bytes) of each tensor by name)

From a loaded model, or straight from the safetensors files of a folder or hub id; the two agree for the same weights
loaded with the same dtype. The files are read once, tensor by tensor, however they are sharded. Tied weights count
once, under the first of their names. An adapter counts while it is enabled or merged, whatever it is called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import adapters
from .errors import CacheError

# What a config says that no log-probability depends on, besides what every config says (labels, outputs, dtype, ...)
_NOT_ARCHITECTURE = {
    *("_name_or_path", "_commit_hash", "auto_map", "torch_dtype", "use_cache", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id"),
}


def of_model(model: Any) -> str:
    """Fingerprint, 64 hex digits, of a loaded `PreTrainedModel` or `PeftModel`, on any device.

    Raises:
        CacheError: weights that are not there: on the meta device (offloaded), or partitioned by DeepSpeed ZeRO-3.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    groups = _tied_groups(base)
    state = {name: tensor for names, tensor in groups for name in names}
    found = adapters.layers(base)
    theirs = adapters.tensor_names(found, state)
    tensors = {min(map(adapters.plain_name, names)): tensor for names, tensor in groups if not theirs & set(names)}
    hashes = {name: _tensor_hash(name, tensor) for name, tensor in tensors.items()}
    for number, digest in enumerate(adapters.digests(model, base, found, state, _tensor_hash)):
        hashes[f"adapter {number}"] = digest
    return _combine(base, hashes)


def stamp(model: Any) -> Any:
    """What is quickly seen of a loaded model; equal for two looks between which nothing has changed it.

    Of each tensor where it lies, how often it was written to, and a few of its numbers: writing through `.data` is
    counted nowhere. A model that was moved has another stamp and the same fingerprint.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    seen: list[Any] = [adapters.canonical(base.config.to_dict()), repr(adapters.layers(base))]
    samples = []
    for names, tensor in _tied_groups(base):
        local = tensor.detach()
        local = local.to_local() if hasattr(local, "to_local") else local
        written = None if local.is_inference() else tensor._version
        seen.append((names, tensor.dtype, tuple(tensor.shape), local.data_ptr(), written))
        if local.numel():
            flat = local.reshape(-1) if local.is_contiguous() else local.flatten()
            samples.append(flat[:: max(1, flat.numel() // _SAMPLES)].double())
    by_device: dict[torch.device, list[Tensor]] = {}
    for sample in samples:
        by_device.setdefault(sample.device, []).append(sample)
    return seen, [torch.cat(parts).cpu().numpy().tobytes() for parts in by_device.values()]


class Checkpoint(NamedTuple):
    """What a folder or hub id would be, loaded."""

    fingerprint: str
    config: Any
    dtype: torch.dtype


def of_checkpoint(
    path: str, dtype: str = "float32", *, trust_remote_code: bool = False, **hub: Any
) -> Checkpoint | None:
    """The fingerprint of the model that `from_pretrained(path, dtype=dtype)` would load, from its files alone.

    Args:
        path: folder or hub id.
        dtype: "float32", "bfloat16", "float16", or "auto": as the config says.
        hub: `revision`, `token`, ... as `from_pretrained` takes them.

    Returns:
        None where loading does more than reading (an adapter, a quantised or converted checkpoint, no safetensors,
        modules kept in float32): then load the model, and ask `of_model`.
    """
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import cached_file

    if cached_file(path, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **hub):
        return None
    files = _safetensors(path, hub)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **hub)
    if not files or getattr(config, "quantization_config", None):
        return None
    with torch.device("meta"):  # names, shapes and ties, without the numbers
        outline = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    wanted = config.dtype if dtype == "auto" else getattr(torch, dtype)
    keeps = any(getattr(outline, f"_keep_in_fp32_modules{which}", None) for which in ("", "_strict"))
    if wanted is None or _converts(outline) or (keeps and wanted != torch.float32):
        return None
    where: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    sources = []  # of each group of tied names: the one name that the files have
    for names, tensor in _tied_groups(outline):
        there = [name for name in names if name in where]
        if len(there) != 1:
            return None
        sources.append((min(names), there[0], tensor.shape))
    if len(sources) != len(where):
        return None
    hashes = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for name, source, shape in sources:
                if where[source] == file:
                    tensor = opened.get_tensor(source)
                    if tensor.shape != shape:
                        return None
                    hashes[name] = _tensor_hash(name, tensor.to(wanted) if tensor.is_floating_point() else tensor)
    return Checkpoint(_combine(outline, hashes), config, wanted)


_SAMPLES = 64  # numbers of a tensor that a stamp looks at, about


# --- weights ---------------------------------------------------------------------------------------------------------


def _tied_groups(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """(names, tensor) of each tensor of the state dict; several names where it is tied."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CacheError(f"model: {name} of its state dict is a {type(tensor).__name__}, expected a tensor")
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(groups.values())


def _tensor_hash(name: str, tensor: Tensor) -> str:
    if hasattr(tensor, "ds_id"):
        raise CacheError(f"model: {name} is partitioned by DeepSpeed ZeRO-3; give the cache a model that is not")
    if tensor.is_meta:
        raise CacheError(f"model: {name} is on the meta device (offloaded, or never loaded), expected its numbers")
    if hasattr(tensor, "full_tensor"):  # DTensor: sharded by FSDP2
        tensor = tensor.full_tensor()
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return f"{tensor.dtype} {list(tensor.shape)} {digest.hexdigest()}"


def _safetensors(path: str, hub: dict[str, Any]) -> list[str]:
    """The files of a checkpoint; none if it has no safetensors."""
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    find: Callable[..., Any] = lambda name: cached_file(  # noqa: E731
        path, name, _raise_exceptions_for_missing_entries=False, **hub
    )
    if (single := find("model.safetensors")) is not None:
        return [single]
    if (index := find("model.safetensors.index.json")) is not None:
        return sorted(get_checkpoint_shard_files(path, index, **hub)[0])
    return []


def _converts(outline: Any) -> bool:
    """Whether loading computes tensors from others (experts put together, and the like)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers 4: renames only
        return False
    return any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(outline))


# --- the whole -------------------------------------------------------------------------------------------------------


def _combine(model: Any, hashes: dict[str, str]) -> str:
    from transformers import PretrainedConfig

    skip = _NOT_ARCHITECTURE | set(PretrainedConfig().to_dict()) - {"model_type"}
    whole = hashlib.sha256(f"fastdpo reference v1 {type(model).__name__}\n".encode())
    whole.update(adapters.canonical(_without(model.config.to_dict(), skip)).encode())
    for name in sorted(hashes):
        whole.update(f"\n{name} {hashes[name]}".encode())
    return whole.hexdigest()


def _without(value: Any, names: set[str]) -> Any:
    return {k: _without(v, names) for k, v in value.items() if k not in names} if isinstance(value, dict) else value
