"""Products into float32, on the CPU, and as far as a device without data shows what a GPU would be asked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastdpo import products
from fastdpo.products import add_product, keeps_float32, product, write_product


@pytest.fixture(autouse=True)
def _try_again() -> Iterator[None]:
    products._tried.cache_clear()
    yield
    products._tried.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_values(dtype: torch.dtype) -> None:
    a, b = torch.randn(5, 300).to(dtype), torch.randn(300, 7).to(dtype)
    truth = a.double() @ b.double()
    tolerance = dict(rtol=0, atol=20 * torch.finfo(dtype).eps * 17)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert product(a, b).dtype == wide
    torch.testing.assert_close(product(a, b).double(), truth, **tolerance)
    for out in (torch.empty(5, 7, dtype=dtype), torch.empty(5, 7, dtype=wide)):
        write_product(out, a, b)
        torch.testing.assert_close(out.double(), truth, **tolerance)
    total = torch.ones(5, 7, dtype=wide)
    add_product(total, a, b)
    torch.testing.assert_close(total.double(), truth + 1, **tolerance)


@pytest.mark.parametrize("refused", [[], ["addmm"], ["mm", "addmm"]], ids=["new", "no addmm", "old"])
def test_what_the_library_is_asked_for(refused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On another device than the CPU: float32 from the product itself where the library can, asked once."""
    asked = []

    def asking(name: str):
        original = getattr(torch, name)

        def operation(*args: torch.Tensor, **keywords) -> torch.Tensor:
            if "out_dtype" in keywords:
                asked.append(name)
                if name in refused:
                    raise RuntimeError("out_dtype is not supported")
            return original(*args, **keywords)

        return operation

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, asking(name))
    a, b, total = (torch.empty(4, 4, dtype=dtype, device="meta") for dtype in (torch.half, torch.half, torch.float32))
    for _ in range(2):
        add_product(total, a, b)
    assert asked.count("addmm") == (1 if refused else 3)  # the trial, and each sum if it went well
    if "mm" in refused:
        assert asked == ["addmm", "mm"]
    assert product(a, b).dtype == torch.float32
    write_product(total, a, b)
    write_product(total.half(), a, b)
    assert keeps_float32(a) == ("mm" not in refused)
    assert not keeps_float32(total) and not keeps_float32(torch.empty(2, dtype=torch.half))
