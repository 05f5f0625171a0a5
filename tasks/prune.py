"""Remove the least important span of blocks from the checkpoint on disk (paper, section 2.1)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from prefect import task
from prefect.states import State

from tasks.algorithms.prune_plan import layers_of, pruned_config, renamed
from tasks.domain.recipe import Prune, Runtime
from tasks.domain.span import Span
from tasks.domain.stage import Stage
from tasks.engines.child import Progress, run_child
from tasks.materialise import Ref, folder_of, materialise
from tasks.policies import STAGE
from tasks.store.checkpoint import INDEX, model_tensors, tensors_of, write_renamed


@task(task_run_name="prune {stage.slug}", **STAGE)
def prune(stage: Stage, model: Ref, distances: Ref, settings: Prune, runtime: Runtime) -> State[Ref]:
    """Write the pruned checkpoint and span.json, after the gate. facts: span, layers, parameters, bytes, FLOPs."""

    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        original, scores = folder_of(model), folder_of(distances)
        config = json.loads((original / "config.json").read_text())
        spans = ranked_spans(scores, settings.blocks, layers_of(config))[: settings.candidates]
        if len(spans) > 1:
            request = {
                "checkpoint": str(original), "tokens": str(scores / "tokens.jsonl"), "dtype": "float32",
                "starts": [span.start for span in spans], "count": settings.blocks,
            }  # fmt: skip
            run_child("candidates", request, out, runtime, progress)
            found = json.loads((out / "candidates.json").read_text())
            spans.sort(key=lambda span: next(each["perplexity"] for each in found if each["start"] == span.start))
        span = spans[0]
        facts = cut(original, out, span)
        measured, ranked = (json.loads((scores / name).read_text()) for name in ("distances.json", "ranking.json"))
        facts["span"] = {
            "start": span.start, "count": span.count, "removed": span.removed, "words": str(span),
            "distance": measured["mean"][span.count - 1][span.start], "metric": measured["metric"],
            "first_share": ranked["first_share"][span.count - 1][span.start],
        }  # fmt: skip
        (out / "span.json").write_text(json.dumps(facts["span"], indent=1))
        progress(0.2, str(span))
        request = {
            "original": str(original), "pruned": str(out), "removed": span.removed, "parameters": facts["parameters"],
        }  # fmt: skip
        run_child("verify", request, out, runtime, progress)
        return facts

    return materialise(stage, produce, runtime)


def refuse_what_cannot_be_cut(checkpoint: Path) -> None:
    """Raises ModelUnsupported for what makes every cut impossible, so that no scoring is paid for in vain."""
    config = json.loads((checkpoint / "config.json").read_text())
    renamed(model_tensors(tensors_of(checkpoint), config), Span(0, 1, layers_of(config)))


def ranked_spans(scores: Path, count: int, layers: int) -> list[Span]:
    """All spans of so many blocks, least important first; raises ConfigError when so many blocks cannot go."""
    Span(0, count, layers)
    starts = json.loads((scores / "ranking.json").read_text())["starts_by_count"]
    return [Span(start, count, layers) for start in starts[count - 1]]


def cut(original: Path, out: Path, span: Span) -> dict[str, Any]:
    """Write the checkpoint without the span's blocks, what comes along with it, and a model card that says so.

    Comes along: every file that is no weight (generation config, tokenizer, chat template, licence).
    facts: layers, parameters, bytes, and the share of the parameters (of the matrix FLOPs a token) that is gone.
    """
    config = json.loads((original / "config.json").read_text())
    tensors = model_tensors(tensors_of(original), config)
    names = renamed(tensors, span)
    for path in original.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "README.md", INDEX):
            shutil.copyfile(path, out / path.name)
    (out / "config.json").write_text(json.dumps(pruned_config(config, span), indent=2) + "\n")
    write_renamed(tensors, names, out)
    before = sum(tensor.parameters for tensor in tensors.values())
    after = sum(tensors[name].parameters for name in names)
    facts = {
        "layers": span.layers - span.count, "parameters": after, "bytes": sum(tensors[name].size for name in names),
        "flops_saved_percent": 100 * (before - after) / before,
    }  # fmt: skip
    _write_card(original, out, span, facts)
    return facts


def _write_card(original: Path, out: Path, span: Span, facts: dict[str, Any]) -> None:
    card = original / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else f"# {original.name}\n"
    (out / "README.md").write_text(
        f"{text.rstrip()}\n\n## Pruned\n\nThis checkpoint {span}: {facts['layers']} of {span.layers} blocks and "
        f"{facts['parameters']:,} parameters are left, as in self-data distillation (arXiv 2410.09982).\n"
    )
