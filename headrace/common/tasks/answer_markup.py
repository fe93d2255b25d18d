"""Removal of markup from an answer: LaTeX, Markdown, currency signs, and Unicode variants of ASCII signs.

No removal joins two numbers: `5$6`, `5\\ 6` and `2**3` stay two.
"""

import re

NARROW_SPACE = "\u202f"
"""In plain text it replaces every space that may group digits: no-break and narrow ones, and LaTeX's."""
FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5"}
SIGNS = {
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width ASCII
    **{chr(code): " " for code in range(0x2000, 0x200B)},
    **dict.fromkeys("\u2007\u2008\u2009\u200a\u00a0", NARROW_SPACE),
    **dict.fromkeys("\u3000\t", " "),
    **dict.fromkeys("\u200b\u2060\ufeff", ""),
    **dict.fromkeys("\u2212\ufe63", "-"),
    **dict.fromkeys("×⋅·∗", "*"),
    **dict.fromkeys("÷⁄", "/"),
    **{sign: f" {fraction}" for sign, fraction in FRACTIONS.items()},
    **dict.fromkeys("$€£¥₹", " "),
}
SIGN_TABLE = str.maketrans(SIGNS)

LATEX: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"\\([$€£¥₹%#&])"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\[,;:>]|\\ |~|\\q?quad(?![A-Za-z])"), NARROW_SPACE),
    (re.compile(r"\\(?:text(?:bf|it|rm)?|mbox|math(?:rm|bf|it)|operatorname)\s?\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\\[()\[\]]|\\(?:left|right|displaystyle)(?![A-Za-z])"), " "),
]
DASH = re.compile(r"(?<![\d)}])[\u2010\u2011\u2013](?=[\d.$€£¥₹\\])")
"""A dash directly before digits, and not directly after others, is a minus."""
BOLD = re.compile(r"(?<![\d)])\*\*|\*\*(?![\d(])")
TAG = re.compile(r"<[/|]?[A-Za-z_]+[/|]?>")
AROUND = " \t*_`\"'" + NARROW_SPACE


def strip_markup(text: str) -> str:
    if text.isascii() and text.strip().isdigit():
        return text.strip()
    if any(sign in text for sign in "\\{~"):
        for pattern, replacement in LATEX:
            text = pattern.sub(replacement, text)
    text = TAG.sub(" ", BOLD.sub("", DASH.sub("-", text))).translate(SIGN_TABLE)
    return text.strip(AROUND).lstrip(":" + AROUND).rstrip(".,;!" + AROUND)
