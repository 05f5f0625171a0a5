"""Stages against the fastest way to do their work by hand, alternating in one run.

    .venv/bin/python -m tests.benchmarks.stages [NAME ...] [--model FOLDER]

Each benchmark runs in a process of its own, on the GPU where there is one. Without --model the stages that need one
take SmolLM2-135M's shape with random weights; prune and store use files of random bytes. Rows and items come from
SDD_DATA_ROOT where it is set, else from the pocket data. `finetune` needs trl (`make bench` brings it).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import yaml

from tasks.domain.stage import json_lines
from tests.benchmarks.material import benchmark_rows, device, fresh, keep_settings, random_model, servers
from tests.benchmarks.record import alternating, gpus, median_ratio, record

MB = 2**20
SCORED = {"samples": 128, "length": 256, "batch": 8}  # the calibration of smollm2-135m
GENERATED: dict[str, dict[str, Any]] = {
    "cpu": {"rows": 256, "tokens": 24, "rounds": 4, "engines": ()},
    "cuda": {"rows": 16384, "tokens": 128, "rounds": 2, "engines": (8,)},
}
TRAINED = {"cpu": {"rows": 64, "rounds": 2}, "cuda": {"rows": 1024, "rounds": 2}}
TRL_BATCH, TRL_LENGTH = 8, 1024  # rows a step and longest row, TRL's defaults
EVALUATED: dict[str, dict[str, Any]] = {
    "cpu": {"tasks": ["arc_challenge", "hellaswag", "truthfulqa_mc2"], "limit": 20, "rounds": 2},
    "cuda": {
        "tasks": ["arc_challenge", "hellaswag", "truthfulqa_mc2", "mmlu", "winogrande", "gsm8k"], "limit": 50,
        "rounds": 1,
    },
}  # fmt: skip
LM_EVAL = """
from tasks.engines.children.evaluate import _name_cpu_build
_name_cpu_build()
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def score(folder: Path, model: Path) -> None:
    """One pass with all distances, their moments and the bootstrap, against the same pass without."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tasks.domain.recipe import Runtime
    from tasks.engines.children.border import device_of
    from tasks.engines.children.score import score as ours
    from tests.conftest import pocket_pairs

    tokenizer = AutoTokenizer.from_pretrained(model)
    runtime = Runtime(batch=SCORED["batch"]).model_dump()
    device = device_of(runtime)
    text = " ".join(pair["answer"] for pair in pocket_pairs())
    documents = [text[at * 50 :][:4000] for at in range(SCORED["samples"])]
    (folder / "documents.json").write_text(json.dumps(documents))
    request = {
        "checkpoint": str(model), "documents": str(folder / "documents.json"), "seed": 0, **SCORED,
        "metric": "angular", "token": "last", "dtype": "float32", "part": str(folder / "sums"), "commit_seconds": 3600,
        "runtime": runtime,
    }  # fmt: skip
    (folder / "out").mkdir()
    ids = [tokenizer.encode(document)[: SCORED["length"]] for document in documents]
    assert {len(sample) for sample in ids} == {SCORED["length"]}

    def bare() -> None:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
        with torch.inference_mode():
            for at in range(0, len(ids), SCORED["batch"]):
                batch = torch.tensor(ids[at : at + SCORED["batch"]], device=device)
                loaded(input_ids=batch, use_cache=False, logits_to_keep=1).logits.cpu()

    samples = alternating(lambda: ours(request, folder / "out", lambda done, text: None), bare, 3)
    record("score", "a bare forward pass over the same batches", samples,
           median_ratio(samples["ours"], samples["theirs"]), 1.05, higher_is_better=False)  # fmt: skip
    counts = len(json.loads((folder / "out" / "distances.json").read_text())["mean"])
    record("score_every_n", f"a bare forward pass for each n of 1 to {counts}", samples,
           counts * median_ratio(samples["theirs"], samples["ours"]), 5.0, higher_is_better=True)  # fmt: skip


def prune(folder: Path, _model: Path) -> None:
    """The cut of a checkpoint of 1.3 GB, against a copy of the bytes that stay."""
    import torch
    from safetensors.torch import save_file

    from tasks.domain.span import Span
    from tasks.prune import cut

    layers, hidden = 24, 1024
    (folder / "model").mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
              "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": 16, "vocab_size": 32000,
              "tie_word_embeddings": True}  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(config))
    square, up = (hidden, hidden), (4 * hidden, hidden)
    shapes = {f"self_attn.{name}_proj": square for name in "qkvo"} | {
        "mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": up[::-1],
    }  # fmt: skip
    tensors = {
        f"model.layers.{layer}.{name}.weight": torch.randn(shape, dtype=torch.bfloat16)
        for layer in range(layers) for name, shape in shapes.items()
    }  # fmt: skip
    for layer in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors["model.embed_tokens.weight"] = torch.randn((32000, hidden), dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    del tensors
    span = Span(8, 6, layers)
    (folder / "first").mkdir()
    kept = cut(folder / "model", folder / "first", span)["bytes"]
    with (folder / "model" / "model.safetensors").open("rb") as source, (folder / "kept").open("wb") as target:
        for _ in range(kept // MB):
            target.write(source.read(MB))

    def ours() -> None:
        out = folder / "pruned"
        out.mkdir()
        cut(folder / "model", out, span)
        shutil.rmtree(out)

    def copy() -> None:
        shutil.copyfile(folder / "kept", folder / "copy")
        (folder / "copy").unlink()

    samples = alternating(ours, copy, 7)
    record("prune", f"copying the kept {kept / 1e9:.2f} GB file to file", samples,
           median_ratio(samples["theirs"], samples["ours"]), 0.8, higher_is_better=True)  # fmt: skip


def store(folder: Path, _model: Path) -> None:
    """Publishing and fetching 512 MB with checksums and manifest, against boto3's multipart transfer of the file."""
    os.environ["SDD_STATE"] = str(folder / "state")
    os.environ["SDD_MIRROR"] = str(folder / "mirror")
    import boto3
    from boto3.s3.transfer import TransferConfig

    from deployments.local import environment
    from tasks.domain.stage import Stage
    from tasks.store.artifacts import ArtifactStore

    (folder / "source").mkdir()
    (folder / "source" / "weights.bin").write_bytes(os.urandom(512 * MB))
    transfer = TransferConfig(multipart_threshold=64 * MB, multipart_chunksize=64 * MB, max_concurrency=4)
    with environment(prefect=False):
        artifacts = ArtifactStore.from_environment()
        artifacts.check()
        client: Any = boto3.client("s3")
        bucket = urlsplit(os.environ["SDD_STORE"]).netloc
        numbers = iter(range(100))

        def ours() -> None:
            stage = Stage("model", 1, {"number": next(numbers)}, slug="bench")
            shutil.copytree(folder / "source", folder / "staged", copy_function=os.link)
            manifest = artifacts.publish(stage, folder / "staged", {}, 0.0)
            shutil.rmtree(artifacts.mirror)
            artifacts.fetch(manifest)
            shutil.rmtree(folder / "staged", ignore_errors=True)

        def theirs() -> None:
            client.upload_file(str(folder / "source" / "weights.bin"), bucket, "raw", Config=transfer)
            client.download_file(bucket, "raw", str(folder / "raw"), Config=transfer)

        samples = alternating(ours, theirs, 5)
    record("store", "boto3's multipart transfer of the same file, up and down", samples,
           median_ratio(samples["theirs"], samples["ours"]), 0.9, higher_is_better=True)  # fmt: skip


