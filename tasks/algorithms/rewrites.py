"""Which rewrites are kept (paper, section 2.2: conditional selection).

Math rows: only with the reference's final answer, its steps, and no false sums. Open requests: any sound text. What is
not kept falls back to the reference answer, so that no row is lost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from tasks.algorithms.math_answers import has_false_equation, letters_of, same_answer, shows_steps

REFUSAL = re.compile(
    r"""^\W* (?:(?:unfortunately|but|regrettably|hello|oh|no) \W+)? (?:
    (?:(?:i['’]m|i[ ]am|we['’]re|we[ ]are)[ ] (?:\w+[ ]){0,2})? sorry\b (?![ ](?:to[ ]hear|for[ ]your|that[ ]you))
    | apologies\b | (?:i|we|my|please[ ]accept[ ]my)[ ] (?:\w+[ ])? apolog
    | as[ ]an?[ ] (?:[\w-]+[ ]){0,2} (?:ai|artificial[ ]intelligence|language[ ]model)\b
      (?=[ ]?[,(]|[ ](?:model|assistant)\b)
    | (?:i['’]m|i[ ]am)[ ] (?:(?:just[ ])?an[ ]ai | unable | not[ ]able | afraid)\b
    | (?:i|we)[ ] (?:won['’]t | will[ ]not | must[ ]decline | have[ ]to[ ]decline)\b
    | i[ ]do (?:n['’]t|[ ]not)[ ] have[ ]
      (?:access | the[ ](?:ability|capability) | (?:enough[ ]|any[ ])?information | personal | real-time)\b
    | (?:i|we)[ ]can (?:['’]|no|[ ]no) t[ ] (?:\w+ly[ ])?
      (?:help|assist|answer|provide|fulfil|comply|complete|do|generate|create|write|give|tell|offer|continue|engage
      |determine|access|see|perform|process|rewrite|discuss|recommend|verify|browse|respond|make)\b
    )""",
    re.I | re.X,
)
TALKS_ABOUT_TASK = re.compile(
    r"""\b(?:
    (?:the|given|provided)[ ]reference (?:[ ](?:says|states|gives|shows|is|answer|response|solution|text)\b|[.,:])
    | (?:reference|given|provided|original)[ ](?:answer|response)\b
    | (?:answer|response|solution)[ ](?:you[ ](?:gave|provided)|provided|given)\b
    | (?:rewritten|rephrased|paraphrased|revised)[ ](?:answer|response|version)\b
    | (?:your|my)[ ]own[ ]words\b
    ) | ^\W*(?:request|reference|rephrased|rewritten)\W*:""",
    re.I | re.X,
)
LOOP_COPIES = 3
LOOP_LETTERS = 60  # of all copies together
COPIED_WORDS = 6
COPIED_SHARE = 0.7  # of the letters
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
    if not letters_of(text):
        return "empty"
    if not finished:
        return "unfinished"
    if REFUSAL.search(text) and not REFUSAL.search(reference):
        return "refusal"
    if is_loop(text) and not is_loop(reference):
        return "repetition"
    if copies(text, prompt) and not copies(text, reference):
        return "copies the prompt"
    if TALKS_ABOUT_TASK.search(text) and not TALKS_ABOUT_TASK.search(f"{prompt}\n{reference}"):
        return "talks about the task"
    if len(words) < rule.min_length_ratio * len(reference_words):
        return "too short"
    if len(words) > rule.max_length_ratio * len(reference_words) + SLACK_WORDS:
        return "too long"
    if kind == "math":
        if not same_answer(text, reference, prompt):
            return "other final answer"
        if not shows_steps(text, reference, prompt):
            return "no steps"
        if has_false_equation(text) and not has_false_equation(reference):
            return "wrong arithmetic"  # the model is shown the final answer, and some steps only seem to lead there
    return None


def copies(text: str, other: str) -> bool:
    """True when one holds the other and little else, spaces, punctuation and case aside; a few words are no copy."""
    shorter, longer = sorted((letters_of(text), letters_of(other)), key=len)
    words = min(len(text.split()), len(other.split()))
    return words >= COPIED_WORDS and shorter in longer and len(shorter) >= COPIED_SHARE * len(longer)


def is_loop(text: str) -> bool:
    """True when one passage stands at least three times in a row, in at least 60 letters and digits.

    Spaces, punctuation and case do not count, so that a loop need not be one of words.
    """
    letters = np.array([ord(letter) for letter in letters_of(text)])
    for period in range(1, len(letters) // LOOP_COPIES + 1):
        changes = np.flatnonzero(letters[period:] != letters[:-period])
        ends = np.concatenate([[-1], changes, [len(letters) - period]])
        longest = int(np.diff(ends).max()) - 1 + period
        if longest >= max(LOOP_COPIES * period, LOOP_LETTERS):
            return True
    return False
