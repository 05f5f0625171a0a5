"""The six tasks of the OpenLLM Leaderboard v1: shots, metric, and where an item's score stands in a sample."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """shots: the leaderboard's few-shot count. metric: key of an item's score. filter: the harness's answer filter.

    upstream: the task's YAML below lm_eval/tasks. files: {split: file below openllm/ of a data root}.
    """

    shots: int
    metric: str
    upstream: str
    files: dict[str, str]
    filter: str = "none"
    generative: bool = False


LEADERBOARD: dict[str, Benchmark] = {
    "arc_challenge": Benchmark(
        25, "acc_norm", "arc/arc_challenge.yaml",
        {split: f"arc_challenge/{split}.jsonl" for split in ("train", "validation", "test")},
    ),
    "hellaswag": Benchmark(
        10, "acc_norm", "hellaswag/hellaswag.yaml",
        {split: f"hellaswag/{split}.jsonl.gz" for split in ("train", "validation")},
    ),
    "truthfulqa_mc2": Benchmark(
        0, "acc", "truthfulqa/truthfulqa_mc2.yaml", {"validation": "truthfulqa_mc/validation.jsonl.gz"}
    ),
    "mmlu": Benchmark(
        5, "acc", "mmlu/default/mmlu_*.yaml",
        {split: f"mmlu/{split}/*.jsonl.gz" for split in ("dev", "validation", "test")},
    ),
    "winogrande": Benchmark(
        5, "acc", "winogrande/default.yaml",
        {"train": "winogrande/train_xl.jsonl.gz", "validation": "winogrande/validation.jsonl"},
    ),
    "gsm8k": Benchmark(
        5, "exact_match", "gsm8k/gsm8k.yaml", {"train": "gsm8k/train.jsonl.gz", "test": "gsm8k/test.jsonl"},
        filter="strict-match", generative=True,
    ),
}  # fmt: skip