def plan(folder: Path, _model: Path) -> None:
    """The command `flows.recover demo-cpu --plan` on a running store, against two seconds."""
    os.environ["SDD_STATE"] = str(folder / "state")
    from deployments.local import environment

    with environment(prefect=False):
        command = [sys.executable, "-m", "flows.recover", "demo-cpu", "--plan"]

        def ours() -> None:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        samples = alternating(ours, lambda: None, 7)
    middle = sorted(samples["ours"])[len(samples["ours"]) // 2]
    record("plan", "2 s", {"ours": samples["ours"]}, middle / 2, 1.0, higher_is_better=False)


def generate(folder: Path, model: Path) -> None:
    """The stage itself, with shards, ledger, uploads and publication, against LLM.generate on all prompts at once.

    Both start from a loaded model. On a GPU also several engines side by side against one.
    """
    size = GENERATED[device()]
    rows = benchmark_rows(size["rows"])
    with servers(folder, prefect=True):
        ours, theirs = _Rewriting(model, rows, size["tokens"]), []
        samples: dict[str, Any] = {"rows": len(rows), "tokens of a row": size["tokens"]}
        alone = []
        if gpus():  # the first that samples on a machine compiles kernels
            fresh(generate_at_once, ours.request(), rows[:64])
        # Each side tells its own seconds, without its start.
        alternating(
            lambda: alone.append(ours.seconds(engines=1)),
            lambda: theirs.append(fresh(generate_at_once, ours.request(), rows)),
            size["rounds"],
        )
        samples |= {
            "ours": alone, "theirs": [one["seconds"] for one in theirs],
            "tokens_per_second": {
                "ours": [round(one["tokens"] / own) for own, one in zip(alone, theirs, strict=True)],
                "theirs": [round(one["tokens"] / one["seconds"]) for one in theirs],
            },
        }  # fmt: skip
        record("generate", "LLM.generate on the same prompts, all at once", samples,
               median_ratio(samples["theirs"], alone), 0.97, higher_is_better=True)  # fmt: skip
        if size["engines"]:
            beside = {count: ours.seconds(engines=count) for count in size["engines"]}
            best = min(beside, key=lambda count: beside[count])
            record("generate_engines", f"one engine ({best} on the same GPU)",
                   {"one": alone, "several": beside, "tokens": theirs[0]["tokens"]},
                   statistics.median(alone) / beside[best], 2.5, higher_is_better=True)  # fmt: skip


class _Rewriting:
    """The distil stage on rows of its own, each time under another key."""

    def __init__(self, model: Path, rows: list[dict[str, Any]], tokens: int) -> None:
        from tasks.domain.recipe import Distil
        from tasks.domain.stage import Stage
        from tasks.materialise import ref_of
        from tasks.store.artifacts import ArtifactStore
        from tests.conftest import write_jsonl

        self.model, self.numbers = model, itertools.count()
        self.settings = Distil(
            template="retell", max_tokens=tokens, attempts=1, min_accept_rate=0.0,
            dtype="bfloat16" if gpus() else "float32",
        )  # fmt: skip
        store = ArtifactStore.from_environment()
        store.check()
        self.inputs, self.refs = {}, {}
        for name in ("model", "rows"):
            stage = Stage(name, 1, {}, slug="bench")
            with store.staging() as staged:
                if name == "model":
                    shutil.copytree(model, staged, dirs_exist_ok=True)
                else:
                    write_jsonl(staged / "rows.jsonl", rows)
                self.refs[name] = ref_of(store, store.publish(stage, staged, {}, 0.0), "miss")
            self.inputs[name] = stage

    def request(self) -> dict[str, Any]:
        from tasks.domain.recipe import Runtime

        fields = self.settings.model_dump() | {"messages": self.settings.messages()}
        return {"checkpoint": str(self.model), **fields, "runtime": Runtime().model_dump()}

    def seconds(self, *, engines: int) -> float:
        """From the moment at which the first engine has its model to the published artifact."""
        from prefect import flow

        from tasks.distil import distil
        from tasks.domain.recipe import Runtime
        from tasks.domain.stage import Stage
        from tasks.engines.child import run_child

        loaded: list[float] = []

        def watched(name: str, request: Any, out: Path, runtime: Any, progress: Callable[[float, str], None]) -> None:
            def noting(done: float, text: str) -> None:
                loaded.append(time.monotonic())
                progress(done, text)

            run_child(name, request, out, runtime, noting)

        stage = Stage("distil", 1, {"number": next(self.numbers)}, self.inputs, slug="bench")
        runtime = Runtime(engines=engines, gpu_memory=0.9 / engines)

        @flow(name="bench", persist_result=False)
        def rewrite() -> float:
            distil(stage, self.refs["model"], self.refs["rows"], self.settings, runtime)
            return time.monotonic()

        with patch("tasks.distil.run_child", watched):
            ended: float = rewrite()
        return round(ended - loaded[0], 2)


def generate_at_once(request: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """All prompts of the stage with its sampling, as a script would send them."""
    if gpus():
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # vLLM's default, and what the stage has there
    from vllm import LLM

    from tasks.algorithms.prompts import prompts_ids
    from tasks.engines.children.border import vllm_options
    from tasks.engines.children.distil import _rewrite_request, _sampling

    llm = LLM(model=request["checkpoint"], **vllm_options(request))
    tokenizer = llm.get_tokenizer()

    started = time.monotonic()
    asked = prompts_ids(tokenizer, [_rewrite_request(row, request["messages"]) for row in rows])
    prompts = {row["id"]: ids for row, ids in zip(rows, asked, strict=True)}
    longest = request["max_length"] - request["max_tokens"]  # the stage leaves longer ones out too
    prompts = {name: ids for name, ids in prompts.items() if len(ids) <= longest}
    sampling = [_sampling(request, name, 0) for name in prompts]
    for each in sampling:
        each.detokenize = True  # the stage reads its tokens in the process beside the engine
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts.values()], sampling, use_tqdm=False)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"seconds": round(time.monotonic() - started, 2), "tokens": tokens}


