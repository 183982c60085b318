"""Sets of vids."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepdog.errors import ProtocolError
from sheepdog.model.limits import VID_MAX, VIDS
from sheepdog.model.vid_bitmap import VidBitmap

VIDS_ANYWHERE = st.one_of(st.integers(0, 40), st.integers(VID_MAX - 40, VID_MAX), st.integers(0, VID_MAX))
MEMBERS = st.sets(VIDS_ANYWHERE, max_size=12)


@settings(max_examples=40, deadline=None)
@given(MEMBERS)
def test_members(vids):
    """A bitmap holds what was added, in both orders of iteration, and survives packing."""
    bitmap = VidBitmap(vids)

    assert list(bitmap) == sorted(vids)
    assert list(bitmap.descending()) == sorted(vids, reverse=True)
    assert len(bitmap) == len(vids)
    assert all(vid in bitmap for vid in vids)
    assert VidBitmap.unpack(bitmap.pack()) == bitmap


@settings(max_examples=40, deadline=None)
@given(MEMBERS, st.integers(0, VID_MAX))
def test_first_clear(vids, start):
    """The first clear number is the lowest that is not a member."""
    expected = start
    while expected in vids:
        expected += 1

    assert VidBitmap(vids).first_clear(start) == (expected if expected < VIDS else None)


def test_layout():
    """Vid n is bit n mod 8 of byte n div 8."""
    raw = VidBitmap([0x7C2B25]).pack()

    assert len(raw) == 2097152
    assert raw[0x7C2B25 // 8] == 1 << (0x7C2B25 % 8)
    assert sum(raw) == 1 << (0x7C2B25 % 8)


def test_full():
    """A long run of members is passed; beyond the last number there is none."""
    bitmap = VidBitmap.unpack(b"\xff" * 2097152)
    assert bitmap.first_clear(1) is None
    assert bitmap.first_clear(VID_MAX) is None

    bitmap.discard(0x10003)
    assert bitmap.first_clear(1) == 0x10003


@settings(max_examples=40, deadline=None)
@given(MEMBERS, MEMBERS)
def test_union(one, other):
    """A union has the members of both; a copy is independent."""
    bitmap = VidBitmap(one)
    twin = bitmap.copy()
    twin.update(VidBitmap(other))

    assert set(twin) == one | other
    assert set(bitmap) == one
    twin.clear()
    assert len(twin) == 0


@pytest.mark.parametrize("size", [0, 2097151, 2097153])
def test_bad_size(size):
    """Any other length is no bitmap."""
    with pytest.raises(ProtocolError):
        VidBitmap.unpack(bytes(size))
