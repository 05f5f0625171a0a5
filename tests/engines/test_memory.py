"""A device short of memory: the next child of its kind takes smaller batches, until they fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tasks.domain.errors import OutOfMemory
from tasks.domain.recipe import Runtime
from tasks.engines import child
from tasks.engines.children.border import as_told
from tests.conftest import pocket_pairs
from tests.engines.test_distil import OWN_PROCESS, written

# No device here can be filled: scoring finds no room for more than two sequences, vLLM for none.
FULL = """
import sys
if {"tasks.engines.children.distil", "--multiprocessing-fork"} & set(sys.orig_argv):  # and the engine of its own
    import torch
    def embedding(*_arguments, **_settings):
        raise torch.OutOfMemoryError("CUDA out of memory")
    torch.nn.functional.embedding = embedding
if "tasks.engines.children.score" in sys.orig_argv:
    import torch
    original = torch.nn.Embedding.forward
    def forward(self, ids):
        if ids.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, ids)
    torch.nn.Embedding.forward = forward
"""


def test_batches_are_halved_until_they_fit(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(FULL)
    monkeypatch.setattr(child, "_short_of_memory", type(child._short_of_memory)())

    (tmp_path / "documents.json").write_text(json.dumps([pair["answer"] * 4 for pair in pocket_pairs()[:12]]))
    request = {
        "checkpoint": str(pico), "documents": str(tmp_path / "documents.json"), "samples": 8, "length": 32, "seed": 0,
        "metric": "angular", "token": "last", "dtype": "float32", "commit_seconds": 3600,
    }  # fmt: skip

    def score(out: str) -> str:
        child.run_child(
            "score",
            {**request, "part": str(tmp_path / f"{out}-sums")},
            tmp_path / out,
            Runtime(device="cpu", batch=8),
            lambda done, text: None,
        )
        return (tmp_path / out / "distances.json").read_text()

    undisturbed = score("undisturbed")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for _ in range(2):  # batches of 8, then 4
        with pytest.raises(OutOfMemory, match="out of memory"):
            score("full")
    assert json.loads(score("halved"))["samples"] == json.loads(undisturbed)["samples"] == 8


@pytest.mark.parametrize("own_process", ["0", "1"])
def test_an_engine_short_of_memory_is_told_from_one_that_crashed(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_process: str
) -> None:
    """Of a process of its own, the child hears only that it died."""
    (tmp_path / "sitecustomize.py").write_text(FULL)
    monkeypatch.setattr(child, "_short_of_memory", type(child._short_of_memory)())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(OWN_PROCESS, own_process)
    with pytest.raises(OutOfMemory, match="out of memory"):
        written(pico, tmp_path, [("a", 0, 5)])
    assert child._short_of_memory["distil"] == 1


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),  # CUDA's own, of a library's allocation
        (ValueError("Free memory on device is less than desired GPU memory utilization (0.9)"), True),  # vLLM's
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (MemoryError("out of memory"), False),
    ],
)
def test_errors_that_say_a_device_is_full(error: Exception, short: bool) -> None:
    assert isinstance(as_told(error), OutOfMemory) == short
