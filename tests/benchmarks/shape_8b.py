"""The paper's shape on one GPU: what each stage takes with a Llama-3.1-8B configuration of random weights.

    python3 -m tests.benchmarks.shape_8b OUT [PART ...] [--work FOLDER] [--tokenizer FOLDER] [--seconds 530] [--tiny]

Every part runs in a process of its own through the pipeline's code, and OUT/shape_8b.json is written anew after each,
so that a run that is cut off keeps what it has. The checkpoints (43 GB) lie in a temporary folder, or stay in the one
of --work, with the figures so far, for parts that are run later. --tiny tries the program out on CPU.

Model FLOPs of a LoRA step: the frozen weights need no gradient of their own, so a token costs 2 FLOPs a weight forward
and 2 backward, 6 a weight of the adapter, and 6 * row length * width a block for causal attention (2 of them forward);
the output head counts at the answer tokens only, where the pipeline computes logits. The utilisation is that by the
dense bf16 peak of the GPU. The usual 6N a token (N: all parameters), as if every weight were trained, stands beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.benchmarks.record import gpus, record

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128009,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
TINY = LLAMA_8B | {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SCORED = {"samples": 128, "length": 1024, "batch": 8}
BATCHES, PROMPT, GENERATED, ROUNDS = (1, 64, 256), 256, 128, 3
TRAINED = {"rows": 320, "prompt": 128, "answer": 380, "batch": 16}
MICRO_BATCHES = (8, 4, 2, 1)  # the first that fits
WARM_UP_STEPS = 2
EVALUATED = {"arc_challenge": 64, "hellaswag": 128, "truthfulqa_mc2": 64, "mmlu": 4, "winogrande": 128, "gsm8k": 64}
START, COUNT = 20, 6  # the span that is cut; its place costs nothing
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12}  # NVIDIA's data sheet, SXM, bf16 without sparsity
UTILISATION = 0.4
PAPER_FLOPS_SAVED = 16.30

Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--work", type=Path, help="where the checkpoints are kept; default: a temporary folder")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; default: one of 500 tokens")
    parser.add_argument("--seconds", type=float, default=530, help="when to end, whatever is unfinished")
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args()
    os.environ["BENCHMARK_RESULTS"] = str(chosen.out)
    end = time.monotonic() + chosen.seconds
    with tempfile.TemporaryDirectory(prefix="sdd-shape-") as temporary:
        folder = chosen.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "figures.json"
        figures: Figures = json.loads(known.read_text()) if known.exists() else {}
        for name in chosen.parts:
            started = time.monotonic()
            print(f"{name} ...", flush=True)
            figures[name] = alone((PARTS[name], folder, chosen.tokenizer, chosen.tiny), end - time.monotonic())
            figures[name]["part_seconds"] = round(time.monotonic() - started, 1)
            print(f"{name}: {json.dumps(figures[name])}", flush=True)
            if name == "generate_pruned":
                figures["speed_up"] = speed_up(figures)
                print(f"speed-up: {figures['speed_up']}", flush=True)
            known.write_text(json.dumps(figures))
            used = figures.get("finetune", {}).get("flops_utilisation") or 0.0
            record("shape_8b", "the bf16 peak of the GPU (model FLOPs of a LoRA step)",
                   figures, used, UTILISATION, higher_is_better=True)  # fmt: skip


def speed_up(figures: Figures) -> Figures:
    """Output tokens a second of the pruned model by those of the original, at each batch."""
    original, pruned = figures.get("generate_original", {}), figures["generate_pruned"]
    return {
        name: round(pruned[name]["tokens_per_second"] / original[name]["tokens_per_second"], 3)
        for name in pruned if name.startswith("batch") and name in original
    }  # fmt: skip


def alone(arguments: tuple[Any, ...], seconds: float) -> Figures:
    """A part in a fresh process, which is ended after so many seconds; its failure is a figure too."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, *arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(max(1.0, seconds)):
            return {"failed": "out of time"}
        return dict(receiver.recv())
    except EOFError:
        process.join()
        return {"failed": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _run(sender: Any, part: Callable[[Path, Path | None, bool], Figures], *arguments: Any) -> None:
    from tasks.domain.recipe import Runtime
    from tasks.engines.child import _environment

    os.environ.update(_environment(Runtime()))  # as the pipeline's children have it
    try:
        figures = part(*arguments) | {"peak_host_gb": _peak_host_gb(), "peak_gpu_gb": _peak_gpu_gb()}
    except Exception as error:
        traceback.print_exc()
        figures = {"failed": f"{type(error).__name__}: {error}"[:500]}
    sender.send(figures)


def _peak_host_gb() -> float:
    """Resident memory at its highest, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9, 2)


def _peak_gpu_gb() -> float | None:
    """None also for a part that never used torch, whose import takes seconds."""
    if "torch" not in sys.modules:
        return None
    import torch

    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None


def checkpoint(folder: Path, tokenizer: Path | None, tiny: bool) -> Figures:
    """Random weights of the shape, drawn on the device and written as a download would lie there: in several files."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tasks.store.checkpoint import INDEX
    from tests.conftest import build_tokenizer

    started, out = time.monotonic(), _empty(folder / "original")
    config = LlamaConfig(**(TINY if tiny else LLAMA_8B), architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    files: dict[str, dict[str, Any]] = {}
    for name in shapes:
        block = name.split(".")[2] if name.startswith("model.layers.") else ""
        files.setdefault(f"model-{int(block) // 4 if block else 'rest'}.safetensors", {})[name] = None
    for file, names in files.items():
        tensors = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16, device=device) if len(shapes[name]) == 1
            else torch.randn(shapes[name], dtype=torch.bfloat16, device=device) * 0.02
            for name in names
        }  # fmt: skip
        save_file(tensors, out / file, metadata={"format": "pt"})
        print(f"  {file}: {(out / file).stat().st_size / 1e9:.2f} GB", flush=True)
    weight_map = {name: file for file, names in files.items() for name in names}
    size = sum((out / file).stat().st_size for file in files)
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    config.save_pretrained(out)
    (AutoTokenizer.from_pretrained(tokenizer) if tokenizer else build_tokenizer()).save_pretrained(out)
    seconds = time.monotonic() - started
    return {"parameters": sum(shape.numel() for shape in shapes.values()), "bytes": size, "seconds": round(seconds, 1)}


