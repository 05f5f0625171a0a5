"""Worked answers: the same result in many forms, other results that look alike, and steps that are shown or not."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.algorithms.math_answers import has_false_equation, same_answer, shows_steps

PROMPT = "Of 4 boys and 9 girls each has 12 apples and 7 pears."


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
        ("1200 left", "1,200 left and 3 make 9\n#### 9", True),
        ("$1{,}200$ left", "1200 left and 3 make 9\n#### 9", True),
        ("$1,200.00 left", "1200 left and 3 make 9\n#### 9", True),
        ("0.5 of it", "3*.5 = .5\n#### 9", True),
        ("the answer", "10 - 1.5 = <<10-1.5=8.5>>8.5\n#### 8.5", False),
        ("the answer", "10 - 2 = <<10-2=8.5>>8.5\n#### 8.5", True),  # the mark is no number that is to be shown
    ],
)
def test_shows_steps(text: str, reference: str, shown: bool) -> None:
    assert shows_steps(text, reference, "10 and 2 and 8") == shown


@pytest.mark.parametrize(
    "text",
    [
        "3 + 4 = 8",
        "So 3 + 4 = 8, and it is 8.",
        "That is 2 * (3 + 4) = 13 dollars.",
        "(3 + 4 = 8)",
        "12 slices per pizza * 2 pizzas - 4 slices = 21 slices",
        "$1,200 - $200 = $900",
        "7 hours x $5/hour = $30",
        "12 Apples + 4 apples = 17 apples",
        "20 boxes * 20 pears = 300 pears",
        "6\u00d77=41 and 41 \u00f7 41 = 1",
        r"\(6 \times 7 = 41\)",
        r"\[ \frac{450}{45} = 11 \]",
        r"$64 \text{ apples} + 4 \text{ apples} = 86$",
        r"\[ \frac{450 \text{ kg}}{45} = 11 \]",
        "10 \u2212 3 = 6",
        "5*4=<<5*4=20>>21",
        "x = 2 + 3 = 6",
        "2 * 3 = 6 and 6 - 7 = 1",
        "10 / 3 = 3.2",
        "80% - 30% = 40%",
        "50 * 20% = 11",
        "**Total**: 3 + 4 = 8",
    ],
)
def test_false_equations(text: str) -> None:
    assert has_false_equation(text)


@pytest.mark.parametrize(
    "text",
    [
        "3 + 4 = 7",
        "2 * (3 + 4) = 14",
        "12 slices per pizza * 2 pizzas - 4 slices = 20 slices",
        "$1,200 - $200 = $1,000.00",
        "10 / 3 = 3.33 and 10 / 3 = 3.3 and 10 / 3 = 3",
        "200000 / 3 = 66,667",
        "80% - 30% = 50%, 50 * 20% = 10, 120 * (1 - 20%) = 96, 3 / 4 * 100 = 75%, 1 / 4 = 25%, 75% * 80% = 60%",
        "2 * 3 + 1 = 6 + 1 = 7",  # the first "=" does not end the sum
        "12 slices - 3 slices = 10 slices - 1 slice",
        "2x + 3 = 11",
        "3 + x = 5",
        "2 * pi * 3 = 18.84",
        "3 + 5\u00b2 = 28 and 3 + 5^2 = 28 and 3 + 5**2 = 28 and 5 ** 2 = 25",
        "60 / 2 / 3 = 90",  # 60 / (2 / 3)
        "1/2 hour = 30 minutes",
        "2 1/2 + 1 = 3 1/2",
        "half of 3 + 5 = 4 * 1",
        "20% of 50 + 5 = 15",
        "2000 * 1000 = 2 million",
        "3 dozen + 4 = 40",
        "2 hours + 30 minutes = 150 minutes, 30 min * 2 = 1 hour, 16 oz + 16 oz = 2 pounds",
        "$80 - 25% = $60",
        "\u221a9 + 1 = 4",
        "5 quarters * 25 = 125 cents",
        "3 / 0 = 0",
        "3 + 4 equals 8",
        "3:4 + 1 = 9",
        "(((" * 200 + "3 + 4",
        "1 + " * 500 + "1 = 3",
        "",
    ],
)
def test_equations_that_hold_or_are_not_understood(text: str) -> None:
    assert not has_false_equation(text)


@given(data=st.data())
def test_sums_against_python(data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(1, 999), min_size=2, max_size=5))
    signs = data.draw(st.lists(st.sampled_from("+-*/"), min_size=len(numbers) - 1, max_size=len(numbers) - 1))
    left, exact = str(numbers[0]), f"Fraction({numbers[0]})"
    for sign, number in zip(signs, numbers[1:], strict=True):
        left += f" {sign} {number}"
        exact += f" {sign} Fraction({number})"
    value = eval(exact, {"Fraction": Fraction})  # digits and signs, as drawn above
    off = data.draw(st.sampled_from([2, -2]))
    one_reading = signs.count("/") <= 1 and not (signs == ["/"] and value < 1)
    assert not has_false_equation(f"so {left} = {float(value):.3f} apples")
    wrong = value + off + off * abs(value) / 10
    assert has_false_equation(f"so {left} = {float(wrong):.3f} apples") == one_reading


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
        ("Follow these steps: 1. Add 3 and 4. 2. Multiply by 5, which makes 35.", "#### 35"),
        ("We follow two steps:\n1. 3 + 4 = 7\n2. 7 * 5 = 35", "#### 35"),
        ("It is not 30 but 29.", "#### 29"),
        ("She has 29 eggs, rather than 30.", "#### 29"),
        ("Janet makes $18 every day from 9 eggs.", "#### 18"),
        ("That leaves 5 + 3 = 8 apples for the 2 boys.", "#### 8"),
        ("As 5 + 3 = 8, each of the 4 boys gets 2.", "#### 2"),
        ("There are 20 (5 * 4) apples.", "#### 20"),
        ("The answer is 29. It takes 3 minutes to check that.", "#### 29"),
        ("The answer is:\n\n**29**", "#### 29"),
        ("#### Total\nThe total is 30.", "#### 30"),
        ("#### Step 2: add\nThis makes 30 eggs.", "#### 30"),
        ("#### 8\nI hope this helps.", "#### 8"),
        ("It is \u22125.", "#### -5"),
        ("It is negative 5.", "#### -5"),
        ("She walks 2 1/2 miles.", "#### 2.5"),
        (r"so $2\frac{1}{2}$", "#### 2.5"),
        ("They sold 1.5 million of them.", "#### 1500000"),
        ("They sold 1.5 million of them.", "#### 1.5"),
        ("That is 25% of it.", "#### 25"),
        ("#### B", "#### B"),
        ("The answer is B.", r"\boxed{B}"),
        (r"\boxed{\text{even}}", "The answer is even."),
        (r"so \boxed{x^2+1} for 3 of them", r"\boxed{1+x^2}"),
        (r"\boxed{\pi}", r"\boxed{\pi}"),
        (r"\boxed{b+a}", r"\boxed{a+b}"),
        (r"The answer is 2\sqrt{3}.", r"\boxed{2\sqrt{3}}"),
        ("The answer is (2, 3).", r"\boxed{(2,3)}"),
        (r"\fbox{12}", "#### 12"),
        ("It is $.50 a piece.", "#### 0.5"),
        (r"So she makes \$18 every day.", "#### 18"),
        (r"So she makes **\$18**.", "#### 18"),
        (r"\(18\) eggs are left.", "#### 18"),
        ("That is -$12.", "#### -12"),
        ("That is \u201312.", "#### -12"),
        ("Each correct answer is worth 5 points. He scored 3 * 5 = 15 points.", "#### 15"),
        ("The answer is 12.\n\nTo check the answer: 12 + 8 = 20.", "#### 12"),
        ("There are 12 apples. We can verify this: 12 + 8 = 20.", "#### 12"),
        ("It takes 15 days to do so for 9 girls.", "#### 15"),
        ("There are 12 left (= 20 - 8).", "#### 12"),
        ("Each of the 4 boys gets 3 apples.", "#### 3"),
        ("Each of the 9 girls gets 4 apples.", "#### 4"),
    ],
)
def test_one_answer_in_two_forms(text: str, reference: str) -> None:
    assert same_answer(text, reference, PROMPT)


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
        ("Follow these steps: 1. Add 3 and 4. 2. Multiply by 5, which makes 35.", "#### 1"),
        ("The answer is not 29.", "#### 29"),
        ("It isn't equal to 29.", "#### 29"),
        ("It is not 29 but 30.", "#### 29"),
        ("She has 30 eggs, instead of 29.", "#### 29"),
        ("29 boxes. The answer is 30. It is sure.", "#### 29"),
        ("5 + 3 = 8", "#### 5"),
        (r"\boxed{12} eggs in 3 boxes", "#### 3"),
        (r"\boxed{\frac{1}{2}}", "#### 2"),
        ("10 minus 5 makes 5", "#### -5"),
        ("She walks 2 1/2 miles.", "#### 2"),
        ("They sold 1.5 million of them.", "#### 15000"),
        ("0.25 of it", "#### 25"),
        ("#### C", "#### B"),
        ("The answer is C.", r"\boxed{B}"),
        (r"\boxed{x^2}", r"\boxed{1+x^2}"),
        (r"\boxed{a-b}", r"\boxed{a+b}"),
        (r"\boxed{-x}", r"\boxed{x}"),
        (r"\boxed{\frac{x}{y}}", r"\boxed{xy}"),
        (r"\boxed{\text{odd}}", r"\boxed{\text{even}}"),
        ("So each of the 4 boys gets 3 apples.", "#### 4"),
        ("The answer is 18 eggs for 20 dollars.", "#### 20"),
        ("The answer is 5:30.", "#### 5"),
        ("The answer is 1 / 2.", "#### 2"),
        ("The answer is 20 - 8.", "#### 8"),
        ("The answer is 3x.", "#### 3"),
    ],
)
def test_two_answers(text: str, reference: str) -> None:
    assert not same_answer(text, reference, PROMPT)
