"""One pass of the unpruned model over the calibration samples: the distance of every (start, count)."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.algorithms.angular import BootstrapRanking, RunningMoments, by_span, pair_distances, ranking
from tasks.algorithms.prompts import prompt_ids
from tasks.domain.errors import DataError
from tasks.engines.children.blocks import decoder_blocks, recorded_states
from tasks.engines.children.border import Report, device_of, serve

SHORTEST_SAMPLE = 16  # tokens; less context says little about a block
MOST_SAME_ENDS = 0.5


def score(request: dict[str, Any], out: Path, report: Report) -> None:
    """request: checkpoint, documents (file of texts or conversations), samples, length, seed, metric, token, dtype,
    part (file of the running sums, from which a pass goes on), commit_seconds (from one writing of it to the next).
    """
    device = device_of(request["runtime"])
    tokenizer = AutoTokenizer.from_pretrained(request["checkpoint"])
    samples = _samples(request, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype=getattr(torch, request["dtype"]))
    model = model.to(device).eval()
    blocks = decoder_blocks(model, model.config.get_text_config().num_hidden_layers)
    part = Path(request["part"])
    moments, bootstrap = _running_sums(part, request["seed"])
    batch, every_token = request["runtime"]["batch"], request["token"] == "mean"
    committed = time.monotonic()

    def add(of_samples: list[torch.Tensor]) -> None:
        nonlocal committed
        for states in of_samples:
            distances = pair_distances(states.float().numpy(), request["metric"])
            moments.add(distances)
            bootstrap.add(distances)
        if time.monotonic() - committed > request["commit_seconds"]:
            _commit(part, moments, bootstrap)
            committed = time.monotonic()
        report(moments.count / len(samples), f"{moments.count} of {len(samples)} samples")

    # A batch's states, whose distances are reckoned while a GPU works at the next batch.
    waiting: list[torch.Tensor] = []
    with torch.inference_mode():
        for first in range(moments.count, len(samples), batch):
            some = samples[first : first + batch]
            longest = max(map(len, some))
            ids = torch.tensor([sample + [0] * (longest - len(sample)) for sample in some], device=device)
            mask = torch.tensor([[1] * len(sample) + [0] * (longest - len(sample)) for sample in some], device=device)
            counted = [range(0 if every_token else len(sample) - 1, len(sample)) for sample in some]
            where = [(row, place) for row, own in enumerate(counted) for place in own]
            rows, places = torch.tensor(where, device=device).T
            with recorded_states(blocks, rows, places) as states:
                model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
            if waiting:
                add(waiting)
            of_samples = zip(*(state.split([len(own) for own in counted]) for state in states), strict=True)
            waiting = [torch.stack(own, dim=1).cpu() for own in of_samples]
        if waiting:
            add(waiting)

    mean, std = by_span(moments.mean), by_span(moments.std())
    measured = {"metric": request["metric"], "token": request["token"], "samples": len(samples)}
    (out / "distances.json").write_text(json.dumps({**measured, "mean": mean, "std": std}))
    ranked = {
        "samples": len(samples), "starts_by_count": ranking(mean), "first_share": bootstrap.first_share(),
        "warning": None if every_token else _same_ends(samples, tokenizer),
    }  # fmt: skip
    (out / "ranking.json").write_text(json.dumps(ranked))
    with (out / "tokens.jsonl").open("w") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples)


def _running_sums(part: Path, seed: int) -> tuple[RunningMoments, BootstrapRanking]:
    """Those that an interrupted pass committed, or empty ones."""
    bootstrap = BootstrapRanking(seed)
    if not part.exists():
        return RunningMoments(), bootstrap
    with safe_open(part, "np") as file:
        count = int(file.metadata()["count"])
        mean, squares, totals = (file.get_tensor(name) for name in ("mean", "squares", "totals"))
    bootstrap.resume(count, totals)
    return RunningMoments(count, mean, squares), bootstrap


def _commit(part: Path, moments: RunningMoments, bootstrap: BootstrapRanking) -> None:
    """The sums over the samples so far, in a file that appears whole."""
    unfinished = part.with_name(f".{part.name}")
    sums = {"mean": moments.mean, "squares": moments.squares, "totals": bootstrap.totals}
    save_file(sums, unfinished, {"count": str(moments.count)})
    unfinished.rename(part)


def _samples(request: dict[str, Any], tokenizer: Any) -> list[list[int]]:
    documents = json.loads(Path(request["documents"]).read_text())
    samples: list[list[int]] = []
    for document in documents:
        ids = tokenizer.encode(document) if isinstance(document, str) else prompt_ids(tokenizer, document)
        if len(ids) >= SHORTEST_SAMPLE:
            samples.append(ids[: request["length"]])
        if len(samples) == request["samples"]:
            break
    if not samples:
        raise DataError(f"score.calibration: no document has {SHORTEST_SAMPLE} tokens; give longer texts")
    return samples


def _same_ends(samples: list[list[int]], tokenizer: Any) -> str | None:
    """A warning when most samples end in one and the same token, whose states say little about text."""
    token, count = Counter(sample[-1] for sample in samples).most_common(1)[0]
    if len(samples) == 1 or count <= MOST_SAME_ENDS * len(samples):
        return None
    return (
        f"{count} of {len(samples)} calibration samples end in the token {tokenizer.decode([token])!r}: the states at "
        "the last token are mostly the same; calibrate on plain text, or set score.token to mean"
    )


if __name__ == "__main__":
    serve(score)
