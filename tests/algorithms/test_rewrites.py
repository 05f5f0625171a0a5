"""Which rewrites are kept: an example of every reason, and one that only just passes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.algorithms.rewrites import Rule, is_loop, rejection

RULE = Rule(min_length_ratio=0.5, max_length_ratio=2.0)
PROMPT = "Why is the sky blue?"
REFERENCE = "Air scatters short waves of sunlight more than long ones, so blue light reaches us from everywhere."
SOUND = "Sunlight is scattered by the air, and its blue part most of all, so that the whole sky looks blue."

MATH_PROMPT = "A box holds 12 eggs. How many eggs are in 3 boxes after 7 eggs broke?"
MATH_REFERENCE = "There are 3 * 12 = 36 eggs. After 7 broke, 36 - 7 = 29 are left.\n#### 29"
MATH_SOUND = "Three boxes of 12 make 36 eggs, and without the 7 broken ones there are 29 left. The answer is 29."


def words(count: int) -> str:
    return " ".join(f"word{i}" for i in range(count))


def reason(rewrite: str, **changes: Any) -> str | None:
    settings: dict[str, Any] = {
        "reference": REFERENCE, "prompt": PROMPT, "kind": "instruction", "finished": True, "rule": RULE
    }  # fmt: skip
    return rejection(rewrite, **(settings | changes))


def math_reason(rewrite: str) -> str | None:
    return reason(rewrite, reference=MATH_REFERENCE, prompt=MATH_PROMPT, kind="math")


def test_sound_rewrites_are_kept() -> None:
    assert reason(SOUND) is None
    assert math_reason(MATH_SOUND) is None
    assert reason(REFERENCE) is None, "the reference itself is sound"
    assert math_reason(MATH_REFERENCE) is None


@pytest.mark.parametrize("rewrite", ["", " ", "\n\t \n", "...", "\U0001f600" * 50])
def test_empty(rewrite: str) -> None:
    assert reason(rewrite) == "empty"
    assert reason(rewrite, finished=False) == "empty"


def test_unfinished() -> None:
    assert reason(SOUND, finished=False) == "unfinished"
    assert reason(SOUND, finished=True) is None


@pytest.mark.parametrize(
    "rewrite",
    [
        "I'm sorry, but I do not know why the sky has the colour that it has on most of the days.",
        "I\u2019m sorry, but I do not know why the sky has the colour that it has on most of the days.",
        "I am sorry that I do not know why the sky has the colour that it has on most of the days.",
        "Sorry, I do not know why the sky has the colour that it has on most of all the days of a year.",
        "  I cannot help with the colour of the sky, which is something that I know nothing at all about.",
        "I can't answer why the sky has the colour that it has on most of all the days of the whole year.",
        "I can\u2019t answer why the sky has the colour that it has on most of all the days of the whole year.",
        "I am unable to say why the sky has the colour that it has on most of all the days of the year.",
        "As an AI model, I do not see why the sky has the colour that it has on most of the days of a year.",
        "As a language model, I do not see why the sky has the colour that it has on most of the days at all.",
        "I apologize, but the sky has the colour that it has on most of the days, and I do not know why so.",
        "I sincerely apologise, but I do not know why the sky has the colour that it has on most of the days.",
        "Apologies, but I do not know why the sky has the colour that it has on most of all days of a year.",
        "I'm very sorry, but I do not know why the sky has the colour that it has on most of all the days.",
        "Unfortunately, I cannot see why the sky has the colour that it has on most of all days of the year.",
        "I'm not able to see why the sky has the colour that it has on most of all of the days of the year.",
        "I don't have access to the sky and the colour that it has on most of all of the days of the year.",
        "I do not have enough information on the sky and the colour that it has on most of all of the days.",
        "I won't say why the sky has the colour that it has on most of all of the days of the whole long year.",
        "I'm afraid I do not know why the sky has the colour that it has on most of all of the days of a year.",
        "Sorry but I do not know why the sky has the colour that it has on most of all of the days of a year.",
        "As a text-based AI, I cannot look at the sky and the colour that it has on most of the days of a year.",
        "I cannot directly discuss why the sky has the colour that it has on most of all of the days of a year.",
        "I don't have personal views on why the sky has the colour that it has on most of the days of a year.",
        "I can not provide the reason why the sky has the colour that it has on most of the days of a year.",
    ],
)
def test_refusal(rewrite: str) -> None:
    assert reason(rewrite) == "refusal"
    assert reason(rewrite, reference=rewrite) is None, "the reference refuses too"


@pytest.mark.parametrize(
    "rewrite",
    [
        'Say "I\'m sorry" to the sky if you called it green: the air scatters the blue light, so it is blue.',
        "A sorry, grey sky is the exception; on most days the air scatters blue light and the sky is blue.",
        "I can help you here: the air scatters the blue part of the sunlight most, so the sky looks blue.",
        "Unfortunately, the air is no black box: it scatters the blue light most of all, so the sky is blue.",
        "I'm sorry to hear that it is grey; on other days the air scatters the blue light, so the sky is blue.",
        "As an AI engineer would say, the air is a filter that sends the blue part of sunlight everywhere.",
        "I can't wait to tell you: the air scatters the blue light most of all, and so the whole sky is blue.",
        "As an aid, think of the air as a filter that sends the blue part of sunlight in every direction.",
    ],
)
def test_words_of_regret_inside_an_answer_are_no_refusal(rewrite: str) -> None:
    assert reason(rewrite) is None


LONG = "Sunlight is scattered by the air in all directions, and blue light most of all. "


@pytest.mark.parametrize(
    "loop",
    [
        LONG * 3,
        LONG + "The sky is blue because of that, as I said. " * 4,
        LONG + "the air scatters it " * 4,
        LONG + "ha" * 40,
        LONG + "First: add. Then, halve it!\n- first, ADD; then halve it\n" * 2,  # the same letters four times
        LONG + "The air does it. Light is blue. " * 3,  # two sentences in turn
        LONG + "青い空は光の散乱で青い" * 6,
    ],
)
def test_repetition(loop: str) -> None:
    reference = words(40)
    assert reason(loop, reference=reference) == "repetition"
    assert reason(loop, reference=loop) is None, "the reference repeats itself too"


@pytest.mark.parametrize(
    "text",
    [
        LONG * 2 + "That is why.",
        LONG + "the air scatters it " * 3 + "and so on",  # 48 letters
        LONG + "Very, very, very, very blue.",
        "".join(f"In the United States of America, state {i} has {i * i} towns and {i * 7} lakes. " for i in range(12)),
        LONG + "-" * 80 + "\n" + "| --- " * 20 + "\n" + LONG,
    ],
)
def test_what_is_said_again_elsewhere_is_no_repetition(text: str) -> None:
    assert reason(text, reference=words(100), rule=Rule(0.0, 9.0)) is None


@given(st.text("abC .", max_size=24), st.integers(0, 3), st.integers(0, 9))
def test_is_loop_equals_looking_at_every_passage(text: str, copies: int, start: int) -> None:
    text = text[:start] + text * copies * 5
    letters = [letter for letter in text.casefold() if letter.isalnum()]
    assert is_loop(text) == any(
        letters[first : first + period * count] == letters[first : first + period] * count
        for period in range(1, len(letters) // 3 + 1)
        for count in {max(3, -(-60 // period))}
        for first in range(len(letters) - period * count + 1)
    )


def test_copies_the_prompt() -> None:
    prompt = f"Is this right? {SOUND} Say yes or no."
    assert reason(SOUND, prompt=prompt) == "copies the prompt"
    assert reason(SOUND.upper().replace(",", "  ") + "!", prompt=prompt) == "copies the prompt"
    assert reason(f"Sure! {prompt}", prompt=prompt) == "copies the prompt"
    assert reason(f"{prompt} {REFERENCE}", prompt=prompt) is None, "the question, and then an answer"
    assert reason(SOUND, prompt=f"What does this say of the sky? {SOUND} {REFERENCE}") is None, "a part is an answer"
    assert reason("No.", prompt="Do you know it?", reference="False.") is None, "not the letters of a word"
    assert reason(SOUND + " Yes.", prompt=prompt) is None
    assert reason(SOUND, prompt=prompt, reference=f"{SOUND} That is right.") is None, "the prompt holds the answer"


@pytest.mark.parametrize(
    "phrase",
    [
        "The reference says so.", "This agrees with the reference.", "The given answer is right.",
        "See the reference answer.", "The answer you gave is right.", "The answer provided is right.",
        "Here is the rewritten version.", "In my own words.", "The given reference says so.",
    ],
)  # fmt: skip
def test_talks_about_the_task(phrase: str) -> None:
    assert reason(f"{SOUND} {phrase}") == "talks about the task"
    assert reason(f"{SOUND} {phrase}", reference=f"{REFERENCE} {phrase}") is None, "the reference speaks so too"
    assert reason(f"{SOUND} {phrase}", prompt=f"{PROMPT} {phrase}") is None, "it was asked so"


@pytest.mark.parametrize("heading", ["Reference:", "**Rephrased:**", "Request:\n"])
def test_headings_of_the_task(heading: str) -> None:
    assert reason(f"{heading} {SOUND}") == "talks about the task"


@pytest.mark.parametrize(
    "phrase",
    [
        "A preference of the eye helps.", "The answer is simple.", "Physics answers it.", "Its own colour is blue.",
        "Take the horizon as the reference point.", "It holds a reference to the sky.", "The original question is odd.",
        "That solves the given problem.", "There is no answer to your question.", "A reference variable holds it.",
        "Attach it for your reference.", "The original solution was mixed with water.", "The reference list is last.",
    ],
)  # fmt: skip
def test_talk_that_is_not_about_the_task(phrase: str) -> None:
    assert reason(f"{SOUND} {phrase}") is None


def test_too_short_and_too_long_by_one_word() -> None:
    reference = words(20)
    assert reason(words(9), reference=reference, prompt="") == "too short"
    assert reason(words(10), reference=reference, prompt="") is None
    assert reason(words(100), reference=reference, prompt="") is None
    assert reason(words(101), reference=reference, prompt="") == "too long"


def test_other_final_answer() -> None:
    assert math_reason(MATH_SOUND.replace("29", "28")) == "other final answer"
    assert math_reason("Three boxes of 12 make 36 eggs, and without the 7 broken ones some are left.") is not None
    assert reason(MATH_SOUND.replace("29", "28"), reference=MATH_REFERENCE, prompt=MATH_PROMPT) is None, (
        "answers of open requests are not compared"
    )


def test_no_steps() -> None:
    assert math_reason("After thinking about it for a long while one sees that the answer is 29.") == "no steps"
    assert math_reason("After thinking about 36 of them for a long while the answer is 29.") is None


def test_wrong_arithmetic() -> None:
    wrong = f"As 3 * 12 = 35, so to say 36. {MATH_SOUND}"
    assert math_reason(f"{MATH_SOUND} Indeed 36 - 7 = 29.") is None
    assert math_reason(wrong) == "wrong arithmetic"
    slip = f"3 * 12 = 35\n{MATH_REFERENCE}"  # is not held against its rewrite
    assert reason(wrong, reference=slip, prompt=MATH_PROMPT, kind="math") is None
