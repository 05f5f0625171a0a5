"""kill -9 of the flow in one stage after the other: the next run goes on, and the report is the undisturbed one's.

The automations mark the killed runs as crashed, though nobody deployed them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client

from tasks.domain.recipe import Preset
from tests.conftest import ROOT, comparable_report, result_of
from tests.ops.conftest import eventually

KILLED_IN = ("score", "distil", "prune", "finetune", "merge", "evaluate", "drift")


@pytest.fixture
def whole_preset(operations: Path, tmp_path: Path) -> Path:
    """All kinds of stages, with one task."""
    tree = yaml.safe_load(operations.read_text())
    tree["evaluate"]["tasks"] = {"arc_challenge": {"shots": 1, "limit": 4}}
    Preset.model_validate(tree)
    path = tmp_path / "pico.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(preset: Path, store: str, mirror: Path, killed_in: str | None = None) -> dict[str, Any] | None:
    """The report, or None when the run was killed as soon as a stage of this kind said that it is at work."""
    environment = os.environ | {"SDD_STORE": store, "SDD_MIRROR": str(mirror)}
    # The prune may have ended beside the generation, in which the run before was killed.
    refresh = ["--refresh", "prune"] if killed_in == "prune" else []
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.recover", str(preset), *refresh], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if killed_in and re.search(f"Task run '{killed_in}.*' - {killed_in} ", line):
            process.kill()
            process.communicate()
            return None
    assert process.wait() == 0, "".join(lines[-40:])
    assert not killed_in, f"no stage {killed_in} was at work"
    return comparable_report(Path(lines[-1].strip().removeprefix("report: ")))


def test_a_run_that_is_killed_in_every_stage_ends_as_an_undisturbed_one(whole_preset: Path, tmp_path: Path) -> None:
    undisturbed = run(whole_preset, "s3://sdd/undisturbed", tmp_path / "undisturbed")
    assert undisturbed is not None
    for stage in KILLED_IN:
        assert run(whole_preset, "s3://sdd/killed", tmp_path / "killed", killed_in=stage) is None
    ended = run(whole_preset, "s3://sdd/killed", tmp_path / "killed")
    assert ended is not None
    assert result_of(ended) == result_of(undisturbed)
    keys = {stage["name"]: stage["key"] for stage in undisturbed["stages"]}
    assert {stage["name"]: stage["key"] for stage in ended["stages"]} == keys
    with get_client(sync_client=True) as client:
        eventually(
            lambda: not [r for r in client.read_flow_runs() if r.state and r.state.is_running()],
            "the end of the killed runs in the server's eyes",
        )
    hits = {stage["name"] for stage in ended["stages"] if stage["cache"] == "hit"}
    assert hits >= {"model", "rows", "score", "distil", "prune", "finetune sft", "finetune sdd"}
