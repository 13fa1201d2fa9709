"""The folders of ``deployments``: which there are, and that imports point one way, from the command line down."""

import ast

import pytest

# From the lowest to the highest. A module imports from its own row and from rows before it.
LAYERS = (
    ("threads", "process_memory", "errors", "api_model"),
    ("config", "messages", "failures"),
    ("observability",),
    ("media",),
    ("jobs",),
    ("stages",),
    ("director",),
    ("clients",),
    ("api",),
    ("client", "app"),
    ("launch",),
    ("__main__",),
)
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}


def place(path):
    """The folder of a source below ``deployments``, or the module at its top."""
    return path.with_suffix("").parts[1]


def upward_imports(sources):
    found = []
    for source in sources:
        if source.package != "deployments" or source.path.name == "__init__.py":
            continue
        here = place(source.path)
        if here not in LAYER:
            found.append(f"{source.path}: give it a folder, or a row in LAYERS")
            continue
        for node in ast.walk(source.tree):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "deployments":
                modules = [f"deployments.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            for module in modules:
                package, _, rest = module.partition(".")
                there = rest.split(".")[0]
                if package == "deployments" and there != here and LAYER.get(there, len(LAYERS)) > LAYER[here]:
                    found.append(f"{source.path}:{node.lineno}: {here} imports {module}, which lies above it")
    return found


def test_imports_point_one_way(product):
    assert upward_imports(product) == []


def test_every_row_is_there(product):
    there = {place(source.path) for source in product if source.package == "deployments"}
    assert set(LAYER) == there - {"__init__"}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("deployments/jobs/a.py", "from deployments.api.call import error_response"),
        ("deployments/jobs/a.py", "def f():\n    from deployments import app"),
        ("deployments/media/a.py", "import deployments.jobs.store"),
        ("deployments/messages.py", "if TYPE_CHECKING:\n    from deployments.jobs.job import Job"),
        ("deployments/jobs/a.py", "from deployments.nowhere import x"),
        ("deployments/other.py", ""),
    ],
)
def test_the_rule_finds_a_planted_violation(planted, path, text):
    assert upward_imports(planted(path, text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("deployments/api/a.py", "from deployments.jobs.store import JobStore"),
        ("deployments/jobs/a.py", "from deployments.jobs.store import JobStore\nfrom cosmos3_core import app"),
        ("deployments/client.py", "from deployments.clients.transport import read_answer"),
        ("cluster/a.py", "import ray"),
    ],
)
def test_the_rule_lets_imports_downward_pass(planted, path, text):
    assert upward_imports(planted(path, text)) == []
