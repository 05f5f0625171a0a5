"""How far a model has drifted from the unpruned one (the paper's account of why SFT forgets: distribution shift)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from prefect import task
from prefect.states import State

from tasks.domain.recipe import HeldOut, Runtime
from tasks.domain.stage import Stage, json_lines
from tasks.engines.child import Progress, run_child
from tasks.materialise import Ref, folder_of, materialise
from tasks.policies import STAGE
from tasks.store.sources import read_table


@task(task_run_name="drift {role}", **STAGE)
def measure_drift(
    stage: Stage, role: str, model: Ref, checkpoint: Ref, rows: Ref, settings: HeldOut, runtime: Runtime
) -> State[Ref]:
    """Write drift.json. facts: perplexity, kl_to_unpruned, own_logprob, and the tokens that each was taken over."""

    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        table = read_table(settings, settings.fields, stage.recipe.get("revision"))
        documents = ["\n\n".join(str(row[name] or "") for name in settings.fields) for row in table]
        lines = json_lines(folder_of(rows) / "rows.jsonl")[: settings.prompts]
        with tempfile.TemporaryDirectory() as scratch:
            text, prompts = Path(scratch, "text.json"), Path(scratch, "prompts.json")
            text.write_text(json.dumps(documents))
            prompts.write_text(json.dumps([json.loads(line)["prompt"] for line in lines]))
            request = {
                "original": str(folder_of(model)), "checkpoint": str(folder_of(checkpoint)),
                "text": str(text), "prompts": str(prompts),
                **settings.model_dump(include={"windows", "length", "generated", "dtype", "seed"}),
            }  # fmt: skip
            run_child("drift", request, out, runtime, progress)
        return dict(json.loads((out / "drift.json").read_text()))

    return materialise(stage, produce, runtime)
