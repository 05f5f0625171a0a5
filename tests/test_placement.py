"""What a Ray cluster is asked for. Ray itself is a stand-in here: no machine with GPUs can be had (see tests/ops)."""

from __future__ import annotations

from typing import Any

import pytest
from prefect_ray.context import RemoteOptionsContext

from tasks.distil import distil
from tasks.domain.errors import ConfigError
from tasks.domain.recipe import Runtime
from tasks.finetune import finetune, merge
from tasks.placement import on_ray


class Cluster:
    """Notes for each task how many GPUs it gets to itself."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}

    def submit(self, _task: Any, parameters: dict[str, Any]) -> str:
        self.asked[parameters["name"]] = RemoteOptionsContext.get().current_remote_options["num_gpus"]
        return str(parameters["name"])


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with two GPUs, one with four, one without any, and a dead one with eight."""
    found = [{"Alive": True, "Resources": {"GPU": count}} for count in (2.0, 4.0)]
    dead = {"Alive": False, "Resources": {"GPU": 8.0}}
    monkeypatch.setattr("ray.nodes", lambda: [*found, {"Alive": True, "Resources": {"CPU": 2.0}}, dead])


@pytest.mark.usefixtures("machines")
def test_a_shared_fine_tuning_has_a_gpu_of_the_cluster_for_each_process() -> None:
    cluster, runtime = Cluster(), Runtime(finetune_processes=4)
    submit = on_ray(cluster, runtime)
    for name, stage_task in (("finetune sft", finetune), ("merge sft", merge), ("distil", distil)):
        submit(name, stage_task, runtime)
    parts = {f"distil, part {part}": 1 for part in range(1, 7)}
    assert cluster.asked == {"finetune sft": 4, "merge sft": 0, "distil": 1, **parts}


@pytest.mark.usefixtures("machines")
def test_more_processes_than_the_largest_machine_has_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.finetune_processes=5: .* largest machine of the cluster has 4;"):
        on_ray(Cluster(), Runtime(finetune_processes=5))


def test_a_cluster_without_gpus_takes_any_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}] * 2)
    cluster, runtime = Cluster(), Runtime(finetune_processes=5)
    on_ray(cluster, runtime)("finetune sft", finetune, runtime)
    on_ray(cluster, runtime)("distil", distil, runtime)
    assert cluster.asked == dict.fromkeys(("finetune sft", "distil, part 1", "distil, part 2", "distil"), 0)
