"""The device: if this fails, a user is advised to use a precision that is slower here."""

from __future__ import annotations

import pytest
import torch

from lib.network import device
from lib.network.device import choose_precision
from lib.settings import load_settings

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flag", "share", "hint"),
    [
        ("avx512_bf16", 0.3, ", but this CPU is faster in bfloat16"),
        ("amx_bf16", 0.6, ", but this CPU is faster in bfloat16"),
        ("amx_bf16", 0.7, ""),  # too little to name it
        ("bf16", 0.3, ", but this CPU is faster in bfloat16"),
        ("avx512_bf16", 2.0, ""),  # as measured: units that take longer
        ("avx2", 0.3, ""),
    ],
)
def test_bfloat16_is_proposed_where_its_products_are_faster(
    monkeypatch: pytest.MonkeyPatch, flag: str, share: float, hint: str
) -> None:
    torch.set_num_threads(2)

    def seconds(dtype: torch.dtype) -> float:
        assert torch.get_num_threads() == 1
        return {torch.float32: 1.0, torch.bfloat16: share}[dtype]

    monkeypatch.setattr(device, "cpu_flags", lambda: frozenset({"fpu", flag}))
    monkeypatch.setattr(device, "_product_seconds", seconds)
    device._bfloat16_is_faster.cache_clear()
    try:
        found = choose_precision(load_settings().compute, CPU)
    finally:
        device._bfloat16_is_faster.cache_clear()
    assert found == ("float32", f"auto: float32 on CPU{hint}")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_timed_is_a_product_in_that_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    true, made = torch.mm, list[torch.Tensor]()
    monkeypatch.setattr(torch, "mm", lambda *both: made.append(true(*both)))
    assert device._product_seconds(dtype) > 0
    assert len(made) == 5
    assert {product.dtype for product in made} == {dtype}
