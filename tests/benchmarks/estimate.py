"""What a run of Llama-3.1-8B's and 70B's shape would take on 1 and 8 H100s, from the throughput that was measured.

    .venv/bin/python -m tests.benchmarks.estimate        # reads results/shape_8b_gpu.json, prints a table

Seconds of work at the measured rates, without starts of engines. With 8 GPUs the rows of the generation are split by
shards, each arm's fine-tuning has half of them (as if FSDP cost nothing), and each model is evaluated on a GPU of its
own: an evaluation is not split. 70B is the work of 8B times the ratio of the parameters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from tests.benchmarks.record import RESULTS

CALIBRATION = 128 * 2048  # tokens, of paper-llama3.1-8b
ROW, ANSWER = 182, 101  # tokens of a training row and its rewritten answer, mean of the 23,330 of Qwen's run
DATASETS = {"GSM8K, Dolly, Alpaca (23,330 rows)": 23_330, "with OpenMathInstruct (324,000 rows)": 324_000}
LARGER = 70.6 / 8.03  # parameters
KEPT = 26 / 32  # blocks of the pruned model
MODELS = ("unpruned", "pruned", "SFT", "SDD")


def main() -> None:
    print("| dataset, model | GPUs | score | prune | distil | fine-tune, both arms | evaluate, four models | sum |")
    print("|---|---|---|---|---|---|---|---|")
    for name, rows in DATASETS.items():
        for size, factor in (("8B", 1.0), ("70B", LARGER)):
            for gpus in (1, 8):
                stages = [seconds * factor for seconds in stage_seconds(rows, gpus)]
                print(f"| {name}, {size} | {gpus} | {' | '.join(map(minutes, [*stages, sum(stages)]))} |")


def stage_seconds(rows: int, gpus: int) -> Iterator[float]:
    measured = json.loads((RESULTS / "shape_8b_gpu.json").read_text())["samples"]
    yield CALIBRATION / measured["score"]["tokens_per_second"]
    yield measured["prune"]["seconds"]
    yield rows * ANSWER / measured["generate_original"]["batch 256"]["tokens_per_second"] / gpus
    yield 2 * rows * ROW / measured["finetune"]["tokens_per_second"] / gpus
    pruned = measured["evaluate"]["whole_suite_seconds"]
    of_models = [pruned / KEPT if name == "unpruned" else pruned for name in MODELS]
    yield max(of_models) if gpus >= len(MODELS) else sum(of_models)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    main()
