"""Fine-tuning of the pruned model and the merge of its adapter (paper, section 2.3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect import task
from prefect.states import State

from tasks.domain.recipe import Finetune, Runtime
from tasks.domain.stage import Stage
from tasks.engines.child import Progress, run_child
from tasks.materialise import Ref, folder_of, materialise, parts_of
from tasks.model import checkpoint_facts
from tasks.policies import STAGE

COMMIT_SECONDS = 120  # a killed training repeats at most about so much


@task(task_run_name="finetune {stage.slug}", **STAGE)
def finetune(stage: Stage, pruned: Ref, distilled: Ref, settings: Finetune, runtime: Runtime) -> State[Ref]:
    """Write the adapter and loss.jsonl. facts: rows, trained tokens, steps. The arm is in the stage's recipe.

    An interrupted training goes on from the state that it last committed.
    """
    rates = settings.learning_rate if isinstance(settings.learning_rate, tuple) else (settings.learning_rate,)
    states = [f"{stage.key}-{rate}.safetensors" for rate in rates]

    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        with parts_of("finetune", progress, states, shared=False) as (parts, committing):
            request = {
                "checkpoint": str(folder_of(pruned)), "rows": str(folder_of(distilled) / "rows.jsonl"),
                "answers": stage.recipe["answers"], "parts": str(parts), "name": stage.key,
                "commit_seconds": COMMIT_SECONDS, **settings.model_dump(),
            }  # fmt: skip
            run_child("finetune", request, out, runtime, committing)
        return dict(json.loads((out / "tokens.json").read_text()))

    return materialise(stage, produce, runtime, slots=runtime.finetune_processes, pieces=states)


@task(task_run_name="merge {stage.slug}", **STAGE)
def merge(stage: Stage, pruned: Ref, adapter: Ref, runtime: Runtime) -> State[Ref]:
    """Write the merged checkpoint, after its gate. facts: layers, parameters, bytes."""

    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        base, trained = folder_of(pruned), folder_of(adapter)
        run_child("merge", {"checkpoint": str(base), "adapter": str(trained)}, out, runtime, progress)
        lora = (trained / "adapter_config.json").exists()
        how = "with LoRA, the adapter merged into the weights" if lora else "in all weights"
        (out / "README.md").write_text(
            f"{(base / 'README.md').read_text(encoding='utf-8').rstrip()}\n\n## Recovered\n\n"
            f"Fine-tuned {how} ({stage.slug}).\n"
        )
        return checkpoint_facts(out)

    return materialise(stage, produce, runtime)
