"""What the tests of building share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import cache_kit as kit

from fastdpo.cache import ReferenceCache

PAIRS = kit.rows(10)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kit.save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    return ReferenceCache(tmp_path / "cache")


def build(cache: ReferenceCache, model: Any, data: Any = PAIRS, tokenizer: Any = None, **keywords: Any) -> Any:
    tokenizer = tokenizer or kit.tokenizer_of(model)
    return cache.build(model, tokenizer, data, progress=False, **keywords)
