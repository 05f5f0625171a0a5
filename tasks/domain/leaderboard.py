"""The benchmarks: shots, metric, and where an item's score stands in a sample."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """shots: the leaderboard's few-shot count. metric: key of an item's score. filter: the harness's answer filter.
    lenient_filter: one that finds the answer wherever it stands, for what is known and not said in the asked form.

    upstream: the task's YAML below lm_eval/tasks. hub: `id:config` of its dataset. question: column of the item's text.
    files: {split: file below openllm/ of a data root}, the tested split last.
    """

    shots: int
    metric: str
    upstream: str
    hub: str
    question: str
    files: dict[str, str]
    filter: str = "none"
    lenient_filter: str = ""
    generative: bool = False


# The OpenLLM Leaderboard v1.
LEADERBOARD: dict[str, Benchmark] = {
    "arc_challenge": Benchmark(
        25, "acc_norm", "arc/arc_challenge.yaml", "allenai/ai2_arc:ARC-Challenge", "question",
        {split: f"arc_challenge/{split}.jsonl" for split in ("train", "validation", "test")},
    ),
    "hellaswag": Benchmark(
        10, "acc_norm", "hellaswag/hellaswag.yaml", "Rowan/hellaswag", "ctx_a",
        {split: f"hellaswag/{split}.jsonl.gz" for split in ("train", "validation")},
    ),
    "truthfulqa_mc2": Benchmark(
        0, "acc", "truthfulqa/truthfulqa_mc2.yaml", "truthfulqa/truthful_qa:multiple_choice", "question",
        {"validation": "truthfulqa_mc/validation.jsonl.gz"},
    ),
    "mmlu": Benchmark(
        5, "acc", "mmlu/default/mmlu_*.yaml", "cais/mmlu:all", "question",
        {split: f"mmlu/{split}/*.jsonl.gz" for split in ("dev", "validation", "test")},
    ),
    "winogrande": Benchmark(
        5, "acc", "winogrande/default.yaml", "allenai/winogrande:winogrande_xl", "sentence",
        {"train": "winogrande/train_xl.jsonl.gz", "validation": "winogrande/validation.jsonl"},
    ),
    "gsm8k": Benchmark(
        5, "exact_match", "gsm8k/gsm8k.yaml", "openai/gsm8k:main", "question",
        {"train": "gsm8k/train.jsonl.gz", "test": "gsm8k/test.jsonl"}, filter="strict-match",
        lenient_filter="flexible-extract", generative=True,
    ),
}  # fmt: skip

# Beside the leaderboard and its average: it shows damage where multiple choice sits at chance.
LAMBADA = "lambada_openai"
BENCHMARKS = LEADERBOARD | {
    LAMBADA: Benchmark(
        0, "acc", "lambada/lambada_openai.yaml", "EleutherAI/lambada_openai:default", "text",
        {"test": "lambada/test.jsonl.gz"},
    ),
}  # fmt: skip
