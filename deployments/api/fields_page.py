"""FIELDS.md, made from the models of request bodies: ``python -m deployments.api.fields_page > FIELDS.md``."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.api.fields import BODIES, Endpoint, RequestBody

_PAGE = """\
# Fields of requests

This page is made from `fields.py` (`python -m deployments.api.fields_page`). Absent fields take the checkpoint's own
defaults (`cosmos3_core/presets.py`).

## Effective

{effective}
## Without effect

They are accepted and named in the `warnings` of the job (`x-warnings` of an answer with a file).

{no_effect}
## Not offered

They are refused with a 422, as is every other name, with the nearest known one.

{not_offered}"""

_Row = tuple[str, ...]


def fields_page() -> str:
    """Return the text of FIELDS.md."""
    bodies = BODIES.items()
    effective = [
        (endpoint, (_names(model, name), model.type_of(name).name, model.type_of(name).about))
        for endpoint, model in bodies
        for name in model.model_fields
    ]
    no_effect = [(endpoint, (f"`{name}`", why)) for endpoint, body in bodies for name, why in body.no_effect.items()]
    refused = [(endpoint, (f"`{name}`", why)) for endpoint, body in bodies for name, why in body.not_offered.items()]
    return _PAGE.format(
        effective=_table(("field", "written as", "what it is for"), effective),
        no_effect=_table(("field", "why"), no_effect),
        not_offered=_table(("field", "what it asks for"), refused),
    )


def _names(model: type[RequestBody], name: str) -> str:
    return ", ".join(f"`{it}`" for it in (name, *(alias for alias, own in model.aliases().items() if own == name)))


def _table(head: _Row, rows: Sequence[tuple[Endpoint, _Row]]) -> str:
    """Return a Markdown table with each row once, and the endpoints that have it."""
    lines = [(*head, *(f"`{it}`" for it in Endpoint)), ("---",) * (len(head) + len(Endpoint))]
    for row in dict.fromkeys(row for _, row in rows):
        lines.append((*row, *("yes" if (endpoint, row) in rows else "" for endpoint in Endpoint)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(fields_page(), end="")
