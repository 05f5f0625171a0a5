"""The instruction rows before the rewriting: one form for every dataset."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from prefect import task
from prefect.states import State

from tasks.algorithms.prompts import request
from tasks.domain.errors import DataError
from tasks.domain.recipe import Dataset, Rows
from tasks.domain.stage import Stage
from tasks.engines.child import Progress
from tasks.materialise import Ref, materialise
from tasks.policies import STAGE
from tasks.store.sources import read_table


@task(task_run_name="rows {stage.slug}", **STAGE)
def load_rows(stage: Stage, dataset: Dataset) -> State[Ref]:
    """Write rows.jsonl: id, source, kind, prompt (messages), reference. facts: rows of each source."""

    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        counts: dict[str, int] = {}
        with (out / "rows.jsonl").open("w") as file:
            for number, source in enumerate(dataset.sources):
                rows = list(draw(source, dataset.seed))
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                counts[source.name] = len(rows)
                progress((number + 1) / len(dataset.sources), f"{source.name}: {len(rows)} rows")
        return {"rows": sum(counts.values()), "sources": counts}

    return materialise(stage, produce, engine=False)


def draw(source: Rows, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of one source in their common form; raises DataError when none is left.

    Ids are places in the whole table, so that a row keeps its id whatever the limit is.
    """
    columns = tuple(filter(None, (source.instruction, source.context, source.answer, *source.where)))
    table = read_table(source, columns)
    order = list(range(len(table)))
    random.Random(f"{seed}/{source.name}").shuffle(order)
    drawn = list(islice((index for index in order if _fits(table[index], source)), source.rows))
    if not drawn:
        raise DataError(
            f"dataset {source.name}: no row has {source.instruction!r} and {source.answer!r}, and where={source.where}"
        )
    for index in sorted(drawn):
        row = table[index]
        context = _text(row, source.context) if source.context else ""
        yield {
            "id": f"{source.name}-{index:06d}", "source": source.name, "kind": source.kind,
            "prompt": request(_text(row, source.instruction), context), "reference": _text(row, source.answer),
        }  # fmt: skip


def _fits(row: dict[str, Any], source: Rows) -> bool:
    wanted = all(str(row[name]) == value for name, value in source.where.items())
    return wanted and bool(_text(row, source.instruction) and _text(row, source.answer))


def _text(row: dict[str, Any], column: str) -> str:
    return str(row[column] or "").strip()
