"""utils/data/docstrings.py: the parser, the split that keeps test texts apart, and determinism."""

import itertools
import sys
from unittest.mock import Mock

import pytest

from tests.data.inputs import load, write
from utils.data import docstrings
from utils.data.docstrings import TASKS, Row, is_test_side, load_rows, pretraining_corpus
from utils.script import UserError

pytestmark = pytest.mark.slow

FAKE_MODULE = '''"""What the module is for.

Second paragraph.
"""
raise RuntimeError("this module was imported")


def plain(first, /, second, *rest, third=None, **others):
    """Adds up
    two things.

    >>> plain(1, 2)
    """
    # a comment is no code

    def nested():
        """A function inside a function."""
        raise ValueError

    return first + second


class Thing:
    """A thing that has parts."""

    @property
    def size(self):
        """The number of parts."""
        if self is None:
            raise ValueError
        return 3

    def _grow(self, amount):
        """Makes the thing larger."""
        self.amount = amount
        return None

    @staticmethod
    def make(amount):
        """Makes a thing from nothing."""
        yield amount
'''


def test_rows_hold_the_facts_of_the_code(tmp_path, monkeypatch):
    """Reads a package that can be parsed but not imported, with a test folder and a file that is not Python."""
    for name, content in {
        "__init__.py": FAKE_MODULE,
        "part/inner.py": '"""Some inner module text."""',
        "part/broken.py": "print 'two'",
        "tests/test_it.py": '"""Docstring of a test module."""',
        "test_more.py": '"""Docstring of another test module."""',
    }.items():
        write(tmp_path / "fakelib" / name, content)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = {row.name or row.module: row for row in docstrings.parse_libraries(["fakelib"])}
    assert "fakelib" not in sys.modules
    names = {"plain", "Thing", "Thing.size", "Thing._grow", "Thing.make"}
    assert set(rows) == {"fakelib", "fakelib.part.inner", *names}
    assert rows["fakelib"].text == "What the module is for." and rows["fakelib"].kind == "module"
    assert "Second paragraph." in rows["fakelib"].docstring and rows["fakelib"].returns is None
    facts = {name: (row.returns, row.raises, row.property, row.decorated, row.parameters) for name, row in rows.items()}
    assert rows["plain"].text == "Adds up two things."
    assert facts["plain"] == (True, False, False, False, 5)  # an exception of the nested function does not count
    assert rows["plain"].lines == 4  # neither docstring nor comment nor blank line
    assert facts["Thing.size"] == (True, True, True, True, 0)
    assert facts["Thing._grow"] == (False, False, False, False, 1)  # `return None` returns nothing
    assert facts["Thing.make"] == (True, False, False, True, 1)
    assert [rows[name].kind for name in ("plain", "Thing", "Thing.size")] == ["function", "class", "method"]
    hashes = [docstrings.text_hash(row.text) for row in docstrings.parse_libraries(["fakelib"])]
    assert hashes == sorted(hashes), "the order depends on the texts alone"


def test_three_words_of_letters_are_a_text():
    texts = ("Return the sum.", "Größe des Feldes", "Two words", ">>> import this that", "=== 1 2 3 4 5 ===")
    assert [docstrings.is_text(text) for text in texts] == [True, True, False, False, False]


def test_missing_package_and_task_are_named(monkeypatch):
    with pytest.raises(UserError, match=r"'raise'.*Did you mean raises"):
        load("docstrings/raise")
    monkeypatch.setattr(docstrings, "PACKAGES", ("no_such_package",))
    with pytest.raises(UserError, match=r"need no_such_package: pip install -r requirements\.txt"):
        docstrings.cache_path()


def test_cache_is_read_again_unless_damaged_or_of_other_versions(tmp_path, monkeypatch):
    rows = [Row("numpy", "numpy.linalg", "function", "norm", "Norm of a vector.", "Norm of a vector.\n\x85\n\nMore.")]
    parse = Mock(return_value=rows)
    monkeypatch.setattr(docstrings, "CACHE_DIR", tmp_path)
    monkeypatch.setattr(docstrings, "parse_libraries", parse)
    read = load_rows.__wrapped__
    first, digest = read()
    assert first == tuple(rows) and read() == (first, digest) and parse.call_count == 1
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert read() == (first, digest) and parse.call_count == 2
    monkeypatch.setattr(docstrings.importlib.metadata, "version", lambda name: "0.0")
    assert read() == (first, digest) and parse.call_count == 3 and len(list(tmp_path.iterdir())) == 2


GOLDEN = {  # train and test, with the Python and the packages that requirements.txt pins
    "library": ("5d7ebeb44f8e5451", "4960bdc172cc7ea6"),
    "raises": ("08dd706fd2225f12", "748512c8c18d4277"),
    "transformers": ("2ca0aae952d59841", "178e72b411e92541"),
    "lines": ("7dd8c8f7ddec6b21", "48ca04f9e75c01c8"),
}


def test_rows_are_those_of_earlier_results():
    assert [n for n in range(40) if is_test_side(f"Text {n}")] == [1, 18, 24, 27, 28, 29, 35]
    if docstrings.cache_path().name != "docstrings-85191186fc9b2511.jsonl":
        pytest.skip("other versions of Python or of the packages")
    for name, fingerprints in GOLDEN.items():
        assert tuple(load(f"docstrings/{name}", split).fingerprint for split in ("train", "test")) == fingerprints


@pytest.fixture(scope="module")
def pretraining_paragraphs():
    corpus = pretraining_corpus()
    assert len(corpus) == len(set(corpus)) > 20_000
    return {docstrings.first_paragraph(docstring).casefold() for docstring in corpus}


@pytest.mark.parametrize("name", TASKS)
def test_no_text_is_on_both_sides(name, pretraining_paragraphs):
    train, test = (load(f"docstrings/{name}", split) for split in ("train", "test"))
    folded = [text.casefold() for text in train.texts + test.texts]
    assert len(set(folded)) == len(folded)
    assert not any(map(is_test_side, train.texts)) and all(map(is_test_side, test.texts))  # the same side in every task
    assert pretraining_paragraphs.isdisjoint(text.casefold() for text in test.texts)
    for texts in (train.texts, test.texts):
        assert all(docstrings.text_hash(a) < docstrings.text_hash(b) for a, b in itertools.pairwise(texts))
    assert 500 <= len(train.texts) <= 8000 and 100 <= len(test.texts) <= 2000
    if name == "lines":
        assert train.is_regression and train.labels.min() >= 0
    else:
        assert 2 <= train.num_labels <= 14 and set(test.labels) == set(train.labels)


def test_duplicates_take_the_most_frequent_label_then_the_first():
    def rows(text, *labels):
        return [Row("numpy", "numpy", label, "", text, text) for label in labels]

    given = rows("Text of one kind", "b", "b", "a") + rows("text OF one kind", "a", "b") + rows("A tied text", "d", "c")
    assert docstrings.label_texts(given, "kind") == {"Text of one kind": "b", "A tied text": "c"}
