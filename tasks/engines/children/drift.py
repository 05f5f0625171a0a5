"""How far a checkpoint is from the unpruned model: on held-out text, and in what it says itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tasks.algorithms.prompts import prompt_ids
from tasks.domain.errors import DataError
from tasks.engines.children.border import Report, device_of, serve

# Of a forward pass; four bytes each. Few would make a small model on a GPU wait for launches, many leave a CPU's cache.
LOGITS = {"cuda": 2**27, "cpu": 2**25}


def drift(request: dict[str, Any], out: Path, report: Report) -> None:
    """request: original and checkpoint (folders), text (file of strings), prompts (file of conversations), windows,
    length, generated, dtype, seed.

    Writes drift.json: perplexity and kl_to_unpruned (nats a token, KL(unpruned || checkpoint)) on the held-out text,
    and own_logprob, the mean log-probability under the unpruned model of the tokens that the checkpoint samples.
    """
    device = device_of(request["runtime"])
    tokenizer = AutoTokenizer.from_pretrained(request["original"])
    windows = _windows(request, tokenizer)
    original = _load(request["original"], request["dtype"], device)
    model = original
    if request["checkpoint"] != request["original"]:
        model = _load(request["checkpoint"], request["dtype"], device)
    size = max(1, LOGITS[device] // (len(windows[0]) * model.config.get_text_config().vocab_size))
    nll, divergence = 0.0, 0.0
    with torch.inference_mode():
        for first in range(0, len(windows), size):
            part = windows[first : first + size]
            ids = torch.tensor(part, device=device)
            own = log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].float(), dim=-1)
            nll -= float(own.gather(2, ids[:, 1:, None]).sum())
            if model is not original:
                theirs = log_softmax(original(input_ids=ids, use_cache=False).logits[:, :-1].float(), dim=-1)
                divergence += float(kl_div(own, theirs, reduction="sum", log_target=True))
            done = first + len(part)
            report(0.7 * done / len(windows), f"{done} of {len(windows)} windows of held-out text")
        predicted = sum(len(window) - 1 for window in windows)
        logprobs = [value for values in _own_outputs(request, tokenizer, model, original, report) for value in values]
    measured = {
        "perplexity": math.exp(nll / predicted), "kl_to_unpruned": divergence / predicted, "tokens": predicted,
        "own_logprob": sum(logprobs) / len(logprobs), "own_tokens": len(logprobs),
    }  # fmt: skip
    (out / "drift.json").write_text(json.dumps(measured))


def _load(folder: str, dtype: str, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()


def _windows(request: dict[str, Any], tokenizer: Any) -> list[list[int]]:
    """The joined text in windows of equal length, each after the tokenizer's start token if it sets one; what is left
    over at its end is not used.
    """
    start = [token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_token_id]
    text = "\n\n".join(json.loads(Path(request["text"]).read_text()))
    ids = tokenizer.encode(text, add_special_tokens=False)
    length = min(request["length"], len(ids))
    if length < 2:
        raise DataError("evaluate.held_out: the text has fewer than two tokens; give a longer one")
    windows = [start + ids[first : first + length] for first in range(0, len(ids) - length + 1, length)]
    return windows[: request["windows"]]


def _own_outputs(
    request: dict[str, Any], tokenizer: Any, model: Any, original: Any, report: Report
) -> Iterator[list[float]]:
    """For each prompt the original's log-probabilities of the answer that the model samples at temperature 1."""
    prompts = [prompt_ids(tokenizer, messages) for messages in json.loads(Path(request["prompts"]).read_text())]
    torch.manual_seed(request["seed"])
    ends = {*_as_list(model.generation_config.eos_token_id), *_as_list(tokenizer.eos_token_id)}
    model.generation_config = GenerationConfig()  # else the checkpoint's repetition penalty and the like would count
    batch, device = request["runtime"]["batch"], model.device
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in part], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part], device=device)
        answers = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=request["generated"], do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=sorted(ends) or None,
        )[:, longest:].tolist()  # fmt: skip
        for prompt, answer in zip(part, answers, strict=True):
            stop = next((place + 1 for place, token in enumerate(answer) if token in ends), len(answer))
            whole = torch.tensor([prompt + answer[:stop]], device=device)
            logits = original(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            yield (-cross_entropy(logits, whole[0, len(prompt) :], reduction="none")).tolist()
        report(0.7 + 0.3 * (first + len(part)) / len(prompts), f"{first + len(part)} of {len(prompts)} own answers")


def _as_list(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


if __name__ == "__main__":
    serve(drift)
