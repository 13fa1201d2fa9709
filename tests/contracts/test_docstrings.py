"""Every module of the core, and every public class and function in it, says what it is for."""

import ast

import pytest


def find_undocumented(sources):
    found = []
    for source in sources:
        if source.tree.body and not ast.get_docstring(source.tree):
            found.append(f"{source.path}: module")
        for node in source.tree.body:
            if (
                isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and not node.name.startswith("_")
                and not (ast.get_docstring(node) or "").strip()
            ):
                found.append(f"{source.path}:{node.lineno}: {node.name}")
    return found


def test_everything_public_is_documented(core):
    assert find_undocumented(core) == []


@pytest.mark.parametrize(
    "text",
    [
        "'''m'''\nclass A: ...",
        "'''m'''\ndef f(): ...",
        "'''m'''\nasync def f():\n    ' '",
        "import os",
        "'''m'''\n@d\ndef f(): ...",
    ],
)
def test_the_rule_finds_a_planted_violation(planted, text):
    assert find_undocumented(planted("cosmos3_core/a.py", text))


@pytest.mark.parametrize(
    "text", ["", "'''m'''\ndef _f(): ...", "'''m'''\ndef f():\n    'why'", "'''m'''\nclass A:\n    'what'"]
)
def test_the_rule_lets_the_documented_pass(planted, text):
    assert find_undocumented(planted("cosmos3_core/a.py", text)) == []
