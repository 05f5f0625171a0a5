"""The gate before a pruned checkpoint is published: it must be what the plan says, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tasks.domain.errors import GateError
from tasks.engines.children.blocks import bypassed, decoder_blocks
from tasks.engines.children.border import Report, device_of, serve

TOLERANCE = 1e-4  # largest allowed difference of float32 logits
PROBE_TOKENS = 48


def verify(request: dict[str, Any], _out: Path, report: Report) -> None:
    """request: original and pruned checkpoints, removed blocks, parameters expected after the cut.

    Checks, each with the measured figure in its GateError: strict reload, parameter count, no NaN, logits equal
    to the original's with the same blocks bypassed, logits with the key-value cache equal to those without.
    """
    device = device_of(request["runtime"])
    pruned, loading = AutoModelForCausalLM.from_pretrained(
        request["pruned"], dtype=torch.float32, output_loading_info=True
    )
    pruned = pruned.to(device).eval()
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[fault]:
            raise GateError(
                f"the pruned checkpoint reloads with {fault.replace('_', ' ')}: {sorted(loading[fault])[:5]}"
            )
    parameters = sum(parameter.numel() for parameter in pruned.parameters())
    if parameters != request["parameters"]:
        raise GateError(f"the pruned model has {parameters} parameters, the plan says {request['parameters']}")
    report(0.4, "reloaded")

    generator = torch.Generator().manual_seed(0)
    vocabulary = pruned.get_input_embeddings().num_embeddings
    probe = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator).to(device)
    with torch.inference_mode():
        own = pruned(input_ids=probe, use_cache=False).logits
        if not torch.isfinite(own).all():
            raise GateError(f"the pruned model gives {int((~torch.isfinite(own)).sum())} logits that are not finite")
        original = AutoModelForCausalLM.from_pretrained(request["original"], dtype=torch.float32).to(device).eval()
        blocks = decoder_blocks(original, original.config.get_text_config().num_hidden_layers)
        with bypassed(blocks, request["removed"]):
            expected = original(input_ids=probe, use_cache=False).logits
        difference = float((own - expected).abs().max())
        if difference > TOLERANCE:
            raise GateError(
                f"logits of the pruned model differ by {difference:.2e} from the original's with blocks "
                f"{request['removed']} bypassed (allowed: {TOLERANCE:.0e})"
            )
        report(0.8, "logits equal")
        difference = _cache_difference(pruned, probe, own)
    if difference > TOLERANCE:
        raise GateError(
            f"logits with the key-value cache differ by {difference:.2e} from those without (allowed: {TOLERANCE:.0e})"
        )


def _cache_difference(model: Any, probe: torch.Tensor, uncached: torch.Tensor) -> float:
    """Largest difference of the logits when half of the probe is read at once and the rest token by token."""
    half = probe.shape[1] // 2
    step = model(input_ids=probe[:, :half], use_cache=True)
    worst = float((step.logits - uncached[:, :half]).abs().max())
    for place in range(half, probe.shape[1]):
        step = model(input_ids=probe[:, place : place + 1], past_key_values=step.past_key_values, use_cache=True)
        worst = max(worst, float((step.logits[:, -1] - uncached[:, place]).abs().max()))
    return worst


if __name__ == "__main__":
    serve(verify)
