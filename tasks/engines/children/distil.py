"""The unpruned model rewrites the answers in its own words: the self-distilled dataset (paper, section 2.2)."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tasks.algorithms.math_answers import CALCULATOR_MARK, FINAL_ANSWER
from tasks.algorithms.prompts import Message, prompts_ids
from tasks.algorithms.rewrites import Rule, rejection
from tasks.domain.stage import json_lines
from tasks.engines.child import die_with_parent
from tasks.engines.children.border import Report, serve, vllm_options

Row = dict[str, Any]
Rewritten = tuple["_Shard", Row, list[int], int, Any]  # prompt, attempt and what vLLM gave

SHARDS_AHEAD = 8  # whose prompts are token ids before the engine asks for them


def distil(request: dict[str, Any], _out: Path, report: Report) -> object:
    """request: checkpoint, rows (file), shards ([name, first row, row behind the last]), parts (folder), messages of
    the template, and the recipe's fields.

    Writes <parts>/<name>.jsonl for every shard, whole or not at all, as soon as its last row is decided. Returns the
    engine.
    """
    lines = json_lines(Path(request["rows"]))
    shards = [_Shard(name, [json.loads(line) for line in lines[first:end]]) for name, first, end in request["shards"]]
    # A process beside it makes prompts, reads and judges rewrites: on a GPU the engine's loop is short of time.
    with ProcessPoolExecutor(1, get_context("spawn"), _start_beside) as beside:
        return _rewrite(request, shards, beside, report)


def _start_beside() -> None:
    """In the process beside: end with the engine's process or its pool, and at once."""
    die_with_parent()
    atexit.register(os._exit, 0)  # the engine's process would wait for seconds of its libraries' cleaning up


def _rewrite(request: dict[str, Any], shards: list[_Shard], beside: ProcessPoolExecutor, report: Report) -> object:
    # What the kernel sends when the parent has died ends vLLM's own processes too, which would go on for ever.
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    waiting = _prompted(request, shards, beside)
    beside.submit(rejection, "1", "#### 1", "", "math", True, Rule(0, 1))  # brings its libraries meanwhile
    from vllm import LLM  # takes seconds, and not for the process beside, which imports this module too

    llm = LLM(model=request["checkpoint"], **vllm_options(request))
    engine = llm.llm_engine
    # Rows enter as others leave: a shard's second attempts do not queue behind the first attempts of all rows.
    window = 2 * engine.vllm_config.scheduler_config.max_num_seqs
    rule = Rule(request["min_length_ratio"], request["max_length_ratio"])
    running: dict[str, tuple[_Shard, Row, list[int], int]] = {}
    judged: deque[tuple[list[Rewritten], Future[list[tuple[str, str | None]]]]] = deque()
    total = sum(shard.undecided for shard in shards)
    decided = accepted = told = 0
    report(0.0, f"the model is loaded, {total} rows to rewrite")

    def submit(shard: _Shard, row: Row, prompt: list[int], attempt: int) -> None:
        name = f"{row['id']}/{attempt}"
        running[name] = shard, row, prompt, attempt
        engine.add_request(name, {"prompt_token_ids": prompt}, _sampling(request, row["id"], attempt))

    def decide(shard: _Shard, row: Row) -> None:
        nonlocal decided, accepted
        decided += 1
        accepted += row["outcome"] == "accepted"
        shard.undecided -= 1
        if not shard.undecided:
            shard.write(Path(request["parts"]))

    while True:
        while len(running) < window and (following := next(waiting, None)):
            shard, row, prompt = following
            if len(prompt) + request["max_tokens"] > request["max_length"]:
                row |= {"rewrite": None, "outcome": "failed", "reason": "prompt too long", "answer": None}
                decide(shard, row)
            else:
                submit(shard, row, prompt, 0)
        if decided > told:
            told = decided
            report(decided / total, f"{decided} of {total} rows, {accepted} rewrites accepted")
        if running:
            rewritten = [(*running.pop(output.request_id), output.outputs[0]) for output in engine.step()]
            if rewritten:
                cases = [_case(row, output, rule) for _, row, _, _, output in rewritten]
                judged.append((rewritten, beside.submit(_verdicts, request["checkpoint"], cases)))
        elif not judged:
            return llm
        while judged and (judged[0][1].done() or not running):
            rewritten, verdicts = judged.popleft()
            for (shard, row, prompt, attempt, output), verdict in zip(rewritten, verdicts.result(), strict=True):
                _settle(row, output, *verdict, request)
                if row["outcome"] == "accepted" or attempt + 1 == request["attempts"]:
                    decide(shard, row)
                else:
                    submit(shard, row, prompt, attempt + 1)


