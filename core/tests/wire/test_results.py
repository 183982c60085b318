"""Result codes, their strings and their errors."""

import pytest

from sheepdog import errors
from sheepdog.errors import RequestError, SheepdogError
from sheepdog.wire.results import Result, describe, error_for

FAILURES = [code for code in Result if code is not Result.SUCCESS]


def every_error():
    found = [SheepdogError]
    for made in found:
        found.extend(made.__subclasses__())
    return [made for made in found if made.__module__ == errors.__name__]


@pytest.mark.parametrize("code", FAILURES)
def test_code_survives(code):
    """An error made from a result carries that result, and a text."""
    error = error_for(code)

    assert error.result == code
    assert str(error) == describe(code)
    assert str(error_for(code, "lost")) == "lost"


def test_classes_in_step():
    """Every class of the error tree stands for a result code that the protocol has."""
    for made in every_error():
        assert Result(made.result) is not Result.SUCCESS


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Result.NO_OBJ, errors.ObjectNotFound),
        (Result.NO_VDI, errors.VdiNotFound),
        (Result.NO_TAG, errors.TagNotFound),
        (Result.VDI_EXIST, errors.VdiExists),
        (Result.VDI_LOCKED, errors.VdiLocked),
        (Result.READONLY, errors.ReadOnlyObject),
        (Result.HALT, errors.Halted),
        (Result.NO_SPACE, errors.StoreFull),
        (Result.INVALID_PARMS, errors.InvalidParameters),
        (Result.NETWORK_ERROR, errors.TransportError),
        (Result.CLUSTER_ERROR, errors.ClusterError),
        (Result.AGAIN, RequestError),
    ],
)
def test_classes(code, kind):
    """Callers tell results apart by class."""
    assert type(error_for(code)) is kind


def test_unknown_code():
    """A code that nobody knows is an error all the same."""
    error = error_for(0x96)

    assert isinstance(error, RequestError)
    assert error.result == 0x96


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0x00, "Success"),
        (0x1D, "Inode object is invalidated"),
        (0x89, "Cluster is running/halted and cannot be force recovered"),
        (0x98, "Invalid cluster vnodes strategy"),
        (0x95, "Invalid error code 95"),
        (0x92, "Invalid error code 92"),
        (0x1B, "Invalid error code 1b"),
        (0x1234, "Invalid error code 1234"),
    ],
)
def test_strings(code, text):
    """The strings are those that dog prints."""
    assert describe(code) == text
