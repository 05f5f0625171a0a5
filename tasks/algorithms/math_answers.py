"""Worked answers: whether two come to the same result, and whether the steps are shown (paper, section 2.2)."""

from __future__ import annotations

import re
from decimal import Decimal

FINAL_ANSWER = re.compile(r"^####\s*(.*\S)", re.M)  # GSM8K's mark
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
VALUE = re.compile(r"(?<![\w.])-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
LATEX_COMMAND = re.compile(r"\\[a-z]+", re.I)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
ANSWER_MARK = re.compile(
    r"^####\s*(?=\W{0,3}\d|\S+\s*\Z)|\\boxed(?=\{)|(?<!to )\banswer\b[^.\n]{0,40}?(?:\bis\b|:|=)", re.I | re.M
)
CONCLUSION = re.compile(r".*(?:=|\b(?:so|thus|therefore|hence|then)\b)(?=.*\d)", re.I | re.S)
DENIED = re.compile(
    r"(?:\bnot|n['\u2019]t|\bnever|\brather than|\binstead of)\s+(?:\w+\s+){0,2}?-?\$?\d[\d,.]*\b", re.I
)
SCALE = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
SCALED = re.compile(rf"(\d[\d,]*(?:\.\d+)?)\s+({'|'.join(SCALE)})\b", re.I)
MIXED = re.compile(r"(?<![\d./])(\d+)\s+(\d+)/(\d+)(?![\d/])")
MIN_STEP_SHARE = 0.5  # of the reference's intermediate results that a worked answer must show


def shows_steps(text: str, reference: str, prompt: str) -> bool:
    """Whether the text holds at least half of the reference's intermediate results.

    Those are the numbers of the reference that neither stand in the prompt nor are its last one.
    """
    numbers = NUMBER.findall(reference)
    intermediate = set(numbers) - set(NUMBER.findall(prompt)) - set(numbers[-1:])
    return len(intermediate & set(NUMBER.findall(text))) >= MIN_STEP_SHARE * len(intermediate)


def same_answer(text: str, reference: str) -> bool:
    """Whether the text's conclusion states the reference's final answer: by value (math-verify, which takes 25 % for 25
    and for 0.25), or letter by letter where both mark an answer that is no value.

    The conclusion follows the last mark (`####`, a box, "the answer is"), else it is the last clause with a number.
    """
    from math_verify import parse, verify  # pulls sympy in; its timeouts need the main thread

    (gold, gold_marked), (own, own_marked) = _conclusion(reference), _conclusion(text)
    value = parse(gold)
    if not value or not any(map(str.isdigit, gold)):
        plain = [letters_of(LATEX_COMMAND.sub("", conclusion)) for conclusion in (gold, own)]
        return gold_marked and own_marked and plain[0] == plain[1] != ""
    stated = [own] if "\\" in own else [own, *VALUE.findall(own)]
    # "26 billion": the question may ask for billions, or for the number.
    stated += [f"{Decimal(number.replace(',', '')) * SCALE[scale.lower()]:f}" for number, scale in SCALED.findall(own)]
    return any(verify(value, parse(part)) for part in stated)


def _conclusion(answer: str) -> tuple[str, bool]:
    """The words that state the final answer, and whether a mark stands before them."""
    answer = re.sub(r"\u2212|\bnegative (?=\d)", "-", answer)
    answer = MIXED.sub(lambda mixed: f"{int(mixed[1]) * int(mixed[3]) + int(mixed[2])}/{mixed[3]}", answer)
    answer = DENIED.sub("", answer)
    marks = [*ANSWER_MARK.finditer(answer)]
    if marks and marks[-1][0].startswith("\\boxed"):
        return "\\boxed" + _braced(answer[marks[-1].end() :]), True
    sentences = SENTENCE_END.split(answer[marks[-1].end() :].lstrip("\n *:") if marks else answer)
    numbered = [sentence for sentence in sentences if any(map(str.isdigit, sentence))]
    sentence = sentences[0] if marks else numbered[-1] if numbered else ""
    return CONCLUSION.sub("", sentence), bool(marks)


def _braced(text: str) -> str:
    """The text up to the brace that closes its first."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return text[: place + 1]
    return text


def letters_of(text: str) -> str:
    """The text without spaces, punctuation and case."""
    return "".join(filter(str.isalnum, text.casefold()))
