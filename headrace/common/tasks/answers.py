"""The number that a completion gives as its final answer: exact, pure, and in bounded time for any text.

An answer is the text after `####` or in `\\boxed{}`. `final_answer` searches from the last such mark backwards for the
first one that gives an answer. It reads at most `MAX_ANSWER_CHARS` of each, from left to right, once. It understands
numbers, mixed numbers, fractions, powers of ten, and flat arithmetic of them, with a unit after it.
"""

import re
from collections import deque
from collections.abc import Iterator
from fractions import Fraction

from headrace.common.tasks.answer_markup import strip_markup

MAX_ANSWER_CHARS = 100
MAX_MARKS = 64
"""Number of marks, from the last backwards, that are examined."""
WINDOW_CHARS = 4 * MAX_ANSWER_CHARS
"""Length of the text after `####` in which its line is searched."""
MARK = re.compile(r"(#{4,})|\\(?:boxed|fbox)\s*\{")
LEAD_IN = re.compile(r"(?:(?:so|thus|therefore|hence),? )?(?:the |my )?(?:final |correct )?(?:answer|result)\b", re.I)
BEFORE_NUMBER = re.compile(r"(?: is\b)?[\s:*_=]*", re.I)
INEQUALITY = re.compile(r"(?:[!<>~≠]|\\not)\s?=")
AMONG_WORDS = re.compile(r"\d[^=]*(?:[,;(]\s?[^\W\d]|\b(?:or|and|not|but)\b)", re.I)

DIGITS = r"(?:(?:\d{1,3}(?:[,\u202f]\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
POWER = re.compile(r"10\s?\^(?:\{\s?(-?\d{1,2})\s?\}|(-?\d{1,2}))(?!\d)", re.ASCII)
MIXED = re.compile(r"(\d+)\s?(?:\\[dt]?frac\s?\{(\d+)\}\s?\{(\d+)\}|(?<=\s)(\d+)/(\d+))", re.ASCII)
FRACTION = re.compile(rf"\\[dt]?frac\s?\{{\s?(-?{DIGITS})\s?\}}\s?\{{\s?(-?{DIGITS})\s?\}}", re.ASCII)
BRACKETED = re.compile(rf"\(\s*(-?\s?{DIGITS})\s*\)", re.ASCII)
NUMBER = re.compile(rf"({DIGITS})", re.ASCII)
SIGN = re.compile(r"\s*([-+]?)\s*")
OPERATOR = re.compile(r"\s*([-+*/]|\\times|\\cdot|\\div)(?=\s*[-+(.\d\\])")

UNIT_EXPONENT = re.compile(r"(?<=[A-Za-z])(?:\s?\^\s?(?:\{\s?-?\d\s?\}|-?\d)|[²³])")
UNIT_FRACTION = re.compile(r"\\[dt]?frac\s?\{\s*([A-Za-z]{2,})\s*\}\s?\{\s*([A-Za-z]+)\s*\}")
NO_UNIT = re.compile(r"\s*(?:%|°|\^\s?\{?\s?\\circ\s?\}?)")
SCALES = {"k": 3, "thousand": 3, "mn": 6, "mil": 6, "million": 6, "bn": 9, "billion": 9, "trillion": 12, "hundred": 2}
SCALE = re.compile(rf"\s*({'|'.join(SCALES)})s?(?![A-Za-z])", re.I)
GLUED = re.compile(r"(?:[mk]?g|[kcm]m|ml|ft|in|yd|mi|lbs?|oz|[mk]ph|hrs?|h|mins?|s|secs?|[ap]m|usd)(?![A-Za-z])", re.I)
"""Units that are written without a space; any other letter directly after a number is a factor, or unknown."""
FACTOR = re.compile(r"\s*(?:[xyznie]|pi|squared|cubed|factorial)(?![A-Za-z])", re.I)
UNIT = re.compile(r"(?:[\s(/]|[,;!]\s)[^\\^*=<>+{}|≠≈π∞√_]*")
AND_MORE = re.compile(r"\b(?:and|or) (?:an?|one|two|three|half)\b", re.I)


def final_answer(completion: str) -> Fraction | None:
    """The number after the last mark that gives an answer; `None` if none does, or that answer is not one number.

    A mark gives no answer if nothing but words or a heading follows it: `#### Explanation`, `#### Step 3: ...`,
    `#### 4. Check`.
    """
    for answer in marked_answers(completion):
        text = _right_hand_side(answer)
        if re.match(r"[-+.(\\\d]", text, re.ASCII) and not re.match(r"\d+[.):]\s*[^\W\d]", text):
            return value_of(text)
    return None


