"""The server that stands for Cloud Storage follows its rules, on which saves rely."""

import json
import urllib.error
import urllib.request
from urllib.parse import quote, urlencode

import pytest

from tests.gcs.faults import Faults
from tests.gcs.server import serving


@pytest.fixture(scope="module")
def server():
    with serving(["runs"]) as server:
        yield server


@pytest.fixture
def ask(server):
    """Makes a request; returns status and content."""

    def ask(method, path, data=None, headers=None, **query):
        url = f"{server.environment['STORAGE_EMULATOR_HOST']}{path}?{urlencode(query)}"
        request = urllib.request.Request(url, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    return ask


@pytest.fixture
def put(ask):
    """Writes an object; returns its generation, or the status of a refusal."""

    def put(name, data=b"", **query):
        path = "/upload/storage/v1/b/runs/o"
        status, content = ask("POST", path, data, uploadType="media", name=name, **query)
        return int(json.loads(content)["generation"]) if status == 200 else status

    return put


def place(name):
    return f"/storage/v1/b/runs/o/{quote(name, safe='')}"


def test_an_object_is_replaced_only_if_it_has_the_generation_given(put, ask):
    first = put("a", b"1", ifGenerationMatch=0)
    assert put("a", b"2", ifGenerationMatch=0) == 412
    second = put("a", b"2", ifGenerationMatch=first)
    assert put("a", b"3", ifGenerationMatch=first) == 412
    assert ask("DELETE", place("a"), ifGenerationMatch=first)[0] == 412
    assert ask("GET", place("a"), alt="media") == (200, b"2")
    assert ask("GET", place("a"), alt="media", ifGenerationNotMatch=second)[0] == 304
    assert ask("DELETE", place("a"), ifGenerationMatch=second)[0] == 204
    assert ask("DELETE", place("a"))[0] == 404
    assert put("a", ifGenerationMatch=0) > second


def test_a_write_whose_answer_is_lost_is_done(server, put, ask, monkeypatch):
    faults = Faults(1.0)
    monkeypatch.setattr(faults, "KINDS", ("lose the answer",))
    with monkeypatch.context() as patch:
        patch.setattr(server, "faults", faults)
        with pytest.raises(OSError, match=r"reset|closed"):
            put("lost", b"1", ifGenerationMatch=0)
    assert put("lost", b"2", ifGenerationMatch=0) == 412
    assert ask("GET", place("lost"), alt="media") == (200, b"1")
