"""Cells of a dataset as text: what is evidently text is rendered, anything else is refused by column and row."""

import ast
import datetime
import decimal
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from utils.script import UserError

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# what may stand beside `text` in an object without being text itself, as in the hub's {label, text}
BESIDE_TEXT = {"text", "label", "labels", "key", "id", "index", "answer_start"}
BYTES_LITERAL = re.compile(r"""b'.*'|b".*\"""", re.DOTALL)


class NoTextError(Exception):
    """The cell is no text; the message says what it is."""


def holds_text(values: Sequence[Any]) -> bool:
    """Whether any value is a string that is not just a number."""
    return any(isinstance(value, str) and value.strip() and not NUMBER.fullmatch(value) for value in values)


def _scalar(value: Any) -> str:
    """A string, bytes of UTF-8, a number or a date as text; a missing value (None, NaN) is empty.

    Raises:
        NoTextError: it is none of these.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, decimal.Decimal):
        return "" if value.is_nan() else f"{value:f}"
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise NoTextError("bytes that are not UTF-8") from None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bool):
        raise NoTextError(f"{str(value).lower()}, which is no text")
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, dict):
        raise NoTextError(f"an object with the keys {', '.join(map(repr, list(value)[:5])) or 'none'}")
    raise NoTextError(f"{'a list' if isinstance(value, list) else type(value).__name__}: {str(value)[:40]}")


def _choice(value: Any) -> str:
    """One of several choices: a scalar, or the text of an object like {"label": "A", "text": "first"}."""
    if isinstance(value, dict) and "text" in value and set(value) <= BESIDE_TEXT:
        value = value["text"]
    return _scalar(value)


def render(value: Any) -> str:
    """A cell as text: choices become "(0) first (1) second", as in the paper.

    Choices are a list, of strings or of objects with a `text`, or the hub's {label: [...], text: [...]}.

    Raises:
        NoTextError: what the cell holds is not evidently text.
    """
    if isinstance(value, dict) and "text" in value and set(value) <= BESIDE_TEXT:
        value = value["text"]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        try:
            return " ".join(f"({number}) {_choice(choice)}" for number, choice in enumerate(value))
        except NoTextError as error:
            raise NoTextError(f"a list with {error}") from None
    return _scalar(value)


def render_column(source: str, part: str, name: str, cells: Iterable[Any]) -> list[str]:
    """The cells of one column as texts.

    Args:
        source: name of the dataset, for the message.
        part: the split.
        name: the column.
        cells: n cells.

    Raises:
        UserError: a cell is not evidently text; column, row and what was found are named.
    """
    texts = []
    for row, cell in enumerate(cells, 1):
        try:
            texts.append(render(cell))
        except NoTextError as error:
            raise UserError(
                f"Column {name!r} of {source}, {part} row {row}, holds {error}. Write it as a string, or as a list of "
                'strings or of {"text": ...} objects for choices, or name other columns (--text_template).'
            ) from None
    return without_line_end(source, part, name, unwrapped(source, part, name, texts))


def unwrapped(source: str, part: str, name: str, texts: list[str]) -> list[str]:
    """The texts without b'...' around them where every one of a column is written as a Python bytes literal.

    That is how Python prints bytes, and how toxigen's annotated file holds its texts.
    """
    full = [text for text in texts if text.strip()]
    if not full or not all(BYTES_LITERAL.fullmatch(text) for text in full):
        return texts
    try:
        found = [ast.literal_eval(text).decode() if text.strip() else text for text in texts]
    except (ValueError, SyntaxError, AttributeError):  # not UTF-8, not ASCII, b'a' + b'b'
        return texts
    print(f"{source}: the {part} texts of {name!r} are written as Python bytes; b'...' is taken off")
    return found


def without_line_end(source: str, part: str, name: str, texts: list[str]) -> list[str]:
    """The texts without the line break at their end where every one of a column has one, as in sms_spam.

    Differs from the paper: it is the end of a file's line, and as the last token of every text all that
    `--pooling last` would see.
    """
    if len(texts) < 2 or not all(text.endswith("\n") for text in texts):
        return texts
    print(f"{source}: every {part} text of {name!r} ends with a line break, which is taken off")
    return [text.removesuffix("\n").removesuffix("\r") for text in texts]