def score(folder: Path, _tokenizer: Path | None, tiny: bool) -> Figures:
    """The scoring child, all (l, n); then the same batches through a bare forward pass."""
    import torch
    from transformers import AutoModelForCausalLM

    from tasks.domain.recipe import Runtime
    from tasks.engines.children.score import score as run

    (documents := folder / "documents.json").write_text(json.dumps([_text(folder, 1100, at) for at in range(150)]))
    times: list[float] = []

    def report(_done: float, _text: str) -> None:
        times.append(time.monotonic())

    fields = {"samples": 16 if tiny else SCORED["samples"], "length": SCORED["length"]}
    out = _empty(folder / "score")
    request = {
        "checkpoint": str(folder / "original"), "documents": str(documents), "seed": 0, **fields, "metric": "angular",
        "token": "last", "dtype": "bfloat16", "part": str(out / "sums"), "commit_seconds": 3600,
        "runtime": Runtime(batch=SCORED["batch"]).model_dump(),
    }  # fmt: skip
    started = time.monotonic()
    run(request, out, report)
    whole = time.monotonic() - started
    peak = _peak_gpu_gb()
    samples = [json.loads(line) for line in (out / "tokens.jsonl").read_text().splitlines()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder / "original", dtype=torch.bfloat16).to(device).eval()
    bare = []
    with torch.inference_mode():
        for at in range(0, len(samples), SCORED["batch"]):
            ids = torch.tensor(samples[at : at + SCORED["batch"]], device=device)
            model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.cpu()
            bare.append(time.monotonic())
    passes, bare_passes = times[-1] - times[0], bare[-1] - bare[0]  # without the first batch, which warms up
    tokens = sum(map(len, samples[SCORED["batch"] :]))
    return {
        "samples": len(samples), "seconds": round(whole, 1), "passes_seconds": round(passes, 2),
        "tokens_per_second": round(tokens / passes), "bare_passes_seconds": round(bare_passes, 2),
        "against_bare": round(passes / bare_passes, 3), "scoring_peak_gpu_gb": peak,
    }  # fmt: skip


