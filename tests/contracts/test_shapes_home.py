"""Compression arithmetic lives in shapes.py: no other file divides by 4, 16 or 32, or treats the first frame apart."""

import io
import tokenize

import pytest

HOME = "cosmos3_core/shapes.py"
IGNORED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
PATTERNS = [("//", "4"), ("//", "16"), ("//", "32"), ("-", "1", ")", "//")]


def compression_arithmetic(sources):
    found = []
    for source in sources:
        if str(source.path) == HOME:
            continue
        tokens = [
            token for token in tokenize.generate_tokens(io.StringIO(source.text).readline) if token.type not in IGNORED
        ]
        words = [token.string for token in tokens]
        for index, token in enumerate(tokens):
            for pattern in PATTERNS:
                if tuple(words[index : index + len(pattern)]) == pattern:
                    found.append(f"{source.path}:{token.start[0]}: '{' '.join(pattern)}' belongs in {HOME}")
    return found


def test_compression_arithmetic_has_one_home(product):
    assert compression_arithmetic(product) == []


@pytest.mark.parametrize(
    "text",
    [
        "a = n//4",
        "a = (n + b) // 16",
        "a = [x // 32 for x in y]",
        "a = (n - 1) // k",
        "a = (\n    n\n    -1)  # why\n//k\n",
    ],
)
def test_the_rule_finds_a_planted_violation(planted, text):
    assert compression_arithmetic(planted("cosmos3_core/request.py", text))
    assert compression_arithmetic(planted(HOME, text)) == []


@pytest.mark.parametrize("text", ["# n // 4", "'n // 4'", "a = n // 2", "a = n // 40", "a = n / 4", "a = (n - 1) / k"])
def test_the_rule_lets_the_harmless_pass(planted, text):
    assert compression_arithmetic(planted("cosmos3_core/request.py", text)) == []