def finetune(folder: Path, model: Path) -> None:
    """The training child against TRL's SFTTrainer with its defaults: the same rows, LoRA, batch and type."""
    from transformers import AutoTokenizer

    from tasks.algorithms.prompts import training_ids
    from tasks.domain.recipe import Finetune, Runtime
    from tasks.engines.child import run_child
    from tests.conftest import write_jsonl

    size = TRAINED[device()]
    settings = Finetune(dtype="bfloat16" if gpus() else "float32", batch=TRL_BATCH, max_length=TRL_LENGTH)
    tokenizer = AutoTokenizer.from_pretrained(model)
    candidates = benchmark_rows(2 * size["rows"])
    prompts, references = ([row[name] for row in candidates] for name in ("prompt", "reference"))
    rows: list[dict[str, Any]] = []
    answers = 0
    for row, (ids, start) in zip(candidates, training_ids(tokenizer, prompts, references), strict=True):
        if len(ids) <= TRL_LENGTH and len(rows) < size["rows"]:
            rows.append({**row, "answer": row["reference"], "outcome": "accepted"})
            answers += len(ids) - start
    (parts := folder / "parts").mkdir()
    request = {
        "checkpoint": str(model), "rows": str(write_jsonl(folder / "rows.jsonl", rows)), "answers": "answer",
        "parts": str(parts), "commit_seconds": 3600, **settings.model_dump(),
    }  # fmt: skip
    numbers = itertools.count()

    def ours() -> float:
        times: list[float] = []
        name = f"adapter-{next(numbers)}"
        run_child("finetune", {**request, "name": name}, folder / name, Runtime(),
                  lambda _done, _text: times.append(time.monotonic()))  # fmt: skip
        return (times[-1] - times[0]) * len(times) / (len(times) - 1)

    samples: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(size["rounds"]):  # each leaves its record, should the next be cut off
        samples["ours"].append(round(ours(), 2))
        samples["theirs"].append(round(fresh(train_with_trl, request, str(folder / "trl")), 2))
        rates = {f"{who}, trained tokens/s": [round(answers / s) for s in samples[who]] for who in ("ours", "theirs")}
        record("finetune", "TRL's SFTTrainer with its defaults on the same rows", {**samples, **rates},
               median_ratio(samples["theirs"], samples["ours"]), 1.5, higher_is_better=True)  # fmt: skip