def prune(folder: Path, _tokenizer: Path | None, _tiny: bool) -> Figures:
    """The cut on disk; a plain copy of as many files beside it."""
    from tasks.domain.span import Span
    from tasks.prune import cut

    os.sync()
    started, copied = time.monotonic(), 0
    for path in sorted((folder / "original").glob("model-[0-3].safetensors")):
        copied += shutil.copyfile(path, folder / "copy").stat().st_size
    copy_rate = copied / (time.monotonic() - started) / 1e9
    (folder / "copy").unlink()
    os.sync()
    out = _empty(folder / "pruned")
    started = time.monotonic()
    facts = cut(folder / "original", out, Span(START, COUNT, LLAMA_8B["num_hidden_layers"]))
    seconds = time.monotonic() - started
    rate = facts["bytes"] / seconds / 1e9
    return facts | {
        "seconds": round(seconds, 2), "gb_per_second": round(rate, 2), "copy_gb_per_second": round(copy_rate, 2),
        "paper_flops_saved_percent": PAPER_FLOPS_SAVED,
    }  # fmt: skip


def generate_original(folder: Path, _tokenizer: Path | None, tiny: bool) -> Figures:
    return _generate(folder / "original", tiny)


def generate_pruned(folder: Path, _tokenizer: Path | None, tiny: bool) -> Figures:
    return _generate(folder / "pruned", tiny)


def _generate(model: Path, tiny: bool) -> Figures:
    """Output tokens a second of vLLM with the pipeline's options, prompts read included; median of the rounds."""
    from vllm import LLM, SamplingParams

    from tasks.domain.recipe import Runtime
    from tasks.engines.children.border import vllm_options

    request = {
        "checkpoint": str(model), "dtype": "bfloat16", "max_length": 2 * (PROMPT + GENERATED), "seed": 0,
        "runtime": Runtime().model_dump(),
    }  # fmt: skip
    started = time.monotonic()
    llm = LLM(model=str(model), **vllm_options(request))
    figures: Figures = {"load_seconds": round(time.monotonic() - started, 1)}
    print(f"  loaded in {figures['load_seconds']} s", flush=True)
    # The tokenizer does not know all tokens of the model.
    sampling = SamplingParams(temperature=0, max_tokens=GENERATED, ignore_eos=True, detokenize=False)
    draw = random.Random(0)
    for batch in BATCHES[: 2 if tiny else None]:
        rates = []
        for _ in range(1 + ROUNDS):  # the first warms up
            prompts = [{"prompt_token_ids": draw.choices(range(2, 500), k=PROMPT)} for _ in range(batch)]
            started = time.monotonic()
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            rates.append(round(tokens / (time.monotonic() - started), 1))
        figures[f"batch {batch}"] = {"tokens_per_second": statistics.median(rates[1:]), "rounds": rates[1:]}
        print(f"  batch {batch}: {rates}", flush=True)
    return figures


