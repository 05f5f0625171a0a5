"""One pass of the unpruned model over the calibration samples: the distance of every (start, count)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.algorithms.angular import RunningMoments, by_span, pair_distances, ranking
from tasks.domain.errors import DataError
from tasks.engines.children.blocks import decoder_blocks, recorded_states
from tasks.engines.children.border import Report, device_of, serve

SHORTEST_SAMPLE = 16  # tokens; less context says little about a block


def score(request: dict[str, Any], out: Path, report: Report) -> None:
    """request: checkpoint, documents (file of JSON strings), samples, length, metric, token, dtype."""
    device = device_of(request["runtime"])
    tokenizer = AutoTokenizer.from_pretrained(request["checkpoint"])
    samples = _samples(request, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype=getattr(torch, request["dtype"]))
    model = model.to(device).eval()
    blocks = decoder_blocks(model, model.config.get_text_config().num_hidden_layers)
    moments, batch = RunningMoments(), request["runtime"]["batch"]
    with torch.inference_mode(), recorded_states(blocks) as states:
        for first in range(0, len(samples), batch):
            part = samples[first : first + batch]
            longest = max(map(len, part))
            ids = torch.tensor([sample + [0] * (longest - len(sample)) for sample in part], device=device)
            mask = torch.tensor([[1] * len(sample) + [0] * (longest - len(sample)) for sample in part], device=device)
            model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
            for row, sample in enumerate(part):
                last = torch.stack([state[row, len(sample) - 1] for state in states])
                moments.add(pair_distances(last.double().cpu().numpy()))
            states.clear()
            report((first + len(part)) / len(samples), f"{first + len(part)} of {len(samples)} samples")

    mean, std = by_span(moments.mean), by_span(moments.std())
    distances = {
        "metric": request["metric"],
        "token": request["token"],
        "samples": len(samples),
        "mean": mean,
        "std": std,
    }
    (out / "distances.json").write_text(json.dumps(distances))
    (out / "ranking.json").write_text(json.dumps({"starts_by_count": ranking(mean)}))
    with (out / "tokens.jsonl").open("w") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples)


def _samples(request: dict[str, Any], tokenizer: Any) -> list[list[int]]:
    documents = json.loads(Path(request["documents"]).read_text())
    samples: list[list[int]] = []
    for document in documents:
        ids = tokenizer.encode(document)[: request["length"]]
        if len(ids) >= SHORTEST_SAMPLE:
            samples.append(ids)
        if len(samples) == request["samples"]:
            break
    if not samples:
        raise DataError(f"score.calibration: no document has {SHORTEST_SAMPLE} tokens; give longer texts")
    return samples


if __name__ == "__main__":
    serve(score)
