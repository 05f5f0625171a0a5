"""The instruction rows before the rewriting: one form for every dataset."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import task
from prefect.states import State

from tasks.algorithms.overlap import BenchmarkText
from tasks.algorithms.prompts import Message, request
from tasks.benchmarks import items_root
from tasks.domain.errors import DataError
from tasks.domain.recipe import Dataset, Rows
from tasks.domain.stage import Stage
from tasks.engines.child import Progress
from tasks.materialise import Ref, materialise
from tasks.policies import STAGE
from tasks.store.sources import benchmark_questions, read_table


@task(task_run_name="rows {stage.slug}", **STAGE)
def load_rows(stage: Stage, dataset: Dataset, benchmarks: Ref | None) -> State[Ref]:
    """Write rows.jsonl: id, source, kind, prompt (messages), reference, without what overlaps a benchmark item.

    facts: rows of each source, and how many of each were dropped.
    """

    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        known = benchmark_text(stage, benchmarks)
        counts: dict[str, int] = {}
        dropped: dict[str, int] = {}
        with (out / "rows.jsonl").open("w") as file:
            for number, source in enumerate(dataset.sources):
                counts[source.name] = dropped[source.name] = 0
                for row in draw(source, dataset.seed, stage.recipe["sources"][number].get("revision")):
                    if known and known.overlaps("\n".join(turn["content"] for turn in row["prompt"])):
                        dropped[source.name] += 1
                        continue
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    counts[source.name] += 1
                    if counts[source.name] == source.rows:
                        break
                progress((number + 1) / len(dataset.sources), f"{source.name}: {counts[source.name]} rows")
        if not any(counts.values()):
            raise DataError("dataset.overlap_words: every row overlaps a benchmark item; give other rows")
        return {"rows": sum(counts.values()), "sources": counts, "overlapping": dropped}

    return materialise(stage, produce)


def benchmark_text(stage: Stage, benchmarks: Ref | None) -> BenchmarkText | None:
    """The n-grams of all benchmark items, as the stage's recipe pins them; None where the preset wants no check."""
    overlap = stage.recipe["overlap"]
    if overlap is None:
        return None
    questions = (
        question
        for task, identity in overlap["items"].items()
        for question in benchmark_questions(task, items_root(identity, benchmarks), identity.get("revision"))
    )
    return BenchmarkText(questions, overlap["words"])


def draw(source: Rows, seed: int, commit: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of one source in their common form, in a random order; raises DataError when there is none.

    commit: as in `read_table`. Ids are places in the whole table, so that a row keeps its id whatever the limit is.
    """
    read = _conversation if source.kind == "chat" else _instruction
    table = read_table(source, _columns(source), commit)
    order = list(range(len(table)))
    random.Random(f"{seed}/{source.name}").shuffle(order)
    found = False
    for index in order:
        row = table[index]
        prompt, reference = read(row, source)
        if reference and prompt and all(str(row[name]) == value for name, value in source.where.items()):
            found = True
            yield {
                "id": f"{source.name}-{index:06d}", "source": source.name, "kind": source.kind,
                "prompt": prompt, "reference": reference,
            }  # fmt: skip
    if not found:
        raise DataError(f"dataset {source.name}: no row has {', '.join(_columns(source))}, and where={source.where}")


def _columns(source: Rows) -> tuple[str, ...]:
    read = (source.messages,) if source.kind == "chat" else (source.instruction, source.context, source.answer)
    return tuple(filter(None, (*read, *source.where)))


def _instruction(row: dict[str, Any], source: Rows) -> tuple[list[Message], str]:
    instruction, answer = _text(row, source.instruction), _text(row, source.answer)
    context = _text(row, source.context) if source.context else ""
    return (request(instruction, context) if instruction else []), answer


def _conversation(row: dict[str, Any], source: Rows) -> tuple[list[Message], str]:
    """The turns up to the last assistant's, and that one; nothing where it does not follow a user's."""
    turns = [{"role": str(turn["role"]), "content": str(turn["content"]).strip()} for turn in row[source.messages]]
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if len(turns) < 2 or turns[-2]["role"] != "user":
        return [], ""
    return turns[:-1], turns[-1]["content"]


def _text(row: dict[str, Any], column: str) -> str:
    return str(row[column] or "").strip()
