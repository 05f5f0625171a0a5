"""Where a stage runs: in this process, as a run of its own on another work pool's machine, or in a Ray cluster.

The store is what the machines share: a stage that ran elsewhere is found there, whoever made it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import Task, task
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.states import Cancelling, Completed, State

from tasks.distil import distil, distil_part
from tasks.domain.errors import ArtifactError, ConfigError, EngineError
from tasks.domain.recipe import Preset, Runtime
from tasks.domain.stage import KEY_LENGTH, Stage
from tasks.drift import measure_drift
from tasks.engines.child import is_stopping, refuse_while_stopping
from tasks.evaluate import evaluate
from tasks.finetune import finetune
from tasks.materialise import Ref, ref_of
from tasks.policies import STAGE
from tasks.score import score_blocks
from tasks.store.artifacts import ArtifactStore

# submit(name, task, stage or stages, *further arguments of the task) -> a future of its ref or refs
Submit = Callable[..., Any]
Stages = Stage | Mapping[str, Stage]

POLL_SECONDS = 5.0
RAY = "ray"  # as runtime.engines_on
ENGINES: tuple[Task[..., Any], ...] = (score_blocks, distil, distil_part, finetune, evaluate, measure_drift)


@contextmanager
def placement(preset: Preset) -> Iterator[Submit]:
    """As runtime.engines_on says."""
    where = preset.runtime.engines_on
    if where == RAY:
        with ray_cluster() as cluster:
            yield on_ray(cluster, preset.runtime)
    else:
        yield engines_on(where, preset) if where else here


def here(_name: str, stage_task: Task[..., Any], *arguments: Any) -> Any:
    """Everything in this process."""
    return stage_task.submit(*arguments)


def engines_on(deployment: str, preset: Preset) -> Submit:
    """What needs the device as runs of this deployment of `run_stage`; pruning, merging and reports here."""

    def submit(name: str, stage_task: Task[..., Any], stages: Stages, *arguments: Any) -> Any:
        if stage_task not in ENGINES:
            return stage_task.submit(stages, *_without_device(arguments))
        return run_elsewhere.submit(name, stages, deployment, preset, arguments)

    return submit


@contextmanager
def ray_cluster(**options: Any) -> Iterator[Any]:
    """The task runner for the Ray cluster that RAY_ADDRESS names or that this machine is in, else for one of its own.

    Its machines share the store, and have the code, the libraries and the environment that a worker has.
    options: of `ray.remote`, for every task.
    """
    try:
        from prefect_ray import RayTaskRunner
        from prefect_ray.context import remote_options
    except ImportError:
        raise ConfigError(
            "runtime.engines_on=ray: prefect-ray is not installed; install this project with its extra ray, too"
        ) from None
    handler = signal.getsignal(signal.SIGTERM)
    with RayTaskRunner(init_kwargs={"include_dashboard": False, "log_to_driver": False}) as cluster:
        signal.signal(signal.SIGTERM, handler)  # ray.init has put its own in the place of Prefect's
        with remote_options(**options):
            yield cluster


def on_ray(cluster: Any, runtime: Runtime) -> Submit:
    """Every stage as a task of the cluster; what needs a device has a GPU to itself, where there are any.

    A fine-tuning has one for each of its processes. The rows are rewritten by as many tasks side by side as there are
    GPUs, else machines. Raises ConfigError where no machine has enough GPUs: the cluster would wait for one for ever.
    """
    import ray
    from prefect_ray.context import remote_options

    gpus = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]  # of each machine
    engines = sum(gpus) or len(gpus)
    if any(gpus) and runtime.finetune_processes > max(gpus):
        raise ConfigError(
            f"runtime.finetune_processes={runtime.finetune_processes}: each needs a GPU of its own, and the largest "
            f"machine of the cluster has {max(gpus)}; lower it"
        )

    def run(name: str, stage_task: Task[..., Any], arguments: Sequence[Any], after: Sequence[Any] = ()) -> Any:
        engine = stage_task in ENGINES
        parameters = {
            "name": name, "stage_task": stage_task, "_after": after,
            "arguments": arguments if engine else _without_device(arguments),
        }  # fmt: skip
        needed = runtime.finetune_processes if stage_task is finetune else 1
        with remote_options(num_gpus=needed if engine and any(gpus) else 0):
            return cluster.submit(run_on_ray, parameters)

    def submit(name: str, stage_task: Task[..., Any], *arguments: Any) -> Any:
        parts = range(engines if stage_task is distil else 0)
        made = [run(f"{name}, part {part + 1}", distil_part, (*arguments, part, len(parts))) for part in parts]
        return run(name, stage_task, arguments, made)

    return submit


@task(task_run_name="{name}", **STAGE)
def run_on_ray(name: str, stage_task: Task[..., Any], arguments: Sequence[Any], _after: Any) -> Any:
    """The stage, on the machine that Ray has chosen."""
    return stage_task.fn(*arguments)


def only(wanted: str, key: str) -> Submit:
    """One stage in this process, whose key (of the first, of several) is known; all others as the store has them.

    Raises ConfigError when this machine's libraries or settings give it another key.
    """
    store = ArtifactStore.from_environment()

    def submit(name: str, stage_task: Task[..., Any], stages: Stages, *arguments: Any) -> Any:
        if name != wanted:
            return _refs(store, stages)
        if _key(stages) != key:
            raise ConfigError(
                f"{name}: this worker would make {_key(stages)[:KEY_LENGTH]}, the run waits for {key[:KEY_LENGTH]}; "
                "give both machines the same code, lock file (make setup EXTRA=...) and SDD_DATA_ROOT"
            )
        for stage in [stages] if isinstance(stages, Stage) else stages.values():
            for role, needed in stage.inputs.items():
                if store.find(needed) is None:
                    raise ArtifactError(f"{name} needs its {role}, {needed.address}, which is not in {store.root}")
        return stage_task.submit(stages, *arguments)

    return submit


@task(task_run_name="{name}", **STAGE)
def run_elsewhere(name: str, stages: Stages, deployment: str, preset: Preset, _inputs: Any) -> State[Any]:
    """Wait for a run of the deployment that makes this stage, unless its artifact exists; returns its ref or refs.

    _inputs: what has to exist before. A run whose worker died is started again; one that failed has had its retries.
    When this run is stopped, that one is cancelled.
    """
    store = ArtifactStore.from_environment()
    if found := _refs(store, stages):
        return Completed(name="Cached", message=f"{name} exists", data=found)
    parameters = {"preset": preset.model_dump(mode="json"), "name": name, "key": _key(stages)}
    run = run_deployment(deployment, parameters=parameters, timeout=0)
    with get_client(sync_client=True) as client:
        while not run.state.is_final():
            if is_stopping(POLL_SECONDS):
                client.set_flow_run_state(run.id, Cancelling(message="the run that waits for it is being stopped"))
                refuse_while_stopping(name)
            run = client.read_flow_run(run.id)
    if not run.state.is_completed():
        why = f"{run.state.name}: {run.state.message}"
        raise EngineError(f"{name}: its run {run.name} of {deployment} ended {why}", retryable=run.state.is_crashed())
    found = _refs(store, stages, cache="miss")
    if found is None:
        raise ArtifactError(
            f"{name}: {deployment} ended well, but its artifact is not in {store.root}; one store for both"
        )
    return Completed(message=f"made by {run.name}", data=found)


def _without_device(arguments: Sequence[Any]) -> list[Any]:
    """The preset's device is that of the machines with the engines."""
    return [a.model_copy(update={"device": "auto"}) if isinstance(a, Runtime) else a for a in arguments]


def _key(stages: Stages) -> str:
    return stages.key if isinstance(stages, Stage) else next(iter(stages.values())).key


def _refs(store: ArtifactStore, stages: Stages, cache: str = "hit") -> Ref | dict[str, Ref] | None:
    """The refs of what the store has, all of it or None."""
    if isinstance(stages, Stage):
        manifest = store.find(stages)
        return ref_of(store, manifest, cache) if manifest else None
    refs = {name: _refs(store, stage, cache) for name, stage in stages.items()}
    return None if None in refs.values() else {name: ref for name, ref in refs.items() if ref is not None}
