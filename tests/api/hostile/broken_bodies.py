"""Bodies that no well-behaved client sends: broken forms, and JSON that is large, deep or nearly JSON.

All come from a seeded generator; the lists are constant.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeAlias

from deployments.api.body_reader import MAX_FIELDS
from deployments.api.fields import BODIES, Endpoint
from tests.api.hostile.byte_api import Sent

MULTIPART = "multipart/form-data; boundary=b"
JSON = "application/json"
URLENCODED = "application/x-www-form-urlencoded"

Body: TypeAlias = tuple[str, str | bytes, bytes]
"""What it is, its content type, and the bytes."""

# Delimiters and bytes that parsers mishandle.
_TOKENS = (
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\r\n\r\n",
        b"--",
        b"--b",
        b"--b--",
        b"\r\n--b\r\n",
        b"\0",
        b'"',
        b'\\"',
        b";",
        b":",
        b"=",
    ),
    *(
        b"%00",
        b"%0d%0a",
        b"[",
        b"]",
        b"[]",
        b"[a]",
        b"{",
        b"}",
        b",",
        b"\xff",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
    ),
    *(
        b"Content-Disposition: form-data; name=",
        b"Content-Type: multipart/mixed; boundary=c",
        b"filename*=utf-8''%2e%2e",
    ),
    *(b"Content-Length: 99999999999999999999", b"Transfer-Encoding: chunked", b"Content-Transfer-Encoding: base64"),
    *(b"_charset_", b"null", b"NaN", b"-0", b"1e999", b"\\ud800", b"\\u0000", b'"prompt":', b"9" * 400, b" " * 400),
)


def part(name: bytes, value: bytes, *, more: bytes = b"", headers: bytes = b"") -> bytes:
    """Make a part of a form, without its boundary line."""
    return b'Content-Disposition: form-data; name="' + name + b'"' + more + b"\r\n" + headers + b"\r\n" + value


def form(*parts: bytes, boundary: bytes = b"b") -> bytes:
    """Make a complete form of parts."""
    line = b"--" + boundary
    return b"".join(line + b"\r\n" + it + b"\r\n" for it in parts) + line + b"--\r\n"


def good_form(png: bytes) -> bytes:
    """Make a valid form with texts, a file and nested fields."""
    return form(
        part(b"prompt", b"a red car"),
        part(b"seed", b"7"),
        part(b"extra_params[guidance_interval][]", b"400"),
        part(b"extra_params[guidance_interval][]", b"1000"),
        part(b"extra_params", b'{"num_inference_steps": 2}'),
        part(b"image", png, more=b'; filename="a.png"', headers=b"Content-Type: image/png\r\n"),
    )


_PROMPT = part(b"prompt", b"a")
_FILE = b'; filename="a.png"'
_NAMES = (
    *(
        b"",
        b" ",
        b"prompt\0",
        b"\0",
        b"prompt%00",
        b"pro\\mpt",
        b'pro\\"mpt',
        b"%22prompt%22",
        b"prompt\xff",
        b"pr\xc3\xb6mpt",
    ),
    *(b"prompt[]", b"prompt[a]", b"prompt[a][b][c][d]", b"prompt[a][b][c][d][e]", b"prompt[", b"prompt]", b"prompt[]]"),
    *(b"[]", b"[a]", b"[a][b]", b"a[" * 5000, b"a" + b"[]" * 5000, b"a" + b"[b]" * 5000, b"[" * 100_000),
    *(
        b"__proto__[x]",
        b"__class__",
        b"constructor[prototype][x]",
        b"extra_params[extra_params][a]",
        b"extra_params[lora]",
    ),
    *(
        b"+AGE-prompt",
        b"\xff\xfep\0r\0",
        b"=?utf-8?q?prompt?=",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"x" * 10_000,
        b"_charset_",
    ),
    *(
        b'a"; name="prompt',
        b'a"; filename="../../../../etc/passwd',
        b"../../../../etc/passwd",
        b"{}",
        b"$ref",
        b"%",
        b"prompt\x0b",
    ),
)
_FILENAMES = (
    *(
        b"../../../../etc/passwd",
        b"/etc/passwd",
        b"C:\\\\windows\\\\win.ini",
        b"a.png\0.mp4",
        b"",
        b"%00",
        b"%0d%0aX-Evil: 1",
    ),
    *(
        b"a\x0bb",
        b"|id",
        b"$(id)",
        b"`id`",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"x" * 100_000,
        b'a"; name="prompt',
        b"=?utf-16?b?AAA=?=",
    ),
)
_PART_HEADERS = (
    *(b"Content-Type: multipart/mixed; boundary=c\r\n", b"Content-Type: text/plain; charset=utf-7\r\n"),
    *(b"Content-Type: text/plain; charset=utf-16\r\n", b"Content-Type: text/plain; charset=none-such\r\n"),
    *(b"Content-Transfer-Encoding: base64\r\n", b"Content-Transfer-Encoding: quoted-printable\r\n"),
    *(
        b"Content-Encoding: gzip\r\n",
        b"Content-Length: 3\r\n",
        b"Content-Length: -1\r\n",
        b"Transfer-Encoding: chunked\r\n",
    ),
    *(
        b"No colon\r\n",
        b": no name\r\n",
        b"Folded: a\r\n  b\r\n",
        b"A: \0\r\n",
        b"\xff: \xff\r\n",
        b"A\nB: c\r\n",
        b"A: b\rC: d\r\n",
    ),
    *(b'Content-Disposition: form-data; name="seed"\r\n', b"Content-Disposition: attachment\r\n", b"A: b\r\n" * 10_000),
    *(b"A" * 100_000 + b": b\r\n", b"A: " + b"b" * 100_000 + b"\r\n", b"Content-Type: " + b";" * 100_000 + b"\r\n"),
)
_CONTENT_TYPES = (
    *(
        b"multipart/form-data",
        b"multipart/form-data;",
        b"multipart/form-data; boundary",
        b"multipart/form-data; boundary=",
    ),
    *(
        b'multipart/form-data; boundary=""',
        b'multipart/form-data; boundary="b',
        b"multipart/form-data; boundary=b; boundary=c",
    ),
    *(b"multipart/form-data; boundary=c", b"multipart/form-data; boundary=bb", b"multipart/form-data; boundary=--b"),
    *(
        b"multipart/form-data; boundary=b ",
        b"MULTIPART/FORM-DATA; BOUNDARY=b",
        b"multipart/form-data;;;; boundary=b;=;",
    ),
    *(
        b"multipart/form-data; boundary=\xff",
        b"multipart/form-data; boundary=" + b"b" * 10_000,
        b"multipart/mixed; boundary=b",
    ),
    *(
        b"multipart/form-data; boundary=b; charset=utf-7",
        b"multipart/form-data; boundary=b; charset=utf-16",
        b"multipart/",
    ),
    *(
        b"multipart/form-data; boundary*=utf-8''b",
        b"multipart/form-data; boundary*0=b",
        b"form-data",
        b"",
        b"/",
        b";",
        b"\xff",
    ),
    *(b"application/json; charset=utf-16", b"application/json\0", b"application/xml", b"text/plain", b"a" * 10_000),
)


def iterate_broken_forms() -> Iterator[Body]:
    """Yield (description, content type, body) of forms with one fault each."""
    whole = form(_PROMPT)
    for kind in _CONTENT_TYPES:
        yield "content type", kind, whole
    for name in _NAMES:
        yield "name", MULTIPART, form(_PROMPT, part(name, b"1"))
        yield "name of a file", MULTIPART, form(_PROMPT, part(name, b"1", more=_FILE))
    for name in _FILENAMES:
        yield "file name", MULTIPART, form(_PROMPT, part(b"image", b"1", more=b'; filename="' + name + b'"'))
        yield "file name", MULTIPART, form(_PROMPT, part(b"image", b"1", more=b"; filename*=utf-8''" + name))
    for headers in _PART_HEADERS:
        yield "header", MULTIPART, form(part(b"prompt", b"a", headers=headers))
        yield "header", MULTIPART, form(_PROMPT, headers + part(b"image", b"1", more=_FILE))
    long = form(_PROMPT, part(b"seed", b"7"))
    for end in range(0, len(long), 13):
        yield f"cut off at {end}", MULTIPART, long[:end]
    yield from _iterate_broken_ends(whole)
    yield from _many_parts()
    yield from _odd_values()


def _iterate_broken_ends(whole: bytes) -> Iterator[Body]:
    for name, body in {
        "nothing": b"",
        "the end alone": b"--b--",
        "a line alone": b"--b",
        "text before": b"preamble\r\n" + whole,
        "text behind": whole + b"epilogue",
        "twice": whole + whole,
        "lines of LF": whole.replace(b"\r\n", b"\n"),
        "lines of CR": whole.replace(b"\r\n", b"\r"),
        "no empty line": whole.replace(b"\r\n\r\n", b"\r\n"),
        "white behind the boundary": whole.replace(b"--b\r\n", b"--b \t\r\n"),
        "no header": b"--b\r\n\r\na\r\n--b--\r\n",
        "no disposition": b"--b\r\nA: b\r\n\r\na\r\n--b--\r\n",
        "no name": form(b"Content-Disposition: form-data\r\n\r\na"),
        "another disposition": form(b'Content-Disposition: attachment; name="prompt"\r\n\r\na'),
        "a name in a star": form(b"Content-Disposition: form-data; name*=utf-8''prompt\r\n\r\na"),
        "two names": form(b'Content-Disposition: form-data; name="prompt"; name="seed"\r\n\r\na'),
        "a form in a form": form(part(b"prompt", form(_PROMPT, boundary=b"c"), headers=_PART_HEADERS[0])),
        "ten megabytes of a header": form(part(b"prompt", b"a", headers=b"A: " + b"b" * 10_000_000 + b"\r\n")),
        "ten megabytes of a header's name": form(part(b"prompt", b"a", headers=b"A" * 10_000_000)),
        "ten megabytes without an end": b"--b\r\n" + part(b"prompt", b"a" * 10_000_000),
        "ten megabytes of dashes": b"-" * 10_000_000,
        "ten megabytes of lines": b"\r\n" * 5_000_000,
        "compressed": b"\x1f\x8b\x08\0" + bytes(1000),
    }.items():
        yield name, MULTIPART, body


def _many_parts() -> Iterator[Body]:
    for count in (MAX_FIELDS, MAX_FIELDS + 1, 1000, 100_000):
        yield f"{count} parts", MULTIPART, form(*(part(b"a%d" % index, b"") for index in range(count)))
        yield f"{count} times one name", MULTIPART, form(*([part(b"seed", b"7")] * count))
        yield f"{count} fields", URLENCODED, b"&".join(b"a%d=" % index for index in range(count))
    yield "many files", MULTIPART, form(*(part(b"image%d" % index, b"1", more=_FILE) for index in range(100)))
    yield "empty parts", MULTIPART, b"--b\r\n\r\n\r\n" * 10_000 + b"--b--\r\n"
    yield "boundaries alone", MULTIPART, b"--b\r\n" * 100_000
    yield "ampersands", URLENCODED, b"&" * 100_000
    yield "a name of a megabyte", URLENCODED, b"a" * 1_000_000 + b"=1"
    yield "a name of a megabyte", MULTIPART, form(part(b"a" * 1_000_000, b"1"))


def _odd_values() -> Iterator[Body]:
    values = (
        *(
            b"",
            b" ",
            b"\0",
            b"\xff\xfea\0",
            b"+AGE-",
            b"null",
            b"nan",
            b"inf",
            b"-inf",
            b"1e400",
            b"0x10",
            b"1_000",
            b"1,5",
        ),
        *(
            "٣".encode(),
            "\u2028".encode(),
            b"9" * 5000,
            b"-" + b"9" * 5000,
            b"1" * 100_000,
            b"[" * 100_000,
            b'{"a":' * 50_000,
        ),
        *(
            b"[1",
            b"[1,]",
            b"[,]",
            b"{}",
            b'{"a": 1}',
            b"[[]]",
            b"true",
            b"TRUE",
            b"file:///etc/passwd",
            b"${jndi:ldap://a}",
        ),
    )
    for name in ("seed", "guidance_scale", "guidance_interval", "actions", "extra_params", "size", "seconds", "image"):
        for value in values:
            yield f"{name}", MULTIPART, form(_PROMPT, part(name.encode(), value))
    for body in (
        b"%",
        b"%zz=1",
        b"%00=%00",
        b"prompt=%ff%fe",
        b"=b",
        b"prompt",
        b"prompt=%c0%80",
        b"a[b[c]]=1",
        b"prompt=%u0041",
    ):
        yield "escapes", URLENCODED, body
    twins = (b"seed", b"seed[]", b"seed[a]", b"extra_params", b"extra_params[]", b"extra_params[a]", b"image")
    for one in twins:
        for other in twins:
            for more in (b"", _FILE):
                yield f"{one!r} and {other!r}", MULTIPART, form(_PROMPT, part(one, b"1"), part(other, b"{}", more=more))


def iterate_broken_json() -> Iterator[Body]:
    """Yield the same of JSON bodies."""
    good = b'{"prompt": "a"}'
    for name, body in {
        "nothing": b"",
        "white": b" \n\t",
        "lists": b"[" * 1_000_000,
        "lists that end": b"[" * 100_000 + b"]" * 100_000,
        "objects": b'{"a":' * 200_000,
        "lists in a field": b'{"prompt": "a", "actions": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "lists in an ignored field": b'{"prompt": "a", "user": ' + b"[" * 900 + b"]" * 900 + b"}",
        "objects in an ignored field": b'{"prompt": "a", "user": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
        "a huge integer": b'{"prompt": "a", "seed": ' + b"9" * 1_000_000 + b"}",
        "a large integer": b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}",
        "a huge exponent": b'{"prompt": "a", "guidance_scale": 1e999999999}',
        "a long fraction": b'{"prompt": "a", "guidance_scale": 1.' + b"0" * 1_000_000 + b"1}",
        "values": b'{"prompt": "a", "user": [' + b"0," * 3_000_000 + b"0]}",
        "fewer values": b'{"prompt": "a", "user": [' + b"0," * 400_000 + b"0]}",
        "empty objects": b'{"prompt": "a", "user": [' + b"{}," * 300_000 + b"{}]}",
        "keys": b"{" + b",".join(b'"k%d":0' % index for index in range(200_000)) + b"}",
        "a long key": b'{"' + b"k" * 2_000_000 + b'": 1}',
        "a long text": b'{"prompt": "' + b"a" * 10_000_000 + b'"}',
        "escapes": b'{"prompt": "' + b"\\u0061" * 1_000_000 + b'"}',
        "a key twice": b'{"prompt": "a", "prompt": "b"}',
        "a key twice, escaped": b'{"prompt": "a", "\\u0070rompt": "b"}',
        "a key twice inside": b'{"prompt": "a", "extra_params": {"seed": 1, "seed": 2}}',
        "half a surrogate": b'{"prompt": "a\\ud800"}',
        "half a surrogate in a key": b'{"prompt": "a", "\\udfff": 1}',
        "half a surrogate in a file": b'{"prompt": "a", "image": "data:image/png;base64,\\ud800"}',
        "two halves": b'{"prompt": "\\ud83d\\ude00"}',
        "a zero": b'{"prompt": "a\\u0000b"}',
        "a zero in a key": b'{"prompt\\u0000": "a"}',
        "a raw zero": b'{"prompt": "a\0b"}',
        "controls": b'{"prompt": "a\nb"}',
        "directions": '{"prompt": "\u202e\u2066a\u2028"}'.encode(),
        "not a number": b'{"prompt": "a", "guidance_scale": NaN}',
        "infinity": b'{"prompt": "a", "seconds": -Infinity}',
        "minus nothing": b'{"prompt": "a", "seed": -0}',
        "a comma": b'{"prompt": "a",}',
        "a comment": b'{"prompt": "a" /* b */}',
        "other quotes": b"{'prompt': 'a'}",
        "behind the end": good + b"{}",
        "cut off": good[:-3],
        "a mark": b"\xef\xbb\xbf" + good,
        "utf-16": good.decode().encode("utf-16"),
        "utf-32": good.decode().encode("utf-32"),
        "latin": '{"prompt": "é"}'.encode("latin-1"),
        "no utf-8": b'{"prompt": "\xc0\x80\xed\xa0\x80\xf5"}',
        "lines": good + b"\n" + good,
        "a long field of another name": b'{"prompt": "a", "' + b"x" * 900_000 + b'": 1}',
        "extra in extra": b'{"prompt": "a", "extra_params": {"extra_params": {"extra_params": {}}}}',
        "a number of another script": '{"prompt": "a", "seed": "٣"}'.encode(),
    }.items():
        yield name, JSON, body
    for value in (b"null", b"true", b"0", b'"a"', b"[]", b"[{}]", b'["prompt"]'):
        yield "no object", JSON, value


_ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        2**31,
        2**63,
        10**300,
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
        "",
        " ",
        "x",
        "0",
        "\0",
        "-1",
    ),
    *(
        "9" * 400,
        "x" * 3000,
        "[",
        "{}",
        "[1, 2]",
        "null",
        "1e999",
        [],
        [None],
        [[]],
        [[[]]],
        [[None]],
        [[1e308, "x"]],
        [0] * 300,
    ),
    *(
        {},
        {"": None},
        {"data": []},
        {"data": [[float("nan")]]},
        {"url": 1},
        {"file_id": "a"},
        {"a": {"b": {"c": []}}},
        "../../etc/passwd",
    ),
)


def iterate_odd_values(endpoint: Endpoint, rng: random.Random, num_values: int) -> Iterator[Body]:
    """Yield JSON bodies: each field of an endpoint with values of all types.

    Args:
        endpoint: has the fields.
        rng: chooses the values.
        num_values: values per field.
    """
    model = BODIES[endpoint]
    names = [*model.model_fields, *model.aliases(), *list(model.no_effect)[:4]]
    for name in names:
        for value in rng.sample(_ODD, num_values):
            for fields in ({"prompt": "a", name: value}, {"prompt": "a", "extra_params": {name: value}}):
                yield name, JSON, json.dumps(fields).encode()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Mutate bytes in a few places: flips, holes, repetitions, swaps, inserted delimiters."""
    body = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 5, 10))):
        start = rng.randrange(len(body) + 1)
        end = min(len(body), start + int(rng.expovariate(0.1)))
        match rng.randrange(7):
            case 0 if start < len(body):
                body[start] ^= 1 << rng.randrange(8)
            case 1:
                del body[start:end]
            case 2:
                body[start:start] = rng.choice(_TOKENS)
            case 3:
                body[start:start] = body[start:end] * rng.choice((1, 2, 50))
            case 4:
                del body[start:]
            case 5:
                body[start:end] = rng.randbytes(end - start)
            case _:
                other = rng.randrange(len(body) + 1)
                body[other:other] = body[start:end]
    return bytes(body)


def cut(sent: Sent, rng: random.Random) -> Sent:
    """Cut the body of a request at random places."""
    body = b"".join(sent.body)
    cuts = sorted(rng.randrange(len(body) + 1) for _ in range(rng.randrange(8)))
    return replace(sent, body=tuple(body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)))


def iterate_bad_lengths(body: bytes) -> Iterator[Sent]:
    """Yield forms without a Content-Length, or with a wrong one."""
    for value in (
        b"",
        b"0",
        b"-1",
        b"+1",
        b"1e3",
        b"0x10",
        b"5, 5",
        b"9" * 40,
        "٣".encode(),
        str(len(body) - 1).encode(),
        b"\xff",
    ):
        headers = ((b"content-type", MULTIPART.encode()), (b"content-length", value))
        yield Sent("POST", Endpoint.VIDEOS, headers, (body,))
        yield Sent("POST", Endpoint.VIDEOS, (*headers, (b"content-length", b"5")), (body,))
        yield Sent("POST", Endpoint.VIDEOS, (*headers, (b"transfer-encoding", b"chunked")), (body,))
