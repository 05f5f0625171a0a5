"""Every shipped preset is loaded and planned. The hub cannot be had here: a local server stands in for its API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.algorithms.prune_plan import layers_of, pruned_config, renamed
from tasks.domain.recipe import PRESETS
from tasks.domain.span import Span
from tests.conftest import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": False,
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """The two calls of the hub's API that planning makes."""

    def do_GET(self) -> None:
        if "/revision/" in self.path:
            self._answer({"id": "x", "sha": COMMIT})
        elif self.path.endswith("/config.json"):
            self._answer(LLAMA_8B)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        for name, text in (("X-Repo-Commit", COMMIT), ("ETag", '"1"'), ("Content-Length", str(len(body)))):
            self.send_header(name, text)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run_python(*arguments: str, hub: str, cache: str) -> str:
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": cache}
    environment.pop("SDD_DATA_ROOT", None)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_preset_is_planned(name: str, hub: str, stack: dict[str, str], tmp_path: os.PathLike[str]) -> None:
    lines = run_python("-m", "flows.recover", name, "--plan", hub=hub, cache=str(tmp_path)).splitlines()
    assert len(lines) == 42
    assert all(line.startswith(("miss ", "hit ")) for line in lines)
    assert sum(" evaluate " in line for line in lines) == 28


def test_hub_revisions_enter_the_paper_preset_as_commits(
    hub: str, stack: dict[str, str], tmp_path: os.PathLike[str]
) -> None:
    code = (
        "from flows.plan import build_plan; from tasks.domain.recipe import load_preset; import json;"
        "from tasks.store.sources import model_config; from tasks.algorithms.prune_plan import layers_of;"
        "preset = load_preset('paper-llama3.1-8b'); plan = build_plan(preset);"
        "print(json.dumps([plan.model.recipe['revision'], plan.rows.recipe['sources'][0]['revision'],"
        "layers_of(model_config(preset.model))]))"
    )
    assert json.loads(run_python("-c", code, hub=hub, cache=str(tmp_path))) == [COMMIT, COMMIT, 32]


def test_paper_cut_saves_the_papers_flops() -> None:
    """6 of 32 blocks of Llama-3.1-8B: 8.03B -> 6.72B parameters, 16.30 % (paper, abstract)."""
    span = Span(20, 6, layers_of(LLAMA_8B))
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in LLAMA_8B.items() if k != "architectures"}))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    kept = sum(sizes[name] for name in renamed(sizes, span))
    total = sum(sizes.values())
    assert round(total / 1e9, 2) == 8.03
    assert round(kept / 1e9, 2) == 6.72
    assert round(100 * (total - kept) / total, 2) == 16.30
    assert pruned_config(LLAMA_8B, span)["num_hidden_layers"] == 26
