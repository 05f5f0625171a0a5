"""The unpruned model rewrites the answers in its own words: the self-distilled dataset (paper, section 2.2)."""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from tasks.algorithms.prompts import Message, prompt_ids
from tasks.algorithms.rewrites import FINAL_ANSWER, Rule, rejection
from tasks.domain.errors import GateError
from tasks.engines.children.border import Meter, Report, serve, vllm_options

WORST_SHOWN = 10
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")

Row = dict[str, Any]


def distil(request: dict[str, Any], out: Path, report: Report) -> None:
    """request: checkpoint, rows (file), messages of the template, and the recipe's fields.

    Writes rows.jsonl, one object a row, in input order.
    """
    rows: list[Row] = [json.loads(line) for line in Path(request["rows"]).read_text().splitlines()]
    llm = LLM(model=request["checkpoint"], **vllm_options(request))
    tokenizer = llm.get_tokenizer()
    prompts = {row["id"]: prompt_ids(tokenizer, _rewrite_request(row, request["messages"])) for row in rows}
    for row in rows:
        row |= {"rewrite": None, "outcome": "failed", "reason": "prompt too long", "answer": None}
    pending = [row for row in rows if len(prompts[row["id"]]) + request["max_tokens"] <= request["max_length"]]
    for attempt in range(request["attempts"]):
        outputs = llm.generate(
            [{"prompt_token_ids": prompts[row["id"]]} for row in pending],
            [_sampling(request, row["id"], attempt) for row in pending],
            use_tqdm=partial(Meter, report=report, text=f"attempt {attempt + 1} of {request['attempts']}"),
        )
        for row, output in zip(pending, outputs, strict=True):
            _judge(row, output.outputs[0].text.strip(), output.outputs[0].finish_reason == "stop", request)
        pending = [row for row in pending if row["outcome"] != "accepted"]
        if not pending:
            break

    with (out / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _check_rate(rows, request["min_accept_rate"])


def _rewrite_request(row: Row, template: list[Message]) -> list[Message]:
    """The row's conversation with its last turn wrapped into the template's messages."""
    *earlier, last = row["prompt"]
    # GSM8K's calculator marks and its bare "#### 12" are notation, which small models copy.
    reference = FINAL_ANSWER.sub(r"The answer is \1.", CALCULATOR_MARK.sub("", row["reference"]))
    filling = {"request": last["content"], "reference": reference}
    return [*earlier, *({**message, "content": message["content"].format_map(filling)} for message in template)]


def _sampling(request: dict[str, Any], row_id: str, attempt: int) -> SamplingParams:
    """Seeded by row and attempt, so that a row's text does not depend on which rows stand beside it."""
    digest = hashlib.sha256(f"{request['seed']}/{row_id}/{attempt}".encode()).digest()
    return SamplingParams(
        temperature=request["temperature"], top_p=request["top_p"], max_tokens=request["max_tokens"],
        seed=int.from_bytes(digest[:4]), detokenize=True,
    )  # fmt: skip


def _judge(row: Row, rewrite: str, finished: bool, request: dict[str, Any]) -> None:
    rule = Rule(request["min_length_ratio"], request["max_length_ratio"])
    reason = rejection(rewrite, row["reference"], row["prompt"][-1]["content"], row["kind"], finished, rule)
    row["rewrite"] = rewrite
    if reason is None:
        row |= {"outcome": "accepted", "reason": "", "answer": rewrite}
    else:
        row |= {"outcome": "kept_original", "reason": reason, "answer": row["reference"]}


def _check_rate(rows: list[Row], minimum: float) -> None:
    accepted = sum(row["outcome"] == "accepted" for row in rows)
    if accepted < minimum * len(rows):
        worst = [row for row in rows if row["outcome"] != "accepted"][:WORST_SHOWN]
        shown = "\n".join(f"- {row['id']} ({row['reason']}): {row['rewrite']!r:.120}" for row in worst)
        raise GateError(
            f"only {accepted} of {len(rows)} rewrites were accepted, fewer than distil.min_accept_rate={minimum}; "
            f"the model cannot rewrite this dataset with this template:\n{shown}"
        )


if __name__ == "__main__":
    serve(distil)
