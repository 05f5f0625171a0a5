"""Worked answers: whether two come to the same result, the steps are shown, and their sums are right (section 2.2)."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

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
SCALE_WORDS = rf"{'|'.join(SCALE)}|hundred|dozen|percent|cents?"
NO_UNIT = rf"(?:{SCALE_WORDS}|and|or|plus|minus|times|of|is|so|to|a|an|the|pi)\b"
UNIT = rf"(?: ?/? ?(?!{NO_UNIT})[a-z]{{2,}}){{0,4}}+"  # of a quantity: "3 apples per basket", "$3/hour"
FIGURE = r"(?:\d{1,15}(?:\.\d{1,9})?|\.\d{1,9})%?"
TERM = rf"\({{0,3}}+{FIGURE}{UNIT}\){{0,3}}+"
EQUATION = re.compile(
    r"(?<![\w.,)%/*+^:(\u221a-])(?<![)%/*+^\d(-] )(?<!\bof )(?<!\btimes )"
    rf"(?P<left>{TERM}(?: ?[-+*/] ?{TERM}){{1,20}}+) ?= ?(?P<right>-?{FIGURE})(?P<unit>(?: (?!{NO_UNIT})[a-z]{{2,}})?+)"
    rf"(?![\w^]|[.,]\d| \d| (?:{SCALE_WORDS})\b|{UNIT} ?[-+*/^(] ?[\d(a-z.])",
    re.I,
)
PLAIN_SUMS = (  # sums in LaTeX and in prose, as EQUATION reads them
    (CALCULATOR_MARK, ""),
    (re.compile(r"\\text\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\(?:left|right|[()\[\],;!%])|\\?[$\u20ac\u00a3{}]|(?<!\d)\*\*|\*\*(?!\d)"), ""),
    (re.compile(r"\\times|\\cdot|[\u00d7\u00b7]|(?<=[\da-z)%] )[xX](?= [\d(.])|(?<=\d)[xX](?=\d)"), "*"),
    (re.compile(r"\\div|\u00f7"), "/"),
    (re.compile(r"[\u2212\u2013]"), "-"),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
    (re.compile(r"[ \t]+"), " "),
)
OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
ROUNDING = Fraction(1, 200)  # of the value; less than one of the last digit shown is rounding too
LONGEST_CONCLUSION = 300  # letters; what is longer is none
MIN_STEP_SHARE = 0.5  # of the reference's intermediate results that a worked answer must show


def shows_steps(text: str, reference: str, prompt: str) -> bool:
    """Whether the text holds at least half of the reference's intermediate results, in whatever form.

    Those are the numbers of the reference that neither stand in the prompt nor are its last one.
    """
    numbers = _numbers(reference)
    intermediate = set(numbers) - set(_numbers(prompt)) - set(numbers[-1:])
    return len(intermediate & set(_numbers(text))) >= MIN_STEP_SHARE * len(intermediate)


def has_false_equation(text: str) -> bool:
    """Whether the two sides of an equation of plain numbers, with units or without, differ by more than rounding.

    What may be right in some reading is let pass: per cent for hundredths or of what stands before it, "a / b / c", a
    proper fraction by itself, as in "1/2 hour = 30 minutes", sums of several units, and a result in a new one.
    """
    for pattern, plain in PLAIN_SUMS:
        text = pattern.sub(plain, text)
    return any(_is_false(**equation.groupdict()) for equation in EQUATION.finditer(text))


def _is_false(left: str, right: str, unit: str) -> bool:
    units = {name.lower().rstrip("s") for name in re.findall(r"[\d)%] ?([a-z]{2,})", left, re.I)}
    left = re.sub(r" ?/? ?[a-z]+", "", left, flags=re.I)
    left = left if left.count("(") == left.count(")") else left.strip("()")
    shown, percent = right.rstrip("%"), right.endswith("%")
    try:
        readings = [_value(left.replace("%", ""))]
        if percent or "%" in left:
            readings.append(_value(re.sub(r"([\d.]+)%", r"(\1/100)", left)) * (100 if percent else 1))
    except (SyntaxError, ZeroDivisionError):
        return False
    signs = re.findall(r"[-+*/]", left)
    if signs.count("/") > 1 or (signs == ["/"] and readings[0] < 1):
        return False
    if not {"*", "/"} & set(signs) and (len(units) > 1 or 0 < left.count("%") <= len(signs)):
        return False
    if units and unit and unit.strip().lower().rstrip("s") not in units:
        return False
    last_digit = Fraction(1, 10 ** len(shown.partition(".")[2]))
    return all(abs(value - Fraction(shown)) >= max(last_digit, ROUNDING * abs(value)) for value in readings)


def _value(sums: str | ast.expr) -> Fraction:
    node = ast.parse(sums, mode="eval").body if isinstance(sums, str) else sums
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    assert isinstance(node, ast.Constant)
    return Fraction(repr(node.value))


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
