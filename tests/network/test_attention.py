"""Attention: if this fails, residues of one protein look at those of another."""

from __future__ import annotations

import pytest
import torch

from lib.network import attention
from lib.network.attention import attend, sequence_bounds, takes_varlen
from lib.network.groups import Group, group_equal_lengths

LENGTHS = [130, 41, 41, 41, 9, 1, 1]
HEADS, WIDTH = 3, 8


def pack(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, list[Group]]:
    """Return queries, keys and values, turns, and the groups of a pack of mixed lengths."""
    torch.manual_seed(0)
    tokens = sum(LENGTHS) + 2 * len(LENGTHS)
    qkv = torch.randn(tokens, 3, HEADS, WIDTH).to(dtype)
    angles = torch.randn(tokens, 1, 1, WIDTH // 2)
    turns = torch.polar(torch.ones_like(angles), angles)
    return qkv, torch.cat((turns * WIDTH**-0.5, turns), dim=1), group_equal_lengths(LENGTHS)


def by_hand(qkv: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Return attention of every sequence by its definition, in float64."""
    even, odd = qkv[:, :2, :, 0::2].double(), qkv[:, :2, :, 1::2].double()
    cos, sin = rotary.real.double(), rotary.imag.double()
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    result, start = [], 0
    for length in LENGTHS:
        part = slice(start, start + length + 2)
        q, k = turned[part].unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q, k).softmax(-1)
        result.append(torch.einsum("hqk,khd->qhd", scores, qkv[part, 2].double()))
        start += length + 2
    return torch.cat(result)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("score_bytes", [1, 1 << 14, 2 << 20])
def test_a_token_attends_to_its_own_sequence_only(
    dtype: torch.dtype, bound: float, score_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SCORE_BYTES", score_bytes)
    qkv, rotary, groups = pack(dtype)
    expected = by_hand(qkv, rotary)
    found = attend(qkv, rotary, groups, sequence_bounds(groups), len(qkv)).double()
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound)


def test_long_sequences_go_through_the_kernel_that_holds_no_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_BLOCKED_TOKENS", 50)
    qkv, rotary, groups = pack(torch.bfloat16)
    expected = by_hand(qkv, rotary)
    found = attend(qkv, rotary, groups, sequence_bounds(groups), len(qkv)).double()
    torch.testing.assert_close(found, expected, atol=3e-2, rtol=3e-2)


def test_bounds_are_the_first_token_of_every_sequence_and_the_end() -> None:
    groups = group_equal_lengths(LENGTHS)
    assert sequence_bounds(groups).tolist() == [0, 132, 175, 218, 261, 272, 275, 278]


def test_the_cuda_path_hands_the_whole_pack_over_with_its_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The kernel itself needs a GPU; what it is given is tried with a stand-in by definition.
    def varlen(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bounds: object, scale: float
    ) -> torch.Tensor:
        starts, again, longest, longest_again = bounds
        assert starts is again
        assert isinstance(starts, torch.Tensor)
        assert starts.dtype is torch.int32
        assert (longest, longest_again, scale) == (132, 132, 1.0)
        assert q.dtype is k.dtype is v.dtype is torch.float16
        result = torch.empty_like(v)
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            scores = torch.einsum("qhd,khd->hqk", q[start:stop].float(), k[start:stop].float())
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:stop].float())
            result[start:stop] = mixed.half()
        return result

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    qkv, rotary, groups = pack(torch.float16)
    expected = by_hand(qkv, rotary)
    qk = attention.turned(qkv[:, :2], rotary)
    found = attention._varlen(qk, qkv[:, 2], groups, sequence_bounds(groups))
    torch.testing.assert_close(found.double(), expected, atol=4e-3, rtol=4e-3)


@pytest.mark.filterwarnings("error")
def test_float16_is_turned_in_float32() -> None:
    qkv, rotary, _ = pack(torch.float16)
    qkv[0] = 60_000  # products of this leave float16
    expected = attention.turned(qkv[:, :2].float(), rotary).half()
    values = qkv[:, 2].clone()
    assert torch.equal(attention.turned(qkv[:, :2], rotary), expected)
    assert torch.equal(qkv[:, 2], values)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "takes"),
    [
        ((9, 0), torch.float16, 64, True),
        ((8, 0), torch.bfloat16, 16, True),
        ((7, 5), torch.float16, 64, False),  # a T4
        ((9, 0), torch.float32, 64, False),
        ((9, 0), torch.float16, 12, False),
        ((9, 0), torch.float16, 320, False),
    ],
)
def test_the_kernel_for_packs_on_a_gpu_is_used_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    takes: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert takes_varlen(torch.device("cuda", 0), dtype, head_dim) is takes
    assert not takes_varlen(torch.device("cpu"), dtype, head_dim)
