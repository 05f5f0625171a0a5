"""The real engine on a pico model: shards, their rows, and log-probabilities."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.domain.errors import ConfigError
from tasks.domain.recipe import Distil, Runtime
from tasks.engines.child import run_child
from tasks.engines.children.distil import _answer
from tests.conftest import ROOT, build_pico, pocket_pairs
from tests.engines.test_child import ends, quiet

RUNTIME = Runtime(device="cpu", kv_cache_gb=1, timeout_minutes=5)
SETTINGS = Distil(
    max_tokens=12, max_length=700, attempts=2, min_accept_rate=0, dtype="float32", top_logprobs=3, min_length_ratio=0
)


OWN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"  # of vLLM's engine: "0" without a GPU, "1" with one

# A run that is killed at the child's first report, and tells before who works for it.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from tasks.domain.recipe import Runtime
from tasks.engines.child import run_child
from tests.conftest import descendants

def die(_done, _text):
    print(*descendants(os.getpid()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

run_child("distil", json.loads(sys.argv[1]), Path(sys.argv[2]), Runtime(device="cpu", kv_cache_gb=1), die)
"""


def request_on(
    pico: Path, folder: Path, shards: list[tuple[str, int, int]], settings: Distil = SETTINGS
) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    made = [
        {"id": f"r-{number}", "source": "pocket", "kind": "instruction", "reference": pair["answer"],
         "prompt": [{"role": "user", "content": "word " * 900 if number == 3 else pair["instruction"]}]}
        for number, pair in enumerate(pocket_pairs()[:12])
    ]  # fmt: skip
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    (folder / "parts").mkdir()
    return {"checkpoint": str(pico), "rows": str(rows), "shards": shards, "parts": str(folder / "parts"),
            **settings.model_dump(), "messages": settings.messages()}  # fmt: skip


def written(
    pico: Path, folder: Path, shards: list[tuple[str, int, int]], settings: Distil = SETTINGS
) -> dict[str, list[dict[str, Any]]]:
    """The rows of each shard that the child wrote."""
    run_child("distil", request_on(pico, folder, shards, settings), folder / "out", RUNTIME, quiet)
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((folder / "parts").iterdir())
    }


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model that ends its answers: at every fourth token, none of them a special one but the first."""
    return build_pico(tmp_path_factory.mktemp("ending"), eos_token_id=list(range(1, 500, 4)))


@pytest.fixture(scope="module")
def whole(ending: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return written(ending, tmp_path_factory.mktemp("whole"), [("a", 0, 5), ("b", 5, 12)])


def test_every_row_is_decided_in_its_shard_and_order(whole: dict[str, list[dict[str, Any]]]) -> None:
    assert {name: [row["id"] for row in rows] for name, rows in whole.items()} == {
        "a": [f"r-{number}" for number in range(5)], "b": [f"r-{number}" for number in range(5, 12)],
    }  # fmt: skip
    for row in whole["a"] + whole["b"]:
        if row["id"] == "r-3":
            assert (row["outcome"], row["reason"], row["answer"]) == ("failed", "prompt too long", None)
        elif row["outcome"] == "accepted":
            assert row["answer"] == row["rewrite"] and row["reason"] == ""
        else:
            assert row["outcome"] == "kept_original" and row["answer"] == row["reference"] and row["reason"]


@pytest.mark.parametrize(
    ("kind", "rewrite", "answer"),
    [
        ("math", "2 + 3 = 5. The answer is 5.", "2 + 3 = 5. The answer is 5.\n#### 5"),
        ("math", "2 + 3 = 5\n#### 5", "2 + 3 = 5\n#### 5"),
        ("instruction", "It is 5.", "It is 5."),
    ],
)
def test_an_accepted_worked_answer_ends_as_its_reference_does(kind: str, rewrite: str, answer: str) -> None:
    assert _answer({"kind": kind, "reference": "2+3=<<2+3=5>>5\n#### 5", "rewrite": rewrite}) == answer


def test_a_length_beyond_the_models_is_a_wrong_setting(pico: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^max_length=2049 is more than .* \(max_position_embeddings=2048.*\); lower it$"
    ):
        written(pico, tmp_path, [("a", 0, 5)], SETTINGS.model_copy(update={"max_length": 2049}))


@pytest.mark.parametrize("own_process", ["0", "1"])
def test_a_shard_alone_has_the_same_bytes(
    ending: Path, whole: dict[str, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    own_process: str,
) -> None:  # fmt: skip
    """What an interrupted run has left to do, or another worker does, does not depend on the rows beside it."""
    monkeypatch.setenv(OWN_PROCESS, own_process)
    alone = written(ending, tmp_path, [("b", 5, 12)])
    assert alone.keys() == {"b"}
    texts = [[(row["id"], row["rewrite"], row["outcome"]) for row in rows] for rows in (alone["b"], whole["b"])]
    assert texts[0] == texts[1]


def test_rewrites_and_log_probabilities_are_of_the_tokens_generated(
    ending: Path, whole: dict[str, list[dict[str, Any]]]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ending)
    accepted = [row for row in whole["a"] + whole["b"] if row["outcome"] == "accepted"]
    assert len(accepted) > 3
    assert all(("logprobs" in row) == (row["outcome"] == "accepted") for row in whole["a"] + whole["b"])
    for row in accepted:
        tokens, top = row["logprobs"]["tokens"], row["logprobs"]["top"]
        assert tokens[-1] % 4 == 1 and all(token % 4 != 1 for token in tokens[:-1])
        text = tokenizer.decode(tokens[:-1], skip_special_tokens=True)  # what ends it is no part of it
        assert text.strip() == row["rewrite"]
        for token, entries in zip(tokens, top, strict=True):
            assert token in [entry[0] for entry in entries] and len(entries) in (3, 4)
            assert all(entry[1] <= 0 for entry in entries)


@pytest.mark.parametrize(("own_process", "least"), [("0", 2), ("1", 4)])
def test_what_works_for_a_run_does_not_outlive_it(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_process: str, least: int
) -> None:
    """The child, the process beside it, and on demand vLLM's engine and its worker."""
    monkeypatch.setenv(OWN_PROCESS, own_process)
    request = request_on(pico, tmp_path, [("a", 0, 5)])
    died = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(request), str(tmp_path / "out")], cwd=ROOT, timeout=200,
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL
    working = [int(pid) for pid in died.stdout.splitlines()[-1].split()]
    assert len(working) >= least
    assert all(map(ends, working))
