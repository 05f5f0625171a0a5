"""The child's side of the process border."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.domain.errors import ConfigError, OutOfMemory, PipelineError, device_full, disk_full

Report = Callable[[float, str], None]
Run = Callable[[dict[str, Any], Path, Report], object]

GRAPH_SIZES = [1, 8, 32, 64, 128, 256, 512]  # sequences of a decode step; others are padded to the next
TOO_LONG = re.compile(r"max_model_len \((\d+)\) is greater than the derived max_model_len (\(.*?\))")  # vLLM's words
CPU_PREFILL_TOKENS = 4096  # a batch; more only costs memory


def serve(run: Run) -> None:
    """Call `run(request, out, report)` with what the parent sent; tell the parent why it failed, if it does.

    What `run` returns is kept to the end: engines take seconds to be cleaned up.
    """
    request = json.loads(Path(sys.argv[1]).read_text())
    with os.fdopen(int(sys.argv[2]), "w", encoding="utf-8") as pipe:

        def say(**message: Any) -> None:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

        out, status = Path(request["out"]), 0
        out.mkdir(parents=True, exist_ok=True)
        try:
            _kept = run(request, out, lambda done, text: say(done=done, text=text))
        except Exception as error:
            status = 1
            full = disk_full(error, {"SDD_MIRROR": out, "TMPDIR": Path(tempfile.gettempdir())})
            if told := full or as_told(error):
                say(error=type(told).__name__, text=str(told))
            else:
                traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # The libraries take seconds to clean up what the system takes back anyway, or wait for processes of their own.
    os._exit(status)


def as_told(error: Exception) -> PipelineError | None:
    """What the parent is to raise; None for errors that only the log explains."""
    if isinstance(error, PipelineError):
        return error
    if device_full(said := f"{type(error).__name__}: {error}"):
        return OutOfMemory(said)
    if long := TOO_LONG.search(str(error)):
        return ConfigError(f"max_length={long[1]} is more than the model's context window {long[2]}; lower it")
    return None


def device_of(runtime: dict[str, Any]) -> str:
    """ "cuda" or "cpu", as `runtime.device` says."""
    import torch

    if runtime["device"] == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(runtime["device"])


def vllm_options(request: dict[str, Any]) -> dict[str, Any]:
    """Arguments of vLLM's LLM: the recipe's, and those for this machine, which do not change what is computed."""
    options = {"dtype": request["dtype"], "max_model_len": request["max_length"], "seed": request["seed"]}
    if device_of(request["runtime"]) == "cuda":
        # Graphs of decode steps bring most of the speed; full compilation costs minutes a start.
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": GRAPH_SIZES}
        share = request["runtime"]["gpu_memory"]
        options |= {"gpu_memory_utilization": share, "compilation_config": graphs}
        if request["runtime"]["engines"] > 1:
            # vLLM sizes its cache by what gets used while it starts, and would take its neighbours' for its own.
            options["kv_cache_memory_bytes"] = _cache_bytes(Path(request["checkpoint"]), share)
        return options
    # Prompts in pieces crash seeded sampling on CPU (its generators know no offset).
    prefill = max(CPU_PREFILL_TOKENS, request["max_length"])
    return options | {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": prefill}


def _cache_bytes(checkpoint: Path, share: float) -> int:
    """Half of what the weights leave of the engine's share of the GPU; logits and activations have the other half.

    Raises ConfigError if they leave nothing.
    """
    from vllm.platforms import current_platform  # torch would take the GPU for this process, which then cannot fork

    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    memory = current_platform.get_device_total_memory()
    if share * memory <= weights:
        raise ConfigError(
            f"runtime.gpu_memory={share:.2f}: this share of the GPU's {memory / 1e9:.0f} GB is less than the model's "
            f"{weights / 1e9:.1f} GB of weights; raise it, or lower runtime.engines"
        )
    return int(share * memory - weights) // 2
