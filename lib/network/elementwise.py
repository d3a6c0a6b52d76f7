"""Element-wise steps of the network between its products, plain or compiled.

The residual stream is float32, and on a GPU each pass over it takes as long as a good part of a
product. `compiled` makes each of these functions one kernel: the residual is added and normed in
one pass, and queries and keys are turned while they are copied. Other biases are added by products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

__all__ = ["PLAIN", "Elementwise", "added", "compiled", "gelu", "normed", "turned"]

_NORM_EPS = 1e-5

Result = TypeVar("Result")


def normed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the layer norm of x in `dtype`; x: (T, hidden_dim) float32."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps=_NORM_EPS).to(dtype)


def added(
    x: torch.Tensor,
    product: torch.Tensor,
    product_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + product_bias + product, (T, hidden_dim) float32, and its layer norm in `dtype`.

    product_bias: (hidden_dim,) float32, whatever the type of the product is.
    """
    x = x + product_bias + product
    return x, normed(x, weight, bias, dtype)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Return the exact GELU (by erf) of x, (T, 4 hidden_dim)."""
    return F.gelu(x)


def turned(qk: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Return queries and keys with rotary positions, in the dtype of `qk`; computed in float32.

    qk: (T, 2, heads, head_dim), where the two numbers that turn together are neighbours; turns:
    (T, 2, 1, head_dim / 2, 2) float32, cosine and sine. As `lib.network.attention.turned`, which
    multiplies complex numbers; those are not compiled.
    """
    even, odd = qk.float().view(*qk.shape[:-1], -1, 2).unbind(-1)
    cos, sin = turns.unbind(-1)
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return pairs.flatten(-2).to(qk.dtype)


@dataclass(frozen=True)
class Elementwise:
    """The four steps, plain or compiled."""

    normed: Callable[..., torch.Tensor]
    added: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    gelu: Callable[..., torch.Tensor]
    turned: Callable[..., torch.Tensor]


PLAIN = Elementwise(normed, added, gelu, turned)


def compiled(backend: str | Callable[..., object] = "inductor") -> Elementwise:
    """Return the steps compiled by torch, at their first call, once for packs of any size.

    On a CPU it is once for each number of threads. backend: as torch.compile has them; "inductor"
    writes Triton for a GPU and C++ for a CPU.
    """
    return Elementwise(
        _compiled(normed, backend),
        _compiled(added, backend),
        _compiled(gelu, backend),
        _compiled(turned, backend),
    )


def _compiled(
    function: Callable[..., Result], backend: str | Callable[..., object]
) -> Callable[..., Result]:
    # torch counts the graphs of a code object, and refuses a ninth: each network has its own.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    # Not dynamic=True, which makes variables of the widths too.
    # Deterministic, or inductor times the kernels of a sum and takes the fastest: another order.
    options: dict[str, str | int | bool | Callable[..., object]] | None
    options = {"deterministic": True} if backend == "inductor" else None
    call = torch.compile(own, fullgraph=True, dynamic=False, backend=backend, options=options)

    def over_tokens(*arguments: torch.Tensor | torch.dtype) -> Result:
        for one in arguments:
            if isinstance(one, torch.Tensor) and one.dim() > 1:  # not a weight of a norm
                torch._dynamo.mark_dynamic(one, 0)
        result: Result = call(*arguments)
        return result

    return over_tokens
