"""Adapter + pruned checkpoint -> one plain checkpoint, merged in float32 and cast once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tasks.domain.errors import GateError
from tasks.engines.children.border import Report, serve

# Before the cast only the order of the sums differs; behind it, a weak adapter is no larger than the rounding.
MAX_BEFORE_CAST = 1e-3
MAX_RELATIVE_DIFFERENCE = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.1}
PROBE_TOKENS = 48
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "README.md")


def merge(request: dict[str, Any], out: Path, report: Report) -> None:
    """request: checkpoint, adapter. Raises GateError when the reloaded merge does not compute what the adapter did."""
    base = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype="auto")
    dtype = base.dtype
    probe = torch.randint(
        0, base.get_input_embeddings().num_embeddings, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    trained = Path(request["adapter"])
    if (trained / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(base.float(), trained).eval()
        _check_names(model, trained)
    else:  # all weights were trained: there is nothing to merge, only to cast
        model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(input_ids=probe).logits
        report(0.3, "merging")
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
            _compare("merged logits in float32", model(input_ids=probe).logits, expected, MAX_BEFORE_CAST)
        model.to(dtype).save_pretrained(out)
        others = shutil.ignore_patterns(*WEIGHTS, "span.json", "candidates.json")
        shutil.copytree(request["checkpoint"], out, ignore=others, dirs_exist_ok=True)
        report(0.7, "reloading")
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        _compare("merged logits", merged(input_ids=probe).logits, expected, MAX_RELATIVE_DIFFERENCE[dtype])
    tied = bool(merged.config.tie_word_embeddings)
    same = merged.get_input_embeddings().weight.data_ptr() == merged.get_output_embeddings().weight.data_ptr()
    if tied and not same:
        raise GateError("the merged checkpoint lost the tie between its input and output embeddings")


def _compare(what: str, found: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= allowed:
        raise GateError(f"{what} differ from the adapter's by {difference:.2e} of their size (allowed: {allowed})")


def _check_names(model: Any, adapter: Path) -> None:
    """peft drops tensors that find no place; an adapter of another model must not pass for one of this."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
    wanted = set(get_peft_model_state_dict(model))
    if stored != wanted:
        raise GateError(f"the adapter is of another model: its tensors differ in {sorted(stored ^ wanted)[:3]}")


if __name__ == "__main__":
    serve(merge)
