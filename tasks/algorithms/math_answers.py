"""Worked answers: whether two come to the same result, and whether the steps are shown (paper, section 2.2)."""

from __future__ import annotations

import re
from decimal import Decimal

CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")  # GSM8K's
FINAL_ANSWER = re.compile(r"^####\s*(\S.*)", re.M)  # likewise
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
# A number that is a value by itself: not part of a word, power, product, range, ratio, or time of day.
VALUE = re.compile(
    r"""(?<![a-z\d.^\\{/:+*])(?<!\d-)(?<!\d\s[-/*+]\s)
    -?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?%?
    (?![\d^{}]|\s?[-:/*+^]\s?\d|[a-z\u03c0]\b)""",
    re.I | re.X,
)
WORD = re.compile(r"(?:\\boxed\{)?(?:\\text\{)?[a-z ]{3,}[.}]*", re.I)
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bi\.e\.)(?<!\be\.g\.)(?<!\bRs\.)\s+|\n+")
ANSWER_MARK = re.compile(
    r"""^\#\#\#\#\s*(?=\W{0,3}\d|\S+\s*\Z)  |  \\(?:boxed|fbox)\s*(?=\{)
    | (?:^\W*|\b(?:the|my|final)[ ]) (?:(?:final|correct)[ ])? answer\b
      (?: \W*: | [^.:=\n]{0,40}? \bis\b (?![ ](?:worth|based|correct|right)\b) :? )""",
    re.I | re.M | re.X,
)
CHECK = re.compile(r"\W*(?:to |we can |let us |let['\u2019]s )*(?:verif|check)", re.I)
ASIDE = re.compile(r"\((?:=|i\.e\.)[^)]*\)")
LEADS_TO = re.compile(r"=|\b(?:(?<!\bdo )so(?! that\b)|thus|therefore|hence|then)\b", re.I)
DENIED = re.compile(
    r"""(?:\b(?:not|never|rather[ ]than|instead[ ]of)|n['\u2019]t)\s+
    (?:\w+\s+){0,2}?-?\$?\d[\d,.]*\b""",
    re.I | re.X,
)
SCALE = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
SCALED = re.compile(rf"(?<![\d,.])(\d[\d,]{{0,20}}(?:\.\d{{1,9}})?) ({'|'.join(SCALE)})\b", re.I)
MIXED = re.compile(r"(?<![\d./])(\d{1,15}) (\d{1,9})/(\d{1,9})(?![\d/])")
LONGEST_CONCLUSION = 300  # letters; what is longer is none
MIN_STEP_SHARE = 0.5  # of the reference's intermediate results that a worked answer must show


def shows_steps(text: str, reference: str, prompt: str) -> bool:
    """Whether the text holds at least half of the reference's intermediate results, in whatever form.

    Those are the numbers of the reference that neither stand in the prompt nor are its last one.
    """
    numbers = _numbers(reference)
    intermediate = set(numbers) - set(_numbers(prompt)) - set(numbers[-1:])
    return len(intermediate & set(_numbers(text))) >= MIN_STEP_SHARE * len(intermediate)


def _numbers(text: str) -> list[Decimal]:
    plain = CALCULATOR_MARK.sub("", text).replace("{,}", ",")
    return [Decimal(number.replace(",", "")) for number in NUMBER.findall(plain)]


def same_answer(text: str, reference: str, prompt: str) -> bool:
    """Whether the text's conclusion states the reference's final answer: by value (math-verify, which takes 25 % for 25
    and for 0.25), or letter by letter where that is a word.

    The conclusion follows the last mark (`####`, a box, "the answer is") and counts with its first value. Without a
    mark it is the last clause with a number, and counts with every value, but for the prompt's where there are others.
    """
    from math_verify import parse, verify  # pulls sympy in; its timeouts need the main thread

    (gold, gold_marked), (own, own_marked) = _conclusion(reference), _conclusion(text)
    if len(own) > LONGEST_CONCLUSION:
        return False
    if WORD.fullmatch(gold):
        return gold_marked and own_marked and _word(gold) == _word(own)
    formula, values = f"${own.strip(' .$*')}$", VALUE.findall(own)
    if "\\" in own:
        stated = [own, formula]
    elif own_marked:
        stated = [*values[:1], formula]
    else:
        given = set(_numbers(prompt))
        stated = [value for value in values if not given.issuperset(_numbers(value))] or values or [formula]
    # "26 billion": the question may ask for billions, or for the number.
    stated += [f"{Decimal(number.replace(',', '')) * SCALE[scale.lower()]:f}" for number, scale in SCALED.findall(own)]
    value = parse(gold, parsing_timeout=1) or parse(f"${gold}$", parsing_timeout=1)
    return bool(value) and any(
        verify(value, parse(part, parsing_timeout=1), timeout_seconds=1) for part in stated if part.strip("$")
    )


def _word(conclusion: str) -> str:
    return letters_of(re.sub(r"\\(?:boxed|text)\b", "", conclusion))


def _conclusion(answer: str) -> tuple[str, bool]:
    """The words that state the final answer, and whether a mark stands before them."""
    answer = re.sub(r"\\[()\[\]]", "$", answer.replace("\\$", "$")).replace("-$", "-")
    answer = re.sub(r"[\u2212\u2013](?=\$?\d)|\bnegative (?=\$?\d)", "-", answer)
    answer = MIXED.sub(lambda mixed: f"{int(mixed[1]) * int(mixed[3]) + int(mixed[2])}/{mixed[3]}", answer)
    answer = ASIDE.sub("", DENIED.sub("", answer))
    sentences = [sentence for sentence in SENTENCE_END.split(answer) if not CHECK.match(sentence)]
    told = "\n".join(sentences)
    if marks := [*ANSWER_MARK.finditer(told)]:
        rest = told[marks[-1].end() :]
        return (
            "\\boxed" + _braced(rest) if rest.startswith("{") else _clause(rest.strip("\n *:").split("\n")[0])
        ), True
    numbered = [sentence for sentence in sentences if any(map(str.isdigit, sentence))]
    return _clause(numbered[-1]) if numbered else "", False


def _clause(sentence: str) -> str:
    """What follows the last word or sign that leads to a result with a number."""
    last_digit = max((place for place, letter in enumerate(sentence) if letter.isdigit()), default=0)
    leads = [*LEADS_TO.finditer(sentence, 0, last_digit)]
    return sentence[leads[-1].end() :] if leads else sentence


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
