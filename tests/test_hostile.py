"""Specs made to hang, crash, execute or mislead: each is refused, by a process that ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moegen.errors import SpecError
from moegen.spec.source import read_text

MIB = 1 << 20
ALIASES = "a: &a [x, x]\n" + "".join(f"k{n}: &k{n} [*a, *a]\n" for n in range(30))
MERGES = "a: &a {x: 1}\n" + "".join(f"k{n}: {{<<: [*a, *a]}}\n" for n in range(100))

HOSTILE = {
    "deep lists": "[" * 100_000,
    "deep lists in a key": "a: " + "[" * 100_000,
    "deep mappings": "{a: " * 50_000,
    "deep blocks": "- " * 100_000,
    "deep keys": "? " * 100_000,
    "deep lines": "\n".join(" " * n + "a:" for n in range(600)),
    "many keys": "".join(f"k{n}: 1\n" for n in range(20_000)),
    "many items": "a: [" + "1," * 100_000 + "]",
    "many quotes": "a: [" + "''," * 60_000 + "]",
    "too large": "a: " + "x" * MIB,
    "many lines": "\n" * (2 * MIB),
    "many words": "a: " + "x " * 130_000,
    "words on lines": "a:\n" + " x\n" * 87_000,
    "one long key": "a" * 200_000 + ": 1",
    "one long number": "a: " + "9" * 200_000,
    "one long fraction": "a: 0." + "1" * 200_000,
    "aliases": ALIASES,
    "merge keys": MERGES,
    "many duplicates": "a: 1\n" * 4_000,
    "many anchors": "".join(f"k{n}: &a{n} 1\n" for n in range(4_000)),
    "long tag": "a: !" + "x" * 200_000,
    "many documents": "---\n" * 60_000,
    "many wrong escapes": 'a: "' + "\\U00110000" * 1000 + '"',
}

# A child process, as what this guards against could hang or kill the process that meets it.
READ = """
import sys
from moegen.errors import SpecError
from moegen.spec.source import read_text
try:
    source = read_text(sys.stdin.read())
except SpecError as error:
    report = str(error)
    assert len(report) < 20_000, len(report)
    print(report[:200])
else:
    assert list(source.data) == ["a"]
    print("read")
"""


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_text_ends(case: str):
    done = subprocess.run(
        [sys.executable, "-c", READ],
        input=HOSTILE[case],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['exit 1']",
        "a: !!python/name:os.system",
        "!!python/object/new:os.system {}",
        "a: !include /etc/passwd",
        "a: !!binary aGk=",
        "%TAG ! tag:yaml.org,2002:python/\n---\na: !object/apply:os.system []",
    ],
)
def test_nothing_is_executed(text: str):
    with pytest.raises(SpecError, match="tags"):
        read_text(text)


@pytest.mark.parametrize(
    "text",
    [
        *("a: \x1b[2J", 'a: "\\x1b[2J"', "a: \u202e", 'a: "\\u202e"', 'a: "\\ud800"', 'a: "\\0"'),
        *("\x1b[2J: 1", '"\\x07": 1', "# \u2066\na: 1", "a: \ud800", "a: x\x85b", "a: \u2028"),
    ],
)
def test_characters_that_mislead(text: str):
    with pytest.raises(SpecError, match=r"the character U\+") as caught:
        read_text(text, "\x1b]0;title\x07.yaml")
    assert all(line.isprintable() for line in str(caught.value).split("\n"))


def test_reports_stay_short():
    for text in (f"&{'x' * 9000} a: 1", f"a: *{'x' * 9000}", f"a: !{'x' * 9000} b"):
        with pytest.raises(SpecError) as caught:
            read_text(text)
        assert len(str(caught.value)) < 1000
