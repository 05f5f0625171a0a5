"""What benchmarks work on: models, rows and servers."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.record import gpus


def keep_settings() -> None:
    """Import the tests' fixtures, which clear the settings from outside, and put those back."""
    settings = dict(os.environ)
    import tests.conftest  # noqa: F401

    os.environ.update(settings)


def device() -> str:
    return "cuda" if gpus() else "cpu"


def fresh(call: Callable[..., Any], *arguments: Any) -> Any:
    """The call's result, made in a process of its own with the settings that the pipeline's children have."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_as_a_child, call, *arguments).result()


def _as_a_child(call: Callable[..., Any], *arguments: Any) -> Any:
    from tasks.domain.recipe import Runtime
    from tasks.engines.child import _environment

    os.environ.update(_environment(Runtime()))
    return call(*arguments)


def benchmark_rows(count: int) -> list[dict[str, Any]]:
    """Rows of the datasets of a preset, as many of each; again from the first where there are fewer."""
    from tasks.domain.recipe import load_preset
    from tasks.rows import draw

    dataset = load_preset("smollm2-135m" if os.environ.get("SDD_DATA_ROOT") else "demo-cpu").dataset
    share = -(-count // len(dataset.sources))
    found = [row for source in dataset.sources for row in itertools.islice(draw(source, dataset.seed), share)]
    repeated = itertools.islice(itertools.cycle(found), count)
    return [{**row, "id": f"{number:05d}-{row['id']}"} for number, row in enumerate(repeated)]


@contextmanager
def servers(folder: Path, *, prefect: bool) -> Iterator[None]:
    """A Prefect server if asked for, and an S3 server or, where its program is missing, a folder."""
    os.environ["SDD_STATE"] = str(folder / "state")
    os.environ["SDD_MIRROR"] = str(folder / "mirror")
    from deployments.local import environment

    if not Path(sys.executable).with_name("weed").exists():
        os.environ.setdefault("SDD_STORE", f"file://{folder / 'store'}")
    with environment(prefect=prefect):
        yield


def random_model(folder: Path, hidden: int = 576, layers: int = 30, heads: int = 9) -> Path:
    """SmolLM2-135M's shape, or a like one. Its tokenizer knows as many tokens, most of which no text is cut into."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import build_tokenizer

    vocabulary = 49152
    tokenizer = build_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    known = state["model"]["vocab"]
    state["model"]["vocab"] = known | {f"\u0120word{number}": number for number in range(len(known), vocabulary)}
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": state["model"]}))
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // (4 if heads % 3 else 3),
        tie_word_embeddings=True, max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device()):
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
