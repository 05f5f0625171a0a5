"""Perplexity of the calibration text with each of some spans bypassed: distance alone may mislead near a tie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tasks.domain.stage import json_lines
from tasks.engines.children.blocks import bypassed, decoder_blocks
from tasks.engines.children.border import Report, device_of, serve


def candidates(request: dict[str, Any], out: Path, report: Report) -> None:
    """request: checkpoint, tokens (file of the score's samples), dtype, starts, count. Writes candidates.json."""
    device = device_of(request["runtime"])
    samples = [json.loads(line) for line in json_lines(Path(request["tokens"]))]
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype=getattr(torch, request["dtype"]))
    model = model.to(device).eval()
    blocks = decoder_blocks(model, model.config.get_text_config().num_hidden_layers)
    measured = []
    for number, start in enumerate(request["starts"]):
        with torch.inference_mode(), bypassed(blocks, range(start, start + request["count"])):
            nll = sum(_negative_log_likelihood(model, sample, device) for sample in samples)
        perplexity = float(torch.tensor(nll / sum(len(sample) - 1 for sample in samples)).exp())
        measured.append({"start": start, "perplexity": perplexity})
        report((number + 1) / len(request["starts"]), f"start {start}: perplexity {perplexity:.2f}")
    (out / "candidates.json").write_text(json.dumps(measured))


def _negative_log_likelihood(model: Any, sample: list[int], device: str) -> float:
    ids = torch.tensor([sample], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


if __name__ == "__main__":
    serve(candidates)
