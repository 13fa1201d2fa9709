"""Names of files, and modules that must not name modes."""

import ast
import re

import pytest

from cosmos3_core.conditioning.modes import MODES

# Names that say nothing; a function lives beside its noun.
NAMELESS = {"utils.py", "helpers.py", "common.py", "misc.py", "base.py"}
# A mode is data (what is noisy, what is clean, where it sits), never a branch of the loop.
MODE_WORDS = {"t2i", "t2v", "i2v", "v2v", "sound", "action", "actions", "policy", "dynamics", "transfer", "image"}
# No mode may be named here, by text or constant.
MODE_FREE = ("cosmos3_core/sampler", "cosmos3_core/model", "cosmos3_core/vae", "cosmos3_core/parallel")
MODE_FREE_FILES = {
    *("cosmos3_core/denoiser.py", "cosmos3_core/denoise_request.py", "cosmos3_core/engine.py"),
    *("cosmos3_core/conditioning/initial.py", "cosmos3_core/conditioning/clean.py", "cosmos3_core/generate.py"),
}


def nameless_files(sources):
    return [f"{source.path}: name it after what it holds" for source in sources if source.path.name in NAMELESS]


def docstrings(tree):
    """The string nodes that document a module, class or function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str()) as text), *_]:
                    yield text


def mode_words(sources):
    found = []
    for source in sources:
        if not source.is_in("cosmos3_core/sampler"):
            continue
        prose = set(docstrings(source.tree))
        strings = (node for node in ast.walk(source.tree) if isinstance(node, ast.Constant) and node not in prose)
        texts = [*source.identifiers(), *((node.value, node.lineno) for node in strings if isinstance(node.value, str))]
        for text, line in texts:
            words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", text)}
            found += [f"{source.path}:{line}: {word}" for word in sorted(MODE_WORDS & words)]
    return found


def find_modes(sources):
    names = {*MODES, *(mode.upper() for mode in MODES)}
    return [
        f"{source.path}:{line}: {text}; ask the mode's row what it needs to know"
        for source in sources
        if source.is_in(*MODE_FREE) or str(source.path) in MODE_FREE_FILES
        for text, line in (
            *source.identifiers(),
            *((node.value, node.lineno) for node in ast.walk(source.tree) if isinstance(node, ast.Constant)),
        )
        if text in names
    ]


def test_no_file_has_a_meaningless_name(product):
    assert nameless_files(product) == []


@pytest.mark.parametrize("name", sorted(NAMELESS))
def test_the_file_rule_finds_a_planted_violation(planted, name):
    assert nameless_files(planted(f"cosmos3_core/vae/{name}", ""))
    assert nameless_files(planted(f"cosmos3_core/vae/wan_{name}", "")) == []


def test_the_sampler_knows_no_modes(core):
    assert mode_words(core) == []


def test_the_path_of_a_request_names_no_mode(core):
    assert find_modes(core) == []


@pytest.mark.parametrize("path", ["cosmos3_core/denoiser.py", "cosmos3_core/sampler/a.py", "cosmos3_core/engine.py"])
@pytest.mark.parametrize("text", ["if mode == 'policy': ...", "f(TEXT_TO_IMAGE)", "x['image_to_video_with_sound']"])
def test_the_rule_of_names_finds_a_planted_violation(planted, path, text):
    assert find_modes(planted(path, text))
    assert find_modes(planted("cosmos3_core/resolve.py", text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "if mode == 'i2v': ...",
        "def step_action(): ...",
        "class SoundState: ...",
        "latents['sound']",
        "f'{n} transfer steps'",
        "state.t2v",
        "f(v2v=1)",
    ],
)
def test_the_mode_rule_finds_a_planted_violation(planted, text):
    assert mode_words(planted("cosmos3_core/sampler/loop.py", text))
    assert mode_words(planted("cosmos3_core/conditioning/loop.py", text)) == []


def test_the_mode_rule_lets_prose_and_other_words_pass(planted):
    text = '"""Order: video, sound, action."""\ntransaction = resounding = "reaction"  # action\n'
    assert mode_words(planted("cosmos3_core/sampler/loop.py", text)) == []