def marked_answers(completion: str) -> Iterator[str]:
    """The marked answers as plain text, the last first."""
    end = len(completion)
    for mark in reversed(deque(MARK.finditer(completion), MAX_MARKS)):
        if mark[1]:
            yield _answer_line(completion[mark.end() : min(end, mark.end() + WINDOW_CHARS)])
        else:
            yield strip_markup(_until_closing_brace(completion[mark.end() : mark.end() + MAX_ANSWER_CHARS + 1]))
        end = mark.start()


def _answer_line(text: str) -> str:
    """The first line that has more than a lead-in such as "the answer is"."""
    for line in text.lstrip().splitlines():
        if len(line) > MAX_ANSWER_CHARS:
            return ""
        answer = strip_markup(line)
        if lead_in := LEAD_IN.match(answer):
            answer = answer[lead_in.end() :]
            answer = answer[BEFORE_NUMBER.match(answer).end() :]  # type: ignore[union-attr]  # it matches anything
        if answer:
            return answer
    return ""


def _until_closing_brace(text: str) -> str:
    depth = 1
    for index, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[:index]
    return ""


def _right_hand_side(text: str) -> str:
    """The right-hand side of an equation; other text is unchanged.

    Not equations are `Step 3: total = 5`, `x = 5 or x = 7` and `17, not 20 - 2 = 18`.
    """
    left, equals, right = text.rpartition("=")
    first = left.partition("=")[0]
    is_heading = ":" in first or (first[:1].isalpha() and re.search(r"\d", first))
    if not equals or is_heading or INEQUALITY.search(text) or AMONG_WORDS.search(left):
        return text
    return right.strip()


def value_of(text: str) -> Fraction | None:
    """The value of flat arithmetic, optionally with a unit after it; `None` for any other text."""
    if text.isascii() and text.isdigit():
        return Fraction(int(text))
    total, product, operator, at = Fraction(0), Fraction(1), "*", 0
    while True:
        term, at = _term(text, at)
        if term is None or (term == 0 and operator in ("/", "\\div")):
            return None
        if operator in ("+", "-"):
            total, product = total + product, term if operator == "+" else -term
        else:
            product = product / term if operator in ("/", "\\div") else product * term
        if not (found := OPERATOR.match(text, at)):
            break
        operator, at = found[1], found.end()
    scale = _scale_of_unit(text[at:])
    return None if scale is None else (total + product) * scale


def _term(text: str, at: int) -> tuple[Fraction | None, int]:
    """The signed number at an index, and the index of its end."""
    sign = SIGN.match(text, at)
    assert sign is not None, "it matches anything"
    for form in (POWER, MIXED, FRACTION, BRACKETED, NUMBER):
        if found := form.match(text, sign.end()):
            value = _value(form, [part for part in found.groups() if part is not None])
            return (value if value is None or sign[1] != "-" else -value), found.end()
    return None, at


def _value(form: re.Pattern[str], parts: list[str]) -> Fraction | None:
    numbers = [Fraction(re.sub(r"[,\s]", "", part)) for part in parts]
    if form is POWER:
        return Fraction(10) ** int(numbers[0])
    if form is MIXED:
        whole, above, below = numbers
        return whole + above / below if above < below else None
    if form is FRACTION:
        return numbers[0] / numbers[1] if numbers[1] else None
    return numbers[0]


def _scale_of_unit(text: str) -> Fraction | None:
    """The factor that a unit stands for, nearly always 1; `None` if the text is not a unit."""
    text = UNIT_FRACTION.sub(r" \1/\2", UNIT_EXPONENT.sub("", text))
    scale = Fraction(1)
    if no_unit := NO_UNIT.match(text):
        text = text[no_unit.end() :]
    elif found := SCALE.match(text):
        scale, text = Fraction(10) ** SCALES[found[1].lower()], text[found.end() :]
    elif glued := GLUED.match(text):
        text = text[glued.end() :]
    if not text.strip(" )]}"):
        return scale
    if FACTOR.match(text) or AND_MORE.search(text) or any(char.isnumeric() for char in text):
        return None
    return scale if UNIT.fullmatch(text) else None