class _Shard:
    """Rows that are committed together."""

    def __init__(self, name: str, rows: list[Row]) -> None:
        self.name, self.rows, self.undecided = name, rows, len(rows)

    def write(self, parts: Path) -> None:
        unfinished = parts / f".{self.name}"
        unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        unfinished.rename(parts / f"{self.name}.jsonl")


def _prompted(
    request: dict[str, Any], shards: list[_Shard], beside: ProcessPoolExecutor
) -> Iterator[tuple[_Shard, Row, list[int]]]:
    """Each row with its prompt. The first prompts are asked for at once, while the model is loaded."""

    def ask(shard: _Shard) -> tuple[_Shard, Future[list[list[int]]]]:
        return shard, beside.submit(_prompts, request["checkpoint"], shard.rows, request["messages"])

    following = iter(shards)
    ahead = deque(map(ask, islice(following, SHARDS_AHEAD)))

    def rows() -> Iterator[tuple[_Shard, Row, list[int]]]:
        while ahead:
            shard, prompts = ahead.popleft()
            ahead.extend(map(ask, islice(following, 1)))
            for row, prompt in zip(shard.rows, prompts.result(), strict=True):
                yield shard, row, prompt

    return rows()


def _prompts(checkpoint: str, rows: list[Row], template: list[Message]) -> list[list[int]]:
    tokenizer = _tokenizer(checkpoint)
    return prompts_ids(tokenizer, [_rewrite_request(row, template) for row in rows])


@lru_cache(maxsize=1)
def _tokenizer(checkpoint: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


def _rewrite_request(row: Row, template: list[Message]) -> list[Message]:
    """The row's conversation with its last turn wrapped into the template's messages."""
    *earlier, last = row["prompt"]
    # GSM8K's calculator marks and its bare "#### 12" are notation, which small models copy.
    reference = FINAL_ANSWER.sub(r"The answer is \1.", CALCULATOR_MARK.sub("", row["reference"]))
    filling = {"request": last["content"], "reference": reference}
    return [*earlier, *({**message, "content": message["content"].format_map(filling)} for message in template)]


def _sampling(request: dict[str, Any], row_id: str, attempt: int) -> Any:
    """Seeded by row and attempt, so that a row's text does not depend on which rows stand beside it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    digest = hashlib.sha256(f"{request['seed']}/{row_id}/{attempt}".encode()).digest()
    return SamplingParams(
        temperature=request["temperature"], top_p=request["top_p"], max_tokens=request["max_tokens"],
        seed=int.from_bytes(digest[:4]), logprobs=request["top_logprobs"] or None,
        output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False,
    )  # fmt: skip


def _case(row: Row, output: Any, rule: Rule) -> tuple[Any, ...]:
    """What decides about a rewrite: its tokens, and the rest as `rejection` takes it."""
    finished = output.finish_reason == "stop"
    tokens = output.token_ids[:-1] if finished else output.token_ids  # without the token that ended it
    return list(tokens), row["reference"], row["prompt"][-1]["content"], row["kind"], finished, rule


def _verdicts(checkpoint: str, cases: list[tuple[Any, ...]]) -> list[tuple[str, str | None]]:
    """The text of each rewrite, and why it is not kept, if so."""
    texts = _tokenizer(checkpoint).batch_decode(
        [case[0] for case in cases], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    rewrites = [text.strip() for text in texts]
    return [(rewrite, rejection(rewrite, *case[1:])) for rewrite, case in zip(rewrites, cases, strict=True)]


def _settle(row: Row, output: Any, rewrite: str, reason: str | None, request: dict[str, Any]) -> None:
    row["rewrite"] = rewrite
    if reason is None:
        row |= {"outcome": "accepted", "reason": "", "answer": _answer(row)}
        if request["top_logprobs"]:
            row["logprobs"] = _logprobs(output)
    else:
        row |= {"outcome": "kept_original", "reason": reason, "answer": row["reference"]}


def _answer(row: Row) -> str:
    """The accepted rewrite; in mathematics with GSM8K's last line, "#### 12", without which its metric finds nothing.

    Both arms then learn the form alike, and differ by the words alone.
    """
    rewrite: str = row["rewrite"]
    line = FINAL_ANSWER.search(row["reference"]) if row["kind"] == "math" else None
    return f"{rewrite}\n{line[0]}" if line and not FINAL_ANSWER.search(rewrite) else rewrite


def _logprobs(output: Any) -> dict[str, Any]:
    """tokens: the generated ids. top: for each of them the most likely ids and their log-probabilities."""
    top = [[[token, round(entry.logprob, 4)] for token, entry in place.items()] for place in output.logprobs]
    return {"tokens": list(output.token_ids), "top": top}


if __name__ == "__main__":
    serve(distil)
