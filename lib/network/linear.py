"""Matrix products of the network, fused with the operation after them where torch can."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from lib.errors import MachineError
from lib.network.device import cpu_vendor

__all__ = ["linear", "linear_add", "linear_gelu", "refuse_rounding", "rows_of"]

# oneDNN prepares a product anew for every number of rows that it meets, which without padding is
# that of every pack: the 8M shape spent a quarter of its time on it in bfloat16.
_ROWS = 64

# oneDNN's linear with a fused tail, the operator that torch's own compiler emits on CPU. It is
# not public API; where it is missing, two steps compute the same. So they do on Intel's processors
# in float32: there, torch's own products are MKL's, which are faster, and on AMD's slower.
_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
_HAS_MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
_MKL_IS_FASTER = _HAS_MKL and cpu_vendor() == "GenuineIntel"
_BY_ONEDNN = {
    torch.float32: _ONEDNN and not _MKL_IS_FASTER,
    torch.bfloat16: _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
}

# What can have operands of float32 products rounded to bfloat16 or TF32.
_ROUNDING = (
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)

Affine = tuple[torch.Tensor, torch.Tensor]
_PerhapsAffine = tuple[torch.Tensor, torch.Tensor | None]


def rows_of(tokens: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return how many rows the products of a pack have: oneDNN is to meet few different numbers."""
    return -(-tokens // _ROWS) * _ROWS if _is_by_onednn(device, dtype) else tokens


def linear(x: torch.Tensor, weight_bias: _PerhapsAffine) -> torch.Tensor:
    """Return x @ weight.T + bias, if there is one; x: (T, in), weight: (out, in), of one dtype."""
    if _is_by_onednn(x.device, x.dtype):
        return _pointwise(x, weight_bias, "none", "")
    return F.linear(x, *weight_bias)


def linear_gelu(x: torch.Tensor, weight_bias: Affine) -> torch.Tensor:
    """Return the exact GELU (by erf) of `linear`."""
    if _is_by_onednn(x.device, x.dtype):
        return _pointwise(x, weight_bias, "gelu", "none")
    activated = torch.ops.aten.gelu_(F.linear(x, *weight_bias))
    assert isinstance(activated, torch.Tensor)
    return activated


def linear_add(x: torch.Tensor, weight_bias: Affine, residual: torch.Tensor) -> torch.Tensor:
    """Return `linear` plus a float32 residual, which this may overwrite; the bias is float32."""
    weight, bias = weight_bias
    if x.dtype is not torch.float32:
        return residual.add_(bias).add_(linear(x, (weight, None)))
    if _is_by_onednn(x.device, x.dtype):
        fused = torch.ops.mkldnn._linear_pointwise.binary(x, residual, *weight_bias, "add")
        assert isinstance(fused, torch.Tensor)
        return fused
    return residual.add_(bias).addmm_(x, weight.t())


def refuse_rounding(device: torch.device) -> None:
    """Raise MachineError if products of float32 take less than float32 of their operands.

    Environment variables and torch's settings can ask for that, and no result would tell.
    """
    # The product is `odd` itself; bfloat16 and TF32 have no place for its last bit.
    odd = torch.full((_ROWS, 256), 4097.0, device=device)
    ones = torch.eye(256, device=device), torch.zeros(256, device=device)
    if not torch.equal(linear(odd, ones), odd):
        said = [f"{name} = {os.environ[name]}" for name in _ROUNDING if name in os.environ]
        said.append(_chosen_precision(device))
        raise MachineError(f"{device}: operands of float32 products are rounded: {', '.join(said)}")


def _chosen_precision(device: torch.device) -> str:
    """Return what torch's settings say of float32 products, by the name that they were set by."""
    try:
        return f"torch.get_float32_matmul_precision() = {torch.get_float32_matmul_precision()}"
    except RuntimeError:  # torch does not mix the old setting with the new ones
        name = "cuda" if device.type == "cuda" else "mkldnn"
        chosen = getattr(torch.backends, name).matmul.fp32_precision
        return f"torch.backends.{name}.matmul.fp32_precision = {chosen}"


def _is_by_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and _BY_ONEDNN.get(dtype, False)


def _pointwise(
    x: torch.Tensor, weight_bias: _PerhapsAffine, activation: str, algorithm: str
) -> torch.Tensor:
    fused = torch.ops.mkldnn._linear_pointwise(x, *weight_bias, activation, [], algorithm)
    assert isinstance(fused, torch.Tensor)
    return fused
