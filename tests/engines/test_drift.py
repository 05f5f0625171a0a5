"""Perplexity, divergence and own log-probability against sums over every token."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.algorithms.prompts import prompt_ids
from tasks.domain.errors import DataError
from tasks.domain.recipe import Runtime
from tasks.engines.children.drift import LOGITS, drift
from tests.conftest import build_pico, pocket_pairs
from tests.engines.test_child import quiet

TEXTS = [pair["answer"] for pair in pocket_pairs()[:10]]
PROMPTS = [[{"role": "user", "content": pair["instruction"]}] for pair in pocket_pairs()[:5]]


def measured(original: Path, checkpoint: Path, folder: Path, texts: list[str] = TEXTS, **fields: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    (folder / "text.json").write_text(json.dumps(texts))
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    request = {
        "original": str(original), "checkpoint": str(checkpoint), "text": str(folder / "text.json"),
        "prompts": str(folder / "prompts.json"), "windows": 4, "length": 32, "generated": 12, "dtype": "float32",
        "seed": 0, "runtime": Runtime(device="cpu", batch=3).model_dump(), **fields,
    }  # fmt: skip
    drift(request, folder, quiet)
    return dict(json.loads((folder / "drift.json").read_text()))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, with larger weights so that its distributions are not flat."""
    return build_pico(tmp_path_factory.mktemp("other"), initializer_range=0.2)


@pytest.mark.parametrize("at_a_time", [1, 3, 4])
@torch.inference_mode()
def test_perplexity_and_divergence_equal_the_sums(
    pico: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    monkeypatch.setitem(LOGITS, "cpu", at_a_time * 32 * 500)
    found = measured(pico, other, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(pico)
    ids = tokenizer.encode("\n\n".join(TEXTS), add_special_tokens=False)
    first, second = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (pico, other))
    nll = divergence = count = 0.0
    for window in (ids[start : start + 32] for start in range(0, 128, 32)):
        p, q = (model(input_ids=torch.tensor([window])).logits[0].double().softmax(-1) for model in (first, second))
        for place in range(31):
            nll -= math.log(float(q[place, window[place + 1]]))
            divergence += float((p[place] * (p[place].log() - q[place].log())).sum())
            count += 1
    assert found["tokens"] == count == 124
    assert found["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert found["kl_to_unpruned"] == pytest.approx(divergence / count, rel=1e-4)


def starting(folder: Path, pico: Path) -> Path:
    """The model with a tokenizer that sets a start token before every text, as those of Llama 3 and Gemma do."""
    from tokenizers.processors import TemplateProcessing

    shutil.copytree(pico, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).encode("") == [tokenizer.bos_token_id]
    return folder


@torch.inference_mode()
def test_every_window_follows_the_tokenizers_start_token(pico: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pico).eval(), AutoTokenizer.from_pretrained(pico)
    ids = tokenizer.encode("\n\n".join(TEXTS), add_special_tokens=False)
    nll = 0.0
    for window in (ids[start : start + 32] for start in range(0, 128, 32)):
        logprobs = model(input_ids=torch.tensor([[tokenizer.bos_token_id, *window]])).logits[0].log_softmax(-1)
        nll -= sum(float(logprobs[place, token]) for place, token in enumerate(window))
    found = measured(starting(tmp_path / "starting", pico), pico, tmp_path / "out")
    assert found["tokens"] == 128
    assert found["perplexity"] == pytest.approx(math.exp(nll / 128), rel=1e-4)


def test_the_checkpoints_penalties_have_no_part_in_what_it_samples(other: Path, tmp_path: Path) -> None:
    penalising = tmp_path / "penalising"
    shutil.copytree(other, penalising)
    file = penalising / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": 5.0}))
    assert measured(penalising, penalising, tmp_path / "a") == measured(other, other, tmp_path / "b")


def test_the_unpruned_model_has_no_divergence_from_itself(pico: Path, tmp_path: Path) -> None:
    assert measured(pico, pico, tmp_path)["kl_to_unpruned"] == 0


@torch.inference_mode()
def test_own_answers_are_judged_by_the_unpruned_model(pico: Path, other: Path, tmp_path: Path) -> None:
    """One prompt at a time without padding: greedy sampling of a model that is sure of itself."""
    sure = build_pico(tmp_path / "sure", initializer_range=0.2)
    scaled = AutoModelForCausalLM.from_pretrained(sure)
    scaled.model.norm.weight.mul_(100)  # no token but the likeliest has a chance
    scaled.save_pretrained(sure)
    found = measured(pico, sure, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(pico)
    original, model = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (pico, sure))
    total = count = 0.0
    for messages in PROMPTS:
        prompt = prompt_ids(tokenizer, messages)
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        logprobs = original(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total += sum(float(logprobs[place - 1, ids[place]]) for place in range(len(prompt), len(ids)))
        count += len(ids) - len(prompt)
    assert found["own_tokens"] == count
    assert found["own_logprob"] == pytest.approx(total / count, rel=1e-3)


def test_text_that_is_too_short_is_refused(pico: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluate\.held_out"):
        measured(pico, pico, tmp_path, texts=[""])
