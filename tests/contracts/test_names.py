"""Quantities carry their unit or say what they count: no bare duration, timeout, size or length in the core."""

import ast

import pytest

BARE = {
    "duration": "duration_s",
    "timeout": "timeout_s",
    "size": "num_bytes, height and width",
    "length": "num_tokens, num_frames",
}
# (file, name) -> why it may stay.
ALLOWED: dict[tuple[str, str], str] = {}


def find_names(tree):
    """(name, line) of every function parameter, instance attribute and class attribute."""
    for node in ast.walk(tree):
        match node:
            case ast.arg(arg=name):
                yield name, node.lineno
            case ast.Attribute(attr=name, value=ast.Name(id="self"), ctx=ast.Store()):
                yield name, node.lineno
            case ast.ClassDef(body=body):
                for statement in body:
                    targets = (
                        statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
                    )
                    yield from ((target.id, target.lineno) for target in targets if isinstance(target, ast.Name))


def bare_names(sources):
    return [
        f"{source.path}:{line}: {name}; say {BARE[name]}"
        for source in sources
        for name, line in find_names(source.tree)
        if name in BARE and (str(source.path), name) not in ALLOWED
    ]


def test_quantities_carry_units(core):
    assert bare_names(core) == []


def test_the_allow_list_is_in_use_and_has_reasons(core):
    defined = {(str(source.path), name) for source in core for name, _ in find_names(source.tree)}
    assert set(ALLOWED) <= defined, "remove entries that nothing needs"
    assert all(ALLOWED.values())


@pytest.mark.parametrize("name", sorted(BARE))
@pytest.mark.parametrize(
    "text",
    [
        "def f({}): ...",
        "def f(*, {}: int = 0): ...",
        "async def f(*{}): ...",
        "lambda {}: 0",
        "class A:\n    def f(self):\n        self.{} = 0",
        "class A:\n    def f(self):\n        self.{}: int = 0",
        "@dataclass\nclass A:\n    {}: int",
        "class A:\n    {} = 0",
    ],
)
def test_the_rule_finds_a_planted_violation(planted, text, name):
    assert bare_names(planted("cosmos3_core/a.py", text.format(name)))
    assert bare_names(planted("cosmos3_core/a.py", text.format(f"{name}_s"))) == []


def test_the_rule_lets_calls_of_others_pass(planted):
    text = "size = frame.size\nsubprocess.run(command, timeout=3)\nframe.duration = 1\n"
    assert bare_names(planted("cosmos3_core/a.py", text)) == []