def finetune(folder: Path, _tokenizer: Path | None, tiny: bool) -> Figures:
    """The training child with the preset's LoRA of rank 16; the largest micro batch that the memory has room for."""
    import torch

    from tasks.domain.recipe import Finetune, Runtime
    from tasks.engines.children import finetune as child

    with (rows := folder / "rows.jsonl").open("w") as file:
        for at in range(4 * TRAINED["batch"] if tiny else TRAINED["rows"]):
            question, answer = _text(folder, TRAINED["prompt"], at), _text(folder, TRAINED["answer"], at + 7)
            row = {"id": str(at), "prompt": [{"role": "user", "content": question}], "reference": answer}
            file.write(json.dumps(row | {"answer": answer, "outcome": "accepted"}) + "\n")
    child.COMPILED_FROM = 0  # the steps of a long training
    settings = Finetune(dtype="bfloat16", batch=TRAINED["batch"])
    times: list[float] = []

    def report(_done: float, _text: str) -> None:
        times.append(time.monotonic())

    for micro_batch in MICRO_BATCHES:
        out = _empty(folder / "adapter")
        request = {
            "checkpoint": str(folder / "pruned"), "rows": str(rows), "answers": "answer",
            "parts": str(_empty(folder / "parts")), "name": "bench", "commit_seconds": 3600, **settings.model_dump(),
            "runtime": Runtime(micro_batch=micro_batch).model_dump(),
        }  # fmt: skip
        times.clear()
        try:
            child.finetune(request, out, report)
            break
        except torch.cuda.OutOfMemoryError:
            print(f"  {micro_batch} rows at once do not fit", flush=True)
        torch.cuda.empty_cache()  # behind the except clause: its traceback holds the tensors
    else:
        raise MemoryError("not one row fits")
    found = json.loads((out / "tokens.json").read_text())
    steps = [b - a for a, b in zip(times[WARM_UP_STEPS - 1 :], times[WARM_UP_STEPS:], strict=False)]
    step = statistics.median(steps)
    tokens, answers = (found[name] / found["steps"] for name in ("tokens", "trained_tokens"))
    flops, six_n = _lora_flops(folder, tokens, answers, found["tokens"] / found["rows"])
    peak = _peak_flops()
    return {
        "micro_batch": micro_batch, "rows_a_step": TRAINED["batch"], "tokens_a_step": round(tokens),
        "answer_tokens_a_step": round(answers), "step_seconds": round(step, 4), "steps": [round(s, 4) for s in steps],
        "tokens_per_second": round(tokens / step), "model_tflops_a_step": round(flops / 1e12, 2),
        "model_tflops_per_second": round(flops / step / 1e12, 2),
        "flops_utilisation": round(flops / step / peak, 3) if peak else None,
        "utilisation_by_6n": round(six_n / step / peak, 3) if peak else None,
    }  # fmt: skip


def _lora_flops(folder: Path, tokens: float, answers: float, row: float) -> tuple[float, float]:
    """Model FLOPs of so many tokens in rows of that length, and what 6N says of them (see above)."""
    from tasks.store.checkpoint import tensors_of

    config = json.loads((folder / "pruned" / "config.json").read_text())
    weights = {name: tensor.parameters for name, tensor in tensors_of(folder / "pruned").items()}
    blocks = sum(count for name, count in weights.items() if ".layers." in name and "norm" not in name)
    adapter = sum(tensor.parameters for tensor in tensors_of(folder / "adapter").values())
    attention = 6 * row * config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"]
    flops = tokens * (4 * blocks + 6 * adapter + attention) + answers * 4 * weights["lm_head.weight"]
    return flops, 6 * tokens * sum(weights.values())


def _peak_flops() -> float | None:
    return next((peak for name, peak in PEAK_FLOPS.items() for gpu in gpus() if name in gpu), None)


def merge(folder: Path, _tokenizer: Path | None, _tiny: bool) -> Figures:
    """The merge child: load and probe the adapter; merge and write; reload and probe."""
    from tasks.engines.children.merge import merge as run

    times = [time.monotonic()]

    def report(_done: float, text: str) -> None:
        times.append(time.monotonic())
        print(f"  {text} after {times[-1] - times[0]:.1f} s", flush=True)

    out = _empty(folder / "merged")
    run({"checkpoint": str(folder / "pruned"), "adapter": str(folder / "adapter")}, out, report)
    times.append(time.monotonic())
    shutil.rmtree(out)
    names = ("load_seconds", "merge_seconds", "reload_seconds")
    return {
        **{name: round(b - a, 1) for name, a, b in zip(names, times, times[1:], strict=False)},
        "seconds": round(times[-1] - times[0], 1),
    }


