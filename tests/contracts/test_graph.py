"""The serving layer's own rules: no torch at import, one module at Serve's private API, thin deployments."""

import ast
import subprocess
import sys

import pytest

UNDERSCORED_SERVE = {"_to_object_ref_gen", "_to_object_ref"}
# The one module that touches Serve's underscored API.
MAY_TOUCH_SERVE = "deployments/stages/streams.py"
TENSOR_WORK = {"nn", "matmul", "einsum", "softmax", "conv3d"}


def private_serve_users(sources):
    return [
        f"{source.path}:{line}: {name}; go through {MAY_TOUCH_SERVE}"
        for source in sources
        if source.package in ("cluster", "deployments") and str(source.path) != MAY_TOUCH_SERVE
        for name, line in source.identifiers()
        if name in UNDERSCORED_SERVE
    ]


def private_ray_imports(sources):
    return [
        f"{source.path}:{node.lineno}: {node.module}"
        for source in sources
        if source.package in ("cluster", "deployments")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ImportFrom) and node.module and "ray" in node.module and "_private" in node.module
    ]


def top_level_torch(sources):
    return [
        f"{source.path}:{node.lineno}: torch at the top; import it where it is used"
        for source in sources
        if source.package == "deployments"
        for node in source.tree.body
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "torch" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch")
    ]


def tensor_work(sources):
    return [
        f"{source.path}:{line}: {name}; deployments hold no tensor arithmetic"
        for source in sources
        if source.package == "deployments"
        for name, line in source.identifiers()
        if name in TENSOR_WORK
    ]


@pytest.mark.parametrize("rule", [private_serve_users, private_ray_imports, top_level_torch, tensor_work])
def test_the_graph_keeps_its_rules(product, rule):
    assert rule(product) == []


@pytest.mark.parametrize(
    ("rule", "path", "code"),
    [
        (private_serve_users, "deployments/a.py", "response._to_object_ref_gen()"),
        (private_serve_users, "cluster/a.py", "response._to_object_ref()"),
        (private_ray_imports, "deployments/a.py", "from ray.serve._private.client import x"),
        (top_level_torch, "deployments/a.py", "import torch"),
        (top_level_torch, "deployments/a.py", "from torch import nn"),
        (tensor_work, "deployments/a.py", "x.softmax()"),
    ],
)
def test_the_rules_find_what_they_look_for(planted, rule, path, code):
    assert rule(planted(path, code))


WITHOUT_TORCH = (
    *("app", "director.director", "director.pipeline", "api.ingress", "stages.prompt_tokenizer"),
    *("stages.mp4_encoder", "stages.transformer", "stages.video_vae", "stages.audio_vae", "stages.guardrail"),
    *("client", "launch.app_calls", "jobs.service", "director.admission", "api.app", "jobs.store"),
)


def test_importing_a_deployment_loads_no_torch():
    """One process imports them all; the first that loads torch is named."""
    code = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(f"deployments.{module}")
    if "torch" in sys.modules:
        sys.exit(f"deployments.{module} loads torch")
"""
    done = subprocess.run([sys.executable, "-c", code, *WITHOUT_TORCH], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


DEPLOYMENTS = (
    *("api/ingress", "stages/mp4_encoder", "stages/prompt_tokenizer"),
    *("stages/transformer", "stages/video_vae", "stages/audio_vae", "stages/guardrail"),
)


def test_deployments_are_thin(product):
    lines = {str(source.path): source.text.count("\n") for source in product}
    paths = [f"deployments/{name}.py" for name in DEPLOYMENTS]
    assert {path: lines[path] for path in paths if lines[path] > 160} == {}
    # Its handle has all methods for jobs too, and it wires its parts.
    assert lines["deployments/director/director.py"] <= 250
