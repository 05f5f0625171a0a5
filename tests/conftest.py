"""Shared fixtures: real servers, and a pico model that every engine really runs."""

from __future__ import annotations

import atexit
import gzip
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples on every machine, and no failure because a machine is slow.
settings.register_profile("repository", deadline=None, derandomize=True)
settings.load_profile("repository")

ROOT = Path(__file__).parents[1]
PAIRS = ROOT / "deployments" / "pocket" / "pairs.jsonl"
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


# Before anything of the project is imported: a state folder of this session's own, and no settings from outside.
for name in [name for name in os.environ if name.startswith(("SDD_", "AWS_", "PREFECT_"))]:
    del os.environ[name]
os.environ["SDD_STATE"] = STATE = tempfile.mkdtemp(prefix="sdd-tests-")
atexit.register(shutil.rmtree, STATE, ignore_errors=True)


@pytest.fixture(scope="session")
def stack() -> Iterator[dict[str, str]]:
    """A real S3 server and a real Prefect server; yields the environment that names them."""
    from deployments.local import environment

    with environment(prefect=True):
        yield dict(os.environ)


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of six blocks, tied embeddings, and a tokenizer trained on the pocket pairs."""
    return build_pico(tmp_path_factory.mktemp("pico"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, to be mounted by root; `enlarge` makes room on it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # lazy: the mirror's locks are held to the end


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)


RESULT = ("model", "span", "pruned", "dataset", "chance", "difference", "training", "models")  # of a report.json


def comparable_report(folder: Path) -> dict[str, Any]:
    """Its report.json, with addresses relative to the run's store."""
    text = (folder / "report.json").read_text()
    return dict(json.loads(re.sub(r"s3://sdd/[^/\"]+/", "", text)))


def result_of(report: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on when, where and how often a run was started."""
    return {name: report[name] for name in RESULT}


def build_pico(folder: Path, **changes: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|start|>", "<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((pair["answer"] for pair in pocket_pairs()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|start|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=TEMPLATE,
    )


def pocket_pairs() -> list[dict[str, str]]:
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode())) if path.suffix == ".gz" else path.write_text(text)
    return path


def descendants(parent: int) -> list[int]:
    """Processes below `parent`, zombies left out."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                found += [int(entry.name), *descendants(int(entry.name))]
    return found
