from __future__ import annotations

import pytest

from sdpnet.checkpoints.class_names import first_difference


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        (("a", "b", "c"), ("a", "b", "c"), None),
        ((), (), None),
        (("a", "b", "c"), ("a", "x", "y"), "class 1 is 'b' there and 'x' here"),
        (("a", "b", "c"), ("b", "a", "c"), "class 0 is 'a' there and 'b' here (the same names in another order)"),
        (("a", "b"), ("a", "b", "c"), "class 2, 'c', is only here (2 classes there, 3 here)"),
        (("a", "b", "c"), ("a",), "class 1, 'b', is only there (3 classes there, 1 here)"),
        (("a", "b"), ("a", "B", "c"), "class 1 is 'b' there and 'B' here"),
        (("e\u0301",), ("\u00e9",), "class 0 is 'e\u0301' there and '\u00e9' here"),
        (("\x1b[2J\n",), ("a",), r"class 0 is '\x1b[2J\n' there and 'a' here"),
        (("a" * 100,), ("b",), f"class 0 is '{'a' * 57}...' there and 'b' here"),
    ],
)
def test_the_first_difference(there: tuple[str, ...], here: tuple[str, ...], words: str | None) -> None:
    assert first_difference(there, here) == words
