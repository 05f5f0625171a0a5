"""Score a published checkpoint alone, e.g. on tasks or items that its run left out.

prefect deployment run evaluate/checkpoint --param checkpoint=merge/smollm2-135m-instruct-n6-sdd-7cd2e0a5afb7 ...
"""

from __future__ import annotations

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run

from flows.artifacts import find_entry
from flows.plan import benchmark_items, evaluations
from tasks.benchmarks import load_benchmarks
from tasks.domain.errors import ConfigError
from tasks.domain.recipe import Evaluate, Runtime
from tasks.domain.stage import KEY_LENGTH, Stage
from tasks.engines.child import children_end_with_the_run
from tasks.evaluate import evaluate
from tasks.materialise import ref_of
from tasks.store.artifacts import ArtifactStore, Manifest

CHECKPOINTS = ("model", "prune", "merge")  # stages whose artifact is a checkpoint


@flow(name="evaluate", flow_run_name="evaluate {checkpoint}", persist_result=False)
def evaluate_checkpoint(checkpoint: str, settings: Evaluate, runtime: Runtime = Runtime()) -> dict[str, float]:  # noqa: B008
    """The checkpoint's score on each task; what its own run has measured is not measured again.

    checkpoint: address, URI or first digits of the key (see `flows.artifacts list`) of a model, prune or merge stage.
    Raises ConfigError when there is no such checkpoint.
    """
    store = ArtifactStore.from_environment()
    store.check()
    manifest = store.manifest_at(f"{store.root}/{find_entry(store, checkpoint).address}")
    if manifest.stage not in CHECKPOINTS:
        raise ConfigError(
            f"checkpoint={checkpoint}: an artifact of stage {manifest.stage}; give one of {', '.join(CHECKPOINTS)}"
        )
    with children_end_with_the_run():
        wheel = benchmark_items(settings)
        items = load_benchmarks.submit(wheel, settings.benchmarks) if wheel else None
        slug = manifest.address.split("/")[1][: -KEY_LENGTH - 1]
        scored = published(manifest, slug)
        stages = evaluations(settings, scored, slug)
        store.announce(str(flow_run.id), filter(None, [wheel, scored, *stages.values()]))
        refs = evaluate.submit(stages, slug, ref_of(store, manifest, "hit"), items, settings, runtime).result()
    scores = {task: ref["facts"] for task, ref in refs.items()}
    fields = ("metric", "value", "stderr", "items")
    table = [{"task": task, **{name: facts[name] for name in fields}} for task, facts in scores.items()]
    create_table_artifact(table, key="scores", description=manifest.address)
    return {task: float(facts["value"]) for task, facts in scores.items()}


def published(manifest: Manifest, slug: str) -> Stage:
    """The stage that made an artifact; of its inputs only the keys are known, so its own key is taken as it is."""
    identity = manifest.identity
    stage = Stage(identity["stage"], identity["version"], identity["recipe"], slug=slug)
    stage.__dict__["key"] = manifest.key
    return stage
