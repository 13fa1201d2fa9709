"""README and ``docs/``: every path, key, flag, route, metric and message that they name exists."""

import argparse
import ast
import math
import re
from pathlib import Path

import pytest
import yaml

from cosmos3_core.bench.random_models import RANDOM_MODELS
from cosmos3_core.checkpoint.configs import AudioVAEConfig
from cosmos3_core.checkpoint.tensors import audio_vae_tensors, transformer_tensors, video_vae_tensors
from cosmos3_core.request_flags import add_request_flags
from deployments.config import AppConfig
from deployments.observability.metrics import TABLE
from tests.pages import KINDS, PAGES, README, ROOT, blocks_of

ALL = [README, *PAGES]
HTTP_API, TROUBLESHOOTING = ROOT / "docs" / "http-api.md", ROOT / "docs" / "troubleshooting.md"
# First folders of the repository's files; other paths are a checkpoint's or the reader's.
FOLDERS = ("cosmos3_core", "cluster", "deployments", "tests", "docs", ".ci")
MAX_README_LINES = 150
MAX_MAP_LINES = 25


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.stem)


def prose(page):
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def code_spans(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def paths_named(page):
    """Find paths of the repository in prose; a path may end with a slash."""
    spans = [span.strip() for span in code_spans(page)]
    return [span for span in spans if re.fullmatch(r"[\w./-]+", span) and span.split("/")[0] in FOLDERS and "/" in span]


def links(page):
    """Find the relative targets of links, as (path, anchor)."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target.partition("#")[::2] for target in targets if "://" not in target]


def anchors(page):
    """Return the anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def map_paths():
    """Files and folders that README's map names, each below the folder whose line is not indented."""
    (tree,) = (block.code for block in blocks_of(README) if block.code.startswith("cosmos3_core/"))
    folder, found = Path(), []
    for line in tree.splitlines():
        if not line.startswith(" "):
            folder = Path(line.split("/")[0])
        for name in re.findall(r"(?<![\w/.])[\w./]+(?:\.py|/)(?=[\s:;,)]|$)", line):
            found.append([ROOT / folder / name, ROOT / name, *(ROOT / folder).glob(f"*/{name}")])
    return len(tree.splitlines()), found


@each(ALL)
def test_named_files_exist(page):
    missing = [path for path in paths_named(page) if not (ROOT / path).exists()]
    assert missing == []


@each(ALL)
def test_links_resolve(page):
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@each(ALL)
def test_every_block_has_a_known_kind(page):
    assert {block.kind for block in blocks_of(page)} <= KINDS


@each(ALL)
def test_configurations_are_valid(page):
    for block in blocks_of(page):
        if block.kind == "yaml":
            AppConfig.parse({"checkpoint": "Cosmos3-Nano", **yaml.safe_load(block.code)})


@each(ALL)
def test_named_keys_exist(page):
    sections = {
        name: field.default if field.default is not None else AppConfig.model_fields["transformer"].default
        for name, field in AppConfig.model_fields.items()
        if name not in ("checkpoint", "name", "model_name")
    }
    named = [re.fullmatch(r"(?:--set )?([a-z_]+)\.([a-z_]+)(=.*)?", span) for span in code_spans(page)]
    wrong = [
        match[0]
        for match in named
        if match and match[1] in sections and match[2] not in type(sections[match[1]]).model_fields | {"py": None}
    ]
    assert wrong == []


@each(ALL)
def test_named_flags_exist(page, product):
    spans = [span for span in code_spans(page) if not span.startswith(("hf ", "pip "))]
    named = {flag for span in spans for flag in re.findall(r"--[a-z][a-z-]+", span)}
    defined = {flag for source in product for flag in re.findall(r'"(--[a-z][a-z-]+)"', source.text)}
    parser = argparse.ArgumentParser()
    add_request_flags(parser)
    defined |= set(re.findall(r"--[a-z][a-z-]+", parser.format_usage()))
    assert named <= defined | {"--help"}


@each(ALL)
def test_named_routes_exist(page, product):
    spans = [re.fullmatch(r"(?:GET|POST|DELETE) (/[\w/{}.]+)", span) for span in code_spans(page)]
    named = {re.sub(r"{\w+}", "{}", match[1]) for match in spans if match}
    defined = {
        re.sub(r"{\w+}", "{}", path) for source in product for path in re.findall(r'"(/[\w/{}.]+)"', source.text)
    }
    assert named <= defined


@each(ALL)
def test_named_metrics_exist(page):
    known = {f"ray_{metric.name}" + ("_total" if metric.kind == "counter" else "") for metric in TABLE}
    named = set(re.findall(r"ray_cosmos3_\w+", page.read_text("utf-8")))
    assert named <= known | {"ray_cosmos3_scrape_failures"}


def texts(sources):
    """Yield every string of the product, with "..." for the fields of f-strings."""
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)