def train_with_trl(request: dict[str, Any], out: str) -> float:
    """Seconds of one epoch, from the mean of all steps but the first."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_args: Any, **_options: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.monotonic())

    rows = [json.loads(line) for line in json_lines(Path(request["rows"]))]
    dataset = Dataset.from_list([
        {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["answer"]}]} for row in rows
    ])  # fmt: skip
    config = SFTConfig(
        out, report_to="none", save_strategy="no", num_train_epochs=1, use_cpu=not torch.cuda.is_available(),
        bf16=request["dtype"] == "bfloat16", learning_rate=request["learning_rate"], seed=request["seed"],
    )  # fmt: skip
    lora = LoraConfig(
        r=request["rank"], lora_alpha=request["alpha"], lora_dropout=request["dropout"], task_type="CAUSAL_LM",
        target_modules=request["targets"],
    )  # fmt: skip
    assert (config.per_device_train_batch_size, config.max_length) == (request["batch"], request["max_length"])
    SFTTrainer(request["checkpoint"], config, train_dataset=dataset, peft_config=lora, callbacks=[Clock()]).train()
    return (times[-1] - times[0]) * len(times) / (len(times) - 1)


def evaluate(folder: Path, model: Path) -> None:
    """The evaluation child against the command line of lm-eval with its vLLM backend: the same task files and items.

    Whole processes, since a user waits for the start of either.
    """
    from tasks.domain.leaderboard import BENCHMARKS
    from tasks.domain.recipe import Runtime
    from tasks.engines.child import _environment, run_child
    from tasks.engines.children.evaluate import _write_yamls
    from tests.tiny_data import write_data_root

    size = EVALUATED[device()]
    root = os.environ.get("SDD_DATA_ROOT") or str(write_data_root(folder / "data", items=40))
    tasks = {
        name: {"shots": BENCHMARKS[name].shots, "limit": size["limit"], "data_root": root, "revision": None}
        for name in size["tasks"]
    }  # fmt: skip
    options = {"dtype": "bfloat16" if gpus() else "float32", "max_length": 4096}
    request = {
        "checkpoint": str(model), "backend": "vllm", "chat_template": False, "max_generated": 256, "seed": 0,
        "tasks": tasks, **options,
    }  # fmt: skip
    (files := folder / "tasks").mkdir()
    names = {task: _with_shots(files, task, settings, _write_yamls) for task, settings in tasks.items()}
    runtime, numbers = Runtime(), itertools.count()
    command = [
        sys.executable, "-c", LM_EVAL, "--model", "vllm", "--batch_size", "auto", "--limit", str(size["limit"]),
        "--tasks", ",".join(itertools.chain(*names.values())), "--include_path", str(files),
        "--output_path", str(folder / "theirs"), "--model_args",
        f"pretrained={model},dtype={options['dtype']},max_model_len={options['max_length']}",
    ]  # fmt: skip

    def ours() -> None:
        run_child("evaluate", request, folder / f"out-{next(numbers)}", runtime, lambda _done, _text: None)

    theirs_alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} if gpus() else {}  # vLLM's default; ours has one process

    def theirs() -> None:
        subprocess.run(command, env=_environment(runtime) | theirs_alone, check=True, stdout=subprocess.DEVNULL)

    if gpus():  # the first vLLM on a machine compiles its kernels, for a minute
        first = {**request, "tasks": {"hellaswag": {**tasks["hellaswag"], "limit": 1}}}
        run_child("evaluate", first, folder / "first", runtime, lambda _done, _text: None)
    samples: dict[str, Any] = alternating(ours, theirs, size["rounds"])
    metrics = {task: f"{BENCHMARKS[task].metric},{BENCHMARKS[task].filter}" for task in tasks}
    samples |= {
        f"scores of {who}": {task: _scores(folder, pattern, names[task], metrics[task]) for task in tasks}
        for who, pattern in (("ours", "out-0/*/results.json"), ("theirs", "theirs/**/results*.json"))
    }
    record("evaluate", "the command line of lm-eval with its vLLM backend, the same items", {**size, **samples},
           median_ratio(samples["theirs"], samples["ours"]), 3.0 if gpus() else 1.0, higher_is_better=True)  # fmt: skip


def _with_shots(files: Path, task: str, settings: dict[str, Any], write: Callable[..., list[str]]) -> list[str]:
    """The pipeline's task files with their shots inside: the command line has one number for all tasks."""
    names = write(task, settings, files)
    for name in names:
        path = files / f"{name}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"num_fewshot": settings["shots"]}))
    return names


