"""The final answer of a completion: the number in all the forms that models write, no other, and never slowly."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.common.tasks.answers import MAX_ANSWER_CHARS, MAX_MARKS, final_answer

ENOUGH_S = 3.0
"""Of processor time, for a text that takes a thirtieth."""


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("#### 1,000", "1000"),
        ("####1000", "1000"),
        ("####\n1000\n", "1000"),
        ("#### $5.00", "5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### 5 dollars", "5"),
        ("#### The answer is 5.", "5"),
        ("#### 50%", "50"),
        ("#### 72.", "72"),
        ("#### **72**", "72"),
        ("#### -3", "-3"),
        ("#### \N{MINUS SIGN}3", "-3"),
        ("#### 1/2", "0.5"),
        ("#### 1/2.", "0.5"),
        ("#### .5", "0.50"),
        ("#### 72\nThat took 3 steps.", "72"),
        ("#### 3 \\times 4", "12"),
        ("#### 1,000/2", "500"),
        ("#### 5 + 3 = 8", "8"),
        ("#### x = 8", "8"),
        ("#### 71\nNo:\n#### 72", "72"),
        ("#### \\boxed{72}", "72"),
        ("so \\boxed{72}, that is\n#### 73", "73"),
        ("#### 73, or rather \\boxed{72}.", "72"),
        ("\\boxed{71} and \\boxed{72} it is, after 9 steps", "72"),
        ("\\boxed{1{,}000}", "1000"),
        ("\\boxed{1\\,000}", "1000"),
        ("\\boxed{\\$5}", "5"),
        ("\\boxed{50\\%}", "50"),
        ("\\boxed{5\\text{ dollars}}", "5"),
        ("\\boxed{-\\frac{1}{2}}", "-0.5"),
        ("#### $\\frac{6}{4}$", "1.5"),
        ("#### \\(\\dfrac{6}{4}\\)", "1.5"),
        # the last mark that gives an answer
        ("#### 18 ####", "18"),
        ("#### 18\n####", "18"),
        ("####18####", "18"),
        ("#### Final Answer\n18", "18"),
        ("#### **Final Answer:**\n\n$18$", "18"),
        ("#### Answer: **18** apples", "18"),
        ("So it is \\boxed{18} … #### Explanation", "18"),
        ("\\boxed{18}\n#### 4. Check\n20 - 2 is 18", "18"),
        ("\\boxed{18}\n#### Step 3: check", "18"),
        ("#### 18\n#### **Step 5: Conclusion**\nDone.", "18"),
        ("#### 5\n#### none", "5"),
        ("\\boxed{\\boxed{18}}", "18"),
        # units
        ("#### 18 m^2", "18"),
        ("#### 18 m²", "18"),
        ("#### $120\\ \\text{ft}^{2}$", "120"),
        ("\\boxed{18\\,\\mathrm{m}^3}", "18"),
        ("\\boxed{18\\ \\frac{\\text{km}}{\\text{h}}}", "18"),
        ("#### 18 miles per hour (mph)", "18"),
        ("#### 5kg", "5"),
        ("#### 18^\\circ", "18"),
        ("#### 1/2 cup", "0.5"),
        ("#### 18 million", "18000000"),
        ("#### 18k", "18000"),
        # signs and spaces
        ("#### \N{EN DASH}18", "-18"),
        ("#### \N{EN DASH}$18", "-18"),
        ("#### -(18)", "-18"),
        ("#### (18)", "18"),
        ("\\boxed {18}", "18"),
        ("#### 1\N{NARROW NO-BREAK SPACE}000", "1000"),
        ("#### 1\N{NO-BREAK SPACE}000\N{NO-BREAK SPACE}km", "1000"),
        ("#### \N{NARROW NO-BREAK SPACE}18\N{NO-BREAK SPACE}km", "18"),
        ("#### \N{FULLWIDTH DIGIT ONE}\N{FULLWIDTH DIGIT EIGHT}", "18"),
        ("#### *18*", "18"),
        ("#### `18`", "18"),
        ("(#### 18)", "18"),
        ("#### 18</answer>", "18"),
        # values
        ("\\boxed{1.5 \\times 10^{6}}", "1500000"),
        ("\\boxed{1.5 \\cdot 10^{-1}}", "0.15"),
        ("\\boxed{3\\frac{1}{2}}", "3.5"),
        ("\\boxed{-3\\frac{1}{2}}", "-3.5"),
        ("#### 3 1/2 hours", "3.5"),
        ("#### 3½", "3.5"),
        ("#### 2 + 3 \\times 4 - 6 / 3", "12"),
        ("#### Total = 5 + 13 = 18", "18"),
        ("#### 5 dollars × 3 = 15 dollars", "15"),
    ],
)
def test_the_right_number_is_known_in_many_forms(completion: str, answer: str) -> None:
    assert final_answer(completion) == Fraction(answer)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("", "5"),
        ("The answer is 5", "5"),
        ("####", "5"),
        ("#### \n\n", "5"),
        ("\\boxed{5", "5"),
        ("\\boxed{}", "5"),
        ("#### 5 6 7", "5"),
        ("#### 5, 6", "6"),
        ("#### 5 or 6", "5"),
        ("#### 5 = 6", "5"),
        ("#### (2)(3)", "5"),
        ("#### 1,0000", "10000"),
        ("#### 5 dollars and 50 cents", "5"),
        ("#### 1/0", "5"),
        ("#### 5e0", "5"),
        ("#### \N{ARABIC-INDIC DIGIT FIVE}", "5"),
        ("#### " + "0" * 5000 + "5", "5"),
        ("#### 9^9^9^9^9", "5"),
        ("\\boxed{" + "(" * 40 + "5" + ")" * 40 + "+0}", "5"),
        ("\\boxed{" * 50_000, "5"),
        # the number leads
        ("#### Step 3: add them", "3"),
        ("#### 4. Check", "4"),
        ("#### 4) Check", "4"),
        ("#### 4: check", "4"),
        ("#### **Step 5: Conclusion**", "5"),
        ("#### Step 3: 5 + 13 = 18", "18"),
        ("#### there are 18", "18"),
        ("#### 17, not 20 - 2 = 18", "18"),
        ("#### x = 5 or x = 7", "7"),
        ("#### 18\n#### 5 or 6", "18"),
        # not that number
        ("#### \\sqrt{16}", "16"),
        ("#### 16x", "16"),
        ("#### 16 x^2", "16"),
        ("#### 18\\pi", "18"),
        ("#### 18π", "18"),
        ("#### 18 pi", "18"),
        ("#### 18 million", "18"),
        ("#### 18k", "18"),
        ("#### 18M", "18"),
        ("#### x \\neq 18", "18"),
        ("#### x ≠ 18", "18"),
        ("#### x != 18", "18"),
        ("#### x \\not= 18", "18"),
        ("#### x >= 18", "18"),
        ("#### -(18)", "18"),
        ("#### 18^2", "18"),
        ("#### 18²", "18"),
        ("#### 18 squared", "18"),
        ("#### 18th", "18"),
        ("#### 18 and a half", "18"),
        ("#### 3½", "3"),
        ("#### 10\N{EN DASH}18", "-8"),
        # two numbers stay two
        ("#### 2**3", "23"),
        ("#### 5$6", "56"),
        ("#### 5\\ 6", "56"),
        ("#### 5\N{NO-BREAK SPACE}6", "56"),
        # what would take long
        ("#### 10^999999999", "5"),
        ("#### 10^{99}^{99}", "5"),
    ],
)
def test_what_is_not_one_right_number_earns_nothing(completion: str, answer: str) -> None:
    assert final_answer(completion) != Fraction(answer)


PIECES = [
    *(
        "####",
        "\\boxed{",
        "\\boxed ",
        "{",
        "}",
        "(",
        ")",
        "[",
        "=",
        "1",
        "1,000",
        ".",
        "9" * 90,
        "\\frac{1}{2}",
        "\\frac{",
    ),
    *("10^{99}", "10^", "^", "-", "\N{EN DASH}", "+", "*", "**", "/", "\\times", " ", "\n", "\u202f", "\\ ", "~", "or"),
    *(
        "and",
        "x",
        "\\text{",
        "\\text{a}",
        "<a>",
        "<",
        "½",
        "m^2",
        "\\left",
        ", a",
        "k",
        "million",
        "answer",
        "Step 3: ",
    ),
]


def seconds_for(completion: str) -> float:
    started_s = time.process_time()
    final_answer(completion)
    return time.process_time() - started_s


@pytest.mark.parametrize("piece", PIECES)
def test_whatever_is_written_again_and_again_is_read_in_time(piece: str) -> None:
    texts = [piece * (MAX_ANSWER_CHARS * 2000 // len(piece))]
    for index, other in enumerate(PIECES):
        line = ((piece + other) * MAX_ANSWER_CHARS)[:MAX_ANSWER_CHARS]
        texts.append((f"#### {line}\n" if index % 2 else "\\boxed{" + line + "}") * MAX_MARKS)
    assert max(seconds_for(text) for text in texts) < ENOUGH_S


@given(st.lists(st.sampled_from(PIECES), max_size=400), st.integers(1, 50))
@settings(max_examples=100)
def test_any_text_is_read_in_time(pieces: list[str], times: int) -> None:
    assert seconds_for("".join(pieces) * times) < ENOUGH_S


def test_flat_arithmetic_is_exact_and_quick() -> None:
    """math-verify takes a time exponential in the number of divisions."""
    chain = "/".join(map(str, range(1, 25)))
    expected = Fraction(1)
    for divisor in range(2, 25):
        expected /= divisor
    assert final_answer(f"#### {chain}") == expected
    assert seconds_for(f"#### {chain}") < ENOUGH_S


@given(st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(-20, 20)), min_size=1, max_size=12))
@settings(max_examples=200)
def test_flat_arithmetic_is_pythons(terms: list[tuple[str, int]]) -> None:
    text = "7" + "".join(f" {operator} {number}" for operator, number in terms)
    try:
        expected = eval("Fraction(7)" + "".join(f" {operator} Fraction({number})" for operator, number in terms))
    except ZeroDivisionError:
        expected = None
    assert final_answer(f"#### {text}") == (expected if len(text) <= MAX_ANSWER_CHARS else None)
