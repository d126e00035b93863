"""Names as a terminal shows them and a shell reads them."""

import os
import subprocess

import pytest

from hflow_rt.names import quoted, shown


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("photo é 日本 😀.png", "photo é 日本 😀.png"),
        ("\udcff\udce9.png", r"\xff\xe9.png"),
        ("a\x1b[31m\r\n\tb", r"a\x1b[31m\r\n\tb"),
        ("a\x7f\x9bb", r"a\x7f\x9bb"),
        ("a\u2028\u202egnp.b", r"a\u2028\u202egnp.b"),
    ],
)
def test_shown(name: str, expected: str) -> None:
    assert shown(name) == expected
    assert shown(expected) == expected


@pytest.mark.parametrize(
    "name", ["plain.png", "a b.png", "it's", 'say "x" $HOME `id` \\', "\udcff\udce9", "a\x1b'\n\\b", "-n", "a\u202eb"]
)
def test_a_shell_reads_back_what_is_quoted(name: str) -> None:
    word = quoted(name)
    assert shown(word) == word
    done = subprocess.run(
        ["bash", "-c", f"printf %s {word}"], capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"}, check=True
    )
    assert os.fsdecode(done.stdout) == (f"./{name}" if name.startswith("-") else name)