def gate(folder: Path, _tokenizer: Path | None, _tiny: bool) -> Figures:
    """The check of the pruned checkpoint before it is published, without the start of vLLM."""
    from tasks.domain.recipe import Runtime
    from tasks.domain.span import Span
    from tasks.engines.children.verify import verify
    from tasks.store.checkpoint import count_parameters

    config = json.loads((folder / "pruned" / "config.json").read_text())
    request = {
        "original": str(folder / "original"), "pruned": str(folder / "pruned"), "runtime": Runtime().model_dump(),
        "removed": Span(START, COUNT, LLAMA_8B["num_hidden_layers"]).removed,
        "parameters": count_parameters(folder / "pruned", config),
    }  # fmt: skip
    started = time.monotonic()
    verify(request, folder, lambda _done, _text: None)
    return {"seconds": round(time.monotonic() - started, 1)}


def evaluate(folder: Path, _tokenizer: Path | None, tiny: bool) -> Figures:
    """The evaluation child on the pruned model, first items of each task; whole: as long as all items would take."""
    named = os.environ.get("SDD_DATA_ROOT")  # before an import below clears it
    from tasks.domain.leaderboard import LEADERBOARD
    from tasks.domain.recipe import Runtime
    from tasks.domain.stage import json_lines
    from tasks.engines.children.evaluate import evaluate as run
    from tasks.store.sources import benchmark_questions
    from tests.tiny_data import write_data_root

    root = Path(named or write_data_root(folder / "data", items=40))
    where = {"data_root": str(root), "revision": None}
    tasks = {
        name: {"shots": LEADERBOARD[name].shots, "limit": 1 if tiny else limit, **where}
        for name, limit in EVALUATED.items()
    }
    request = {
        "checkpoint": str(folder / "pruned"), "backend": "vllm", "chat_template": False, "max_generated": 256,
        "seed": 0, "dtype": "bfloat16", "max_length": 2048 if tiny else 4096, "tasks": tasks,
        "runtime": Runtime().model_dump(),
    }  # fmt: skip
    times: list[float] = []
    started = time.monotonic()
    run(request, _empty(folder / "scores"), lambda _done, _text: times.append(time.monotonic()))
    figures: Figures = {"load_seconds": round(times[1] - started, 1)}
    whole = 0.0
    for name, begun, ended in zip(tasks, times[1::2], times[2::2], strict=True):
        samples = map(json.loads, json_lines(folder / "scores" / name / f"samples_{name}.jsonl"))
        scored = len({(sample["task"], sample["doc_id"]) for sample in samples})  # GSM8K's stand there once a filter
        items = sum(1 for _ in benchmark_questions(name, root, None))
        figures[name] = {"items": scored, "of": items, "seconds": round(ended - begun, 1)}
        whole += (ended - begun) * items / scored
    return figures | {"whole_suite_seconds": round(whole)}


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@lru_cache(maxsize=1)
def _tokenizer_and_words(folder: Path) -> tuple[Any, list[str]]:
    from transformers import AutoTokenizer

    from tests.conftest import pocket_pairs

    words = " ".join(pair["answer"] for pair in pocket_pairs()).split()
    return AutoTokenizer.from_pretrained(folder / "original"), words


def _text(folder: Path, tokens: int, at: int) -> str:
    """About so many tokens of text, from a place of its own."""
    tokenizer, words = _tokenizer_and_words(folder)
    words = words[at * 13 % len(words) :] + words
    return str(tokenizer.decode(tokenizer.encode(" ".join(words[:tokens]), add_special_tokens=False)[:tokens]))


PARTS = {
    part.__name__: part
    for part in (checkpoint, score, prune, generate_original, generate_pruned, finetune, merge, gate, evaluate)
}

if __name__ == "__main__":
    main()