def test_messages_in_troubleshooting_exist_in_the_product(product):
    said = "\n".join(texts(product))
    symptoms = [line.split("|")[1] for line in prose(TROUBLESHOOTING).splitlines() if line.startswith("| ")]
    quoted = [span for symptom in symptoms for span in re.findall(r"`([^`]+)`", symptom) if " " in span]
    pieces = [piece.strip(" ,:") for span in quoted for piece in span.split("...")]
    assert len(pieces) > 10
    assert [piece for piece in pieces if piece not in said] == []


def test_error_codes_exist_in_the_product(product):
    (errors,) = re.findall(r"^## Errors\n(.*)", HTTP_API.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    rows = [line.split("|")[2] for line in errors.splitlines() if re.match(r"\| \d", line)]
    codes = {code for row in rows for code in re.findall(r"`(\w+)`", row)}
    assert len(codes) > 20
    assert codes - set(texts(product)) == set()


def test_readme_is_one_page_and_links_every_other():
    assert len(README.read_text("utf-8").splitlines()) <= MAX_README_LINES
    linked = {(ROOT / path).resolve() for path, _ in links(README)}
    assert set(PAGES) <= linked


def test_the_map_is_short_and_true():
    num_lines, found = map_paths()
    assert num_lines <= MAX_MAP_LINES
    assert len(found) > 20
    missing = [candidates[0] for candidates in found if not any(path.exists() for path in candidates)]
    assert missing == []


def test_readmes_sizes_follow_from_the_published_shapes():
    """Download in GB, weights in memory in GiB. Neither the language model's head nor sound's encoder is loaded."""
    rows = re.findall(r"^\| `nvidia/Cosmos3-(\w+)` \| (\d+) GB \| (\d+) GiB\b", README.read_text("utf-8"), re.MULTILINE)
    assert {name.lower() for name, *_ in rows} == set(RANDOM_MODELS) - {"tiny"}
    for name, download_gb, loaded_gib in rows:
        transformer, vae = RANDOM_MODELS[name.lower()]
        tensors = transformer_tensors(transformer)
        sound = audio_vae_tensors(AudioVAEConfig()) if transformer.sound_gen else {}
        stored = [*tensors.values(), *video_vae_tensors(vae).values(), *sound.values()]
        unread = [tensors["lm_head.weight"], *(sound[name] for name in sound if not name.startswith("decoder."))]
        num_stored, num_unread = (sum(map(math.prod, shapes)) for shapes in (stored, unread))
        assert float(download_gb) == pytest.approx(2 * num_stored / 1e9, rel=0.03)
        assert float(loaded_gib) == pytest.approx(2 * (num_stored - num_unread) / 2**30, rel=0.03)


def test_the_checks_find_planted_faults(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A b\n`cluster/none.py` [x](gone.md) [y](#no-such)\n```bash\n`tests/`\n```\n")
    assert paths_named(page) == ["cluster/none.py"]
    assert links(page) == [("gone.md", ""), ("", "no-such")]
    assert anchors(page) == {"a-b"}
