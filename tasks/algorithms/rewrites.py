"""Which rewrites are kept (paper, section 2.2: conditional selection).

Math rows: only with the reference's final answer. Open requests: any sound text. What is not kept
falls back to the reference answer, so that no row is lost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FINAL_ANSWER = re.compile(r"####\s*(.+)")
REFUSAL = re.compile(
    r"^\W*(i['’]?m sorry|i am sorry|sorry,|i can(?:['’]|no)t (?:help|assist|answer|provide)|i am unable|i['’]?m unable"
    r"|as an ai\b)",
    re.I,
)
TALKS_ABOUT_TASK = re.compile(
    r"\b(?:(?:the|a) reference|(?:reference|given|provided|original) (?:answer|response|solution|question|request)"
    r"|(?:answer|response|solution) to (?:this|the|your) (?:request|question|problem)"
    r"|(?:your|my) own (?:words|answer|response))\b",
    re.I,
)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
MIN_STEP_SHARE = 0.5  # of the reference's intermediate results that a worked answer must show
LOOP_LENGTH = 4  # words
LOOP_REPEATS = 5
SLACK_WORDS = 60  # short references may get a full sentence or two


@dataclass(frozen=True)
class Rule:
    """Bounds on the length of a rewrite, as multiples of the reference's words."""

    min_length_ratio: float
    max_length_ratio: float


def rejection(rewrite: str, reference: str, prompt: str, kind: str, finished: bool, rule: Rule) -> str | None:
    """Why a rewrite is not kept, or None when it is.

    finished: the model ended by a stop token, not at the length limit.
    """
    text = rewrite.strip()
    words, reference_words = text.split(), reference.split()
    if not text:
        return "empty"
    if not finished:
        return "unfinished"
    if REFUSAL.search(text):
        return "refusal"
    if is_loop(words):
        return "repetition"
    if text in prompt and text not in reference:
        return "copies the prompt"
    if TALKS_ABOUT_TASK.search(text) and not TALKS_ABOUT_TASK.search(reference):
        return "talks about the task"
    if len(words) < rule.min_length_ratio * len(reference_words):
        return "too short"
    if len(words) > rule.max_length_ratio * len(reference_words) + SLACK_WORDS:
        return "too long"
    if kind == "math":
        if not same_answer(text, reference):
            return "other final answer"
        if not shows_steps(text, reference, prompt):
            return "no steps"
    return None


def is_loop(words: list[str]) -> bool:
    """True when some run of four words stands at least five times in the text."""
    counts: dict[tuple[str, ...], int] = {}
    for start in range(len(words) - LOOP_LENGTH + 1):
        run = tuple(words[start : start + LOOP_LENGTH])
        counts[run] = counts.get(run, 0) + 1
        if counts[run] >= LOOP_REPEATS:
            return True
    return False


def shows_steps(text: str, reference: str, prompt: str) -> bool:
    """Whether the text holds at least half of the reference's intermediate results.

    Those are the numbers of the reference that neither stand in the prompt nor are its last one.
    """
    numbers = NUMBER.findall(reference)
    intermediate = set(numbers) - set(NUMBER.findall(prompt)) - set(numbers[-1:])
    return len(intermediate & set(NUMBER.findall(text))) >= MIN_STEP_SHARE * len(intermediate)


def same_answer(text: str, reference: str) -> bool:
    """Whether both texts come to the same final answer, by value (math-verify)."""
    from math_verify import parse, verify  # pulls sympy in; its timeouts need the main thread

    def final(answer: str) -> list[object]:
        marked = FINAL_ANSWER.findall(answer)
        return list(parse(marked[-1] if marked else answer))

    gold, own = final(reference), final(text)
    return bool(gold and own and verify(gold, own))
