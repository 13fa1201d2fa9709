"""The exception tree: what messages hold, and that every class survives a process boundary."""

import copy
import inspect
import pickle

import pytest

from cosmos3_core import errors
from cosmos3_core.errors import (
    CapabilityError,
    CheckpointError,
    ClosedError,
    Cosmos3Error,
    MissingFileError,
    RequestError,
    TensorMismatchError,
)


def all_error_classes():
    members = [member for _, member in inspect.getmembers(errors, inspect.isclass)]
    return [member for member in members if issubclass(member, Cosmos3Error) and member.__module__ == errors.__name__]


def example(cls):
    if issubclass(cls, RequestError):
        return cls("num_frames", 10_001, "1 to 400", "shorten the clip")
    if issubclass(cls, CheckpointError):
        return cls("/models/nano/vae", "holds a JSON list, not an object", "Download it again.")
    return cls("something went wrong at step 3")


def visible(error):
    return type(error), str(error), error.args, vars(error)


@pytest.mark.parametrize("cls", all_error_classes())
@pytest.mark.parametrize("copier", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickle", "copy"])
def test_every_error_survives_a_copy(cls, copier):
    error = example(cls)
    assert visible(copier(error)) == visible(error)
    assert visible(copier(copier(error))) == visible(error)


def test_the_tree_is_the_one_drawn_in_the_module():
    tree = errors.__doc__
    drawn = {
        name for name in (line.strip("│├└─ ").split(" ")[0] for line in tree.splitlines()) if name.endswith("Error")
    }
    assert drawn == {cls.__name__ for cls in all_error_classes()}
    for cls in all_error_classes():
        assert issubclass(cls, Cosmos3Error)
    assert issubclass(CapabilityError, RequestError)
    assert issubclass(MissingFileError, CheckpointError)
    assert issubclass(RequestError, ValueError), "callers of a library expect ValueError for bad arguments"


def test_a_request_error_names_field_value_allowed_and_remedy():
    error = RequestError("num_frames", 10_001, "1 to 400", "shorten the clip")
    assert str(error) == "num_frames must be 1 to 400 (got 10001); shorten the clip"
    assert (error.field, error.given, error.allowed, error.hint) == (
        "num_frames",
        "10001",
        "1 to 400",
        "shorten the clip",
    )


def test_a_hint_that_is_a_sentence_begins_one():
    assert str(RequestError("sede", 1, "left out", "Did you mean seed?")) == (
        "sede must be left out (got 1). Did you mean seed?"
    )


def test_without_a_hint_nothing_trails():
    assert str(RequestError("fps", -1, "1 to 60")) == "fps must be 1 to 60 (got -1)"
    assert str(CheckpointError("/models", "is empty")) == "/models: is empty."


def test_text_is_quoted_and_a_long_value_is_shortened_once():
    error = RequestError("prompt", "x" * 5000, "at most 512 tokens")
    assert error.given.startswith("'xxx")
    assert error.given.endswith("... (5000 characters)")
    assert len(str(error)) < 250
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_value_that_cannot_be_pickled_does_not_stop_the_error():
    error = RequestError("callback", lambda: None, "nothing")
    assert "lambda" in str(pickle.loads(pickle.dumps(error)))


def test_a_checkpoint_error_names_path_problem_and_remedy(tmp_path):
    error = TensorMismatchError(tmp_path / "a.safetensors", "lacks 3 tensors", "Download it again.")
    assert str(error) == f"{tmp_path / 'a.safetensors'}: lacks 3 tensors. Download it again."
    assert error.path == str(tmp_path / "a.safetensors")


def test_one_clause_catches_all():
    for cls in all_error_classes():
        with pytest.raises(Cosmos3Error):
            raise example(cls)
    with pytest.raises(Cosmos3Error, match="closed"):
        raise ClosedError("closed")
