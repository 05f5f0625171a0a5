"""A data root of a few items a task, laid out as SDD_DATA_ROOT is, and a preset that runs on it in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import yaml

from tasks.domain.leaderboard import BENCHMARKS
from tests.conftest import pocket_pairs, write_jsonl

WORDS = ["river", "stone", "cloud", "apple", "winter", "garden", "letter", "music", "window", "bridge"]


def write_data_root(root: Path, items: int = 6) -> Path:
    """Every benchmark with `items` items, and sft/ and calibration/ made of the pocket pairs."""
    for name, benchmark in BENCHMARKS.items():
        for file in benchmark.files.values():
            for subject in _subjects() if name == "mmlu" else [""]:
                rows = [_item(name, number) for number in range(items)]
                write_jsonl(root / "openllm" / file.replace("*", subject), rows)
    pairs = [{**pair, "text": f"{pair['instruction']}\n{pair['answer']}"} for pair in pocket_pairs()]
    # JSON leaves U+2028 as it is, and `splitlines` breaks there.
    rows = [{"kind": p["kind"], "instruction": p["instruction"].replace(" ", "\u2028", 1), "answer": p["answer"]}
            for p in pairs]  # fmt: skip
    write_jsonl(root / "sft" / "pairs.jsonl.gz", rows)
    write_jsonl(root / "calibration" / "text.jsonl", [{"text": pair["text"]} for pair in pairs])
    return root


def write_preset(path: Path, model: Path, **changes: Any) -> Path:
    """A preset for the pico model on the tiny data root."""
    preset: dict[str, Any] = {
        "name": "pico",
        "model": {"kind": "folder", "id": "pico-llama", "path": str(model)},
        "score": {"calibration": {"file": "calibration/text.jsonl", "samples": 8, "length": 32}},
        "prune": {"blocks": 2},
        "dataset": {"sources": [
            {"name": kind, "kind": kind, "file": "sft/pairs.jsonl.gz", "where": {"kind": kind}, "rows": 6}
            for kind in ("math", "instruction")
        ]},
        "distil": {"max_tokens": 16, "max_length": 1024, "attempts": 1, "min_accept_rate": 0.0, "dtype": "float32"},
        "finetune": {"rank": 4, "alpha": 8, "batch": 4},
        "evaluate": {
            "dtype": "float32", "max_length": 1024, "max_generated": 8,
            "held_out": {"file": "calibration/text.jsonl", "windows": 3, "length": 32, "prompts": 3, "generated": 4},
            "tasks": {name: {"shots": min(benchmark.shots, 1), "limit": 1 if name == "mmlu" else 4}
                      for name, benchmark in BENCHMARKS.items()},
        },
        "runtime": {"device": "cpu", "kv_cache_gb": 1, "engines": 2},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(preset | changes))
    return path


def _subjects() -> list[str]:
    folder = Path(str(lm_eval.__file__)).parent / "tasks"
    pattern = BENCHMARKS["mmlu"].upstream
    return [path.stem.removeprefix("mmlu_") for path in sorted(folder.glob(pattern))]


def _item(name: str, number: int) -> dict[str, Any]:
    word, other = WORDS[number % len(WORDS)], WORDS[(number + 3) % len(WORDS)]
    choices = [f"the {word}", f"a {other} again", "nothing at all", f"the {other} and the {word}"]
    question = f"What did traveller {number} see near the {other}?"
    match name:
        case "arc_challenge":
            return {"id": f"item-{number}", "question": question, "answerKey": "ABCD"[number % 4],
                    "choices": {"text": choices, "label": list("ABCD")}}  # fmt: skip
        case "hellaswag":
            return {"ind": number, "activity_label": "Walking", "ctx_a": f"A traveller sees the {word}.",
                    "ctx_b": "she", "endings": choices, "label": str(number % 4)}  # fmt: skip
        case "truthfulqa_mc2":
            targets = {"choices": choices, "labels": [1, 1, 0, 0]}
            return {
                "question": question,
                "mc1_targets": {"choices": choices, "labels": [1, 0, 0, 0]},
                "mc2_targets": targets,
            }
        case "mmlu":
            return {"question": question, "subject": "tiny", "choices": choices, "answer": number % 4}
        case "winogrande":
            return {"sentence": f"The {word} is near the {other} because _ is heavy.", "option1": f"the {word}",
                    "option2": f"the {other}", "answer": str(1 + number % 2)}  # fmt: skip
        case "lambada_openai":
            return {"text": f"The traveller crossed the {other} and then, at last, saw the {word}"}
        case _:
            return {"question": f"There are {number} stones and 2 more. How many?",
                    "answer": f"{number} + 2 = {number + 2}\n#### {number + 2}"}  # fmt: skip
