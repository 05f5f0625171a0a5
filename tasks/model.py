"""The unpruned model as an artifact: a plain safetensors checkpoint with tokenizer and model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from prefect import task
from prefect.states import State

from tasks.algorithms.prune_plan import layers_of
from tasks.domain.recipe import FolderModel, HubModel, ModelSource, Runtime
from tasks.domain.stage import Stage
from tasks.engines.child import Progress, run_child
from tasks.materialise import Ref, materialise
from tasks.policies import STAGE
from tasks.store.checkpoint import count_parameters
from tasks.store.sources import checkpoint_files, gguf_file, hub_snapshot


@task(task_run_name="model {stage.slug}", **STAGE)
def resolve_model(stage: Stage, source: ModelSource, runtime: Runtime) -> State[Ref]:
    """Bring the model from the hub, a folder or a GGUF file into the store. facts: layers, parameters, bytes."""

    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        if isinstance(source, HubModel):
            _copy(hub_snapshot(source, stage.recipe["revision"]), out)
        elif isinstance(source, FolderModel):
            _copy(Path(source.path), out)
        else:
            run_child("convert", {"gguf": str(gguf_file(source)), "dtype": source.dtype}, out, runtime, progress)
            (out / "README.md").write_text(
                f"---\nlicense: {source.licence or 'other'}\n---\n\n# {source.id}\n\n"
                f"Dequantized to {source.dtype} from a GGUF file with sha256 `{source.sha256}`.\n"
            )
        if not (card := out / "README.md").exists():
            card.write_text(f"# {stage.slug}\n")
        return checkpoint_facts(out)

    return materialise(stage, produce, runtime)


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """layers, parameters and bytes of the weights of a checkpoint folder."""
    config = json.loads((folder / "config.json").read_text())
    return {
        "layers": layers_of(config),
        "parameters": count_parameters(folder, config),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }


def _copy(folder: Path, out: Path) -> None:
    for path in checkpoint_files(folder):
        shutil.copyfile(path, out / path.name)
