"""Which rewrites are kept: an example of every reason, and one that only just passes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.algorithms.rewrites import Rule, is_loop, rejection, same_answer, shows_steps

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


@pytest.mark.parametrize("rewrite", ["", " ", "\n\t \n"])
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
    ],
)
def test_refusal(rewrite: str) -> None:
    assert reason(rewrite) == "refusal"


@pytest.mark.parametrize(
    "rewrite",
    [
        'Say "I\'m sorry" to the sky if you called it green: the air scatters the blue light, so it is blue.',
        "A sorry, grey sky is the exception; on most days the air scatters blue light and the sky is blue.",
        "I can help you here: the air scatters the blue part of the sunlight most, so the sky looks blue.",
        "As an aid, think of the air as a filter that sends the blue part of sunlight in every direction.",
    ],
)
def test_words_of_regret_inside_an_answer_are_no_refusal(rewrite: str) -> None:
    assert reason(rewrite) is None


def test_repetition() -> None:
    four, five = ("; ".join(["the air scatters it"] * n) + " and so on and on" for n in (4, 5))
    long_reference = words(30)
    assert reason(five.replace(";", ""), reference=long_reference) == "repetition"
    assert reason(four.replace(";", ""), reference=long_reference) is None


@given(st.lists(st.sampled_from("abc"), max_size=40))
def test_is_loop_equals_counting_every_run(text: list[str]) -> None:
    runs = [text[i : i + 4] for i in range(len(text)) if i + 4 <= len(text)]
    assert is_loop(text) == any(runs.count(run) >= 5 for run in runs)


def test_copies_the_prompt() -> None:
    prompt = f"Is this right? {SOUND} Say yes or no."
    assert reason(SOUND, prompt=prompt) == "copies the prompt"
    assert reason(SOUND + " Yes.", prompt=prompt) is None
    assert reason(SOUND, prompt=prompt, reference=f"{SOUND} That is right.") is None, "the prompt holds the answer"


@pytest.mark.parametrize(
    "phrase",
    [
        "The reference says so.", "This agrees with a reference.", "The given answer is right.",
        "See the provided solution.",
        "That is the answer to your question.", "This is a response to this request.", "In my own words.",
        "Here it is in your own answer.", "The original question is odd.",
    ],
)  # fmt: skip
def test_talks_about_the_task(phrase: str) -> None:
    assert reason(f"{SOUND} {phrase}") == "talks about the task"
    assert reason(f"{SOUND} {phrase}", reference=f"{REFERENCE} {phrase}") is None, "the reference speaks so too"


@pytest.mark.parametrize(
    "phrase",
    ["A preference of the eye helps.", "The answer is simple.", "Physics answers it.", "Its own colour is blue."],
)
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


@pytest.mark.parametrize(
    ("text", "reference", "shown"),
    [
        ("12 then 20", "10 + 2 = 12, 12 + 8 = 20, 20 / 2 = 10\n#### 10", True),
        ("first 12", "10 + 2 = 12 and 12 + 8 = 20, so 20 + 20 = 40\n#### 40", True),  # one of two is half
        ("first 13", "10 + 2 = 12 and 12 + 8 = 20, so 20 + 20 = 40\n#### 40", False),
        ("first 12", "12, 20 and 30 make 62\n#### 62", False),  # one of three is less than half
        ("the answer", "It is 5\n#### 5", True),  # nothing but the final answer to show
        ("112 and 200", "12 and 20 make 32\n#### 32", False),  # whole numbers, not digits inside others
        ("1,200 left", "1,200 left and 3 make 9\n#### 9", True),
    ],
)
def test_shows_steps(text: str, reference: str, shown: bool) -> None:
    assert shows_steps(text, reference, "10 and 2 and 8") == shown


def test_numbers_of_the_prompt_are_no_steps() -> None:
    assert shows_steps("no numbers", "5 and 6 make 11\n#### 11", "I have 5 and 6")
    assert not shows_steps("no numbers", "5 and 6 make 11\n#### 11", "I have 5")


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("#### 1,200", "#### 1200"),
        ("The total is 1200.", "#### 1,200"),
        ("In all that makes 1,200,000.", "#### 1200000"),
        ("She pays $18 in total.", "#### 18"),
        ("It costs 3.50 dollars", "#### 3.5"),
        ("1/2", "0.5"),
        (r"$\frac{1}{2}$", "#### 0.5"),
        (r"so \boxed{\frac{3}{4}}", "3/4"),
        (r"so \boxed{12}", "#### 12"),
        (r"Therefore $\boxed{12}$.", "#### 12"),
        ("12 apples and 7 pears, so 19 in all", "#### 19"),
        ("It is -5.", "#### -5"),
        ("#### 7\nOr rather:\n#### 8", "#### 8"),
        ("**Answer: 42**", "#### 42"),
    ],
)
def test_one_answer_in_two_forms(text: str, reference: str) -> None:
    assert same_answer(text, reference)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("#### 1,201", "#### 1200"),
        ("#### 12", "#### 1200"),
        ("1/3", "0.5"),
        (r"so \boxed{13}", "#### 12"),
        ("It is 5.", "#### -5"),
        ("#### 8\n#### 7", "#### 8"),
        ("nobody knows", "#### 19"),
        ("", "#### 19"),
        ("#### 19", "nobody knows"),
        ("nobody", "nobody"),
        ("12 boxes, so 20 in all", "#### 12"),
    ],
)
def test_two_answers(text: str, reference: str) -> None:
    assert not same_answer(text, reference)
