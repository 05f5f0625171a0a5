"""Rows packed into one sequence without padding, and attention that stays within each of them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

PACKED = "packed"  # as attn_implementation

Example = dict[str, list[int]]
Batch = dict[str, Any]


def packed(batch: list[Example], device: str = "cpu") -> Batch:
    """One sequence of all rows, (1, tokens) each; positions start again with every row.

    Attention stays within a row: PACKED is told the borders, others derive them from the positions.
    """
    columns = {
        "input_ids": [token for row in batch for token in row["input_ids"]],
        "position_ids": [place for row in batch for place in range(len(row["input_ids"]))],
        "labels": [label for row in batch for label in row["labels"]],
    }
    lengths = [len(row["input_ids"]) for row in batch]
    return {name: torch.tensor([values], device=device) for name, values in columns.items()} | {
        "cu_seq_lens_q": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        "max_length_q": max(lengths),
    }


def use_packed_attention(model: Any) -> None:
    """Flash attention over packed rows, where the model's attention has neither a cap on its logits nor sinks.

    A mask over a whole sequence of m rows costs m times as much, and no fast kernel takes one.
    """
    if model._supports_sdpa and getattr(model.config, "attn_logit_softcapping", None) is None:
        model.set_attn_implementation(PACKED)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, tokens, size), key and value with as many or fewer heads; returns (1, tokens, heads, size)."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (
        states[0].transpose(0, 1).to(value.dtype)  # rotary embeddings of full fine-tuning are float32
        for states in (query, repeat_kv(key, groups), repeat_kv(value, groups))
    )
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    borders = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return varlen_attn(q, k, v, *borders, scale=scaling, window_size=window)[None], None


AttentionInterface.register(PACKED, packed_attention)
