"""GGUF file -> plain safetensors checkpoint with tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.domain.errors import ModelUnsupported
from tasks.engines.children.border import Report, serve


def convert(request: dict[str, Any], out: Path, report: Report) -> None:
    """request: gguf (path of the file), dtype."""
    path = Path(request["gguf"])
    report(0.05, "reading the GGUF file")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # What transformers raises for an architecture, a quantization or a field that it does not know.
    except (ValueError, NotImplementedError, KeyError) as error:
        raise ModelUnsupported(f"transformers cannot read {path.name} as a causal language model: {error}") from error
    # The weights are plain now; left in place these two would make every loader look for the GGUF file again.
    del model.config.quantization_config
    model.hf_quantizer = None
    report(0.7, "writing safetensors")
    model.to(getattr(torch, request["dtype"])).save_pretrained(out)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config.pop("_model_name_or_path", None)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    serve(convert)
