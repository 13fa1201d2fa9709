"""Names and summaries: every summary has a subject, functions are verbs, a public class name stands for one thing."""

import ast
from collections import defaultdict

import pytest

from tests.contracts.conftest import ROOT, read_sources

SUMMARIES = ("Of ", "Who ", "Whose ", "See the ")
PARTICIPLES = frozenset(
    "asked begun bought broken brought built caught chosen done drawn found given gone held kept known left lost made "
    "met paid seen sent shown sold spent spoken taken taught thought told written".split()
)
# Words that end like participles and are verbs, or nouns, all the same.
VERBS = frozenset({"embed", "feed", "need", "seed", "speed"})
# Methods whose name is part of the library's surface.
PUBLIC_NAMES = frozenset({"packed"})
# Files in deployments whose functions and summaries are still to be renamed; the list only gets shorter.
EXEMPT: tuple[str, ...] = ()
# Folders of tests whose helpers need not keep the same rules: fixtures are frozen.
FROZEN_TESTS = frozenset({"fixtures"})


def is_noun(node):
    """Properties and pytest's fixtures are called what they give."""
    called = (getattr(it, "func", it) for it in node.decorator_list)
    names = {getattr(it, "id", getattr(it, "attr", "")) for it in called}
    return bool(names & {"property", "cached_property", "fixture"})


def subjectless_summaries(sources):
    return [
        f"{source.path}: {getattr(node, 'name', 'module')}: begin the summary with a verb or its subject"
        for source in sources
        for node in source.definitions
        if (ast.get_docstring(node) or "").startswith(SUMMARIES)
    ]


def participles(sources):
    found = []
    for source in sources:
        for node in source.definitions:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_noun(node):
                word = node.name.strip("_").split("_")[0]
                is_participle = (word.endswith("ed") and word not in VERBS) or word in PARTICIPLES
                if is_participle and node.name not in PUBLIC_NAMES:
                    found.append(f"{source.path}:{node.lineno}: {node.name}: name what it does with a verb")
    return found


def doubles(sources):
    files = defaultdict(list)
    for source in sources:
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files[node.name].append(str(source.path))
    return [f"{name}: {', '.join(paths)}" for name, paths in files.items() if len(paths) > 1]


def select_held(product):
    return [source for source in product if str(source.path) not in EXEMPT]


def test_summaries_have_a_subject(product):
    assert subjectless_summaries(select_held(product)) == []


def test_functions_are_verbs(product):
    assert participles(select_held(product)) == []


def test_a_public_class_name_stands_for_one_thing(product):
    assert doubles(product) == []


def test_helpers_of_tests_keep_the_rules():
    paths = ((path, path.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("*.py"))
    tests = read_sources(path for path, name in paths if name.parts[0] not in FROZEN_TESTS)
    assert len(tests) > 150
    assert subjectless_summaries(tests) + participles(tests) == []


def test_no_file_of_the_core_or_the_cluster_is_exempt():
    assert [path for path in EXEMPT if not path.startswith("deployments/")] == []


def test_a_file_that_keeps_the_rules_is_not_exempt(product):
    unruly = {str(source.path) for source in product if subjectless_summaries([source]) or participles([source])}
    assert [f"{path}: take it out of EXEMPT" for path in EXEMPT if path not in unruly] == []


@pytest.mark.parametrize("summary", [f"{word}x." for word in SUMMARIES])
@pytest.mark.parametrize("text", ["'''{}'''", "class A:\n    '''{}'''", "def f():\n    '''{}'''"])
def test_a_planted_summary_is_found(planted, text, summary):
    assert subjectless_summaries(planted("cluster/a.py", text.format(summary)))
    assert subjectless_summaries(planted("cluster/a.py", text.format("Offer one."))) == []


@pytest.mark.parametrize("name", ["merged", "_told", "kept_frames", "_watched_clip"])
def test_a_planted_participle_is_found(planted, name):
    assert participles(planted("cluster/a.py", f"def {name}(): ..."))
    assert participles(planted("cluster/a.py", f"class A:\n    async def {name}(self): ..."))
    assert participles(planted("cluster/a.py", f"class A:\n    @property\n    def {name}(self): ...")) == []
    assert participles(planted("tests/a.py", f"@pytest.fixture(scope='module')\ndef {name}(): ...")) == []


@pytest.mark.parametrize("name", ["feed", "embed_tokens", "keep", "_read"])
def test_a_verb_passes(planted, name):
    assert participles(planted("cluster/a.py", f"def {name}(): ...")) == []


def test_a_planted_double_is_found(planted):
    sources = [*planted("cluster/a.py", "class A: ..."), *planted("deployments/a.py", "class A: ...")]
    assert doubles(sources) == ["A: cluster/a.py, deployments/a.py"]
    private = [*planted("cluster/a.py", "class _A: ..."), *planted("deployments/a.py", "class _A: ...")]
    assert doubles(private) == []