def _scores(folder: Path, pattern: str, names: list[str], metric: str) -> float:
    """The mean over a task's subjects, from the harness's own files."""
    results: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob(pattern)):
        results |= json.loads(path.read_text())["results"]
    return round(statistics.mean(results[name][metric] for name in names), 4)


def rerun(folder: Path, _model: Path) -> None:
    """The whole command again with every stage a hit, servers running: few stages, all of them, and a larger model."""
    from tests.conftest import build_pico
    from tests.tiny_data import write_data_root, write_preset

    samples: dict[str, Any] = {}
    runtime = {"device": "auto", "gpu_memory": 0.3, "kv_cache_gb": 1, "engines": 2 if not gpus() else 1}
    with servers(folder, prefect=True):
        os.environ["SDD_DATA_ROOT"] = str(write_data_root(folder / "data"))
        small = build_pico(folder / "pico")
        large = build_pico(folder / "large", hidden_size=1024, intermediate_size=4096, num_attention_heads=32)
        presets = {
            "all stages": write_preset(folder / "all.yaml", small, runtime=runtime),
            "all stages, larger model": write_preset(folder / "large.yaml", large, runtime=runtime),
        }
        few = yaml.safe_load(presets["all stages"].read_text())
        few["evaluate"]["tasks"] = {"winogrande": few["evaluate"]["tasks"]["winogrande"]}
        few["evaluate"]["held_out"] = None
        (folder / "few.yaml").write_text(yaml.safe_dump(few))
        presets["few stages"] = folder / "few.yaml"
        for name, preset in presets.items():
            command = [sys.executable, "-m", "flows.recover", str(preset)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            samples[name] = []
            for _ in range(5):
                started = time.monotonic()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                samples[name].append(round(time.monotonic() - started, 2))
            stages = subprocess.run([*command, "--plan"], check=True, capture_output=True, text=True).stdout
            samples[f"{name}, hits"] = sum(line.startswith("hit") for line in stages.splitlines())
            print(f"  {name}: {samples[name]}", flush=True)
        samples["bytes of the models"] = [sum(f.stat().st_size for f in m.iterdir()) for m in (small, large)]
    record("rerun", "10 s", samples, statistics.median(samples["all stages"]) / 10, 1.0, higher_is_better=False)


BENCHMARKED: dict[str, Callable[[Path, Path], None]] = {
    call.__name__: call for call in (score, prune, generate, finetune, evaluate, store, rerun, plan)
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(BENCHMARKED), help=f"default: {' '.join(BENCHMARKED)}")
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: random weights")
    chosen = parser.parse_args()
    if len(chosen.names) > 1:
        options = ["--model", str(chosen.model)] if chosen.model else []
        failed = [
            name
            for name in chosen.names
            if subprocess.run([sys.executable, "-m", "tests.benchmarks.stages", name, *options], check=False).returncode
        ]
        sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
    (name,) = chosen.names
    keep_settings()
    with tempfile.TemporaryDirectory(prefix=f"sdd-bench-{name}-") as folder:
        needs_model = name in ("score", "generate", "finetune", "evaluate")
        model = chosen.model or (fresh(random_model, Path(folder, "model")) if needs_model else Path())
        BENCHMARKED[name](Path(folder), model)


if __name__ == "__main__":
    main()
