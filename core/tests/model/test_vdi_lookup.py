"""The way from names to numbers."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepdog.errors import RequestError, StoreError, TagNotFound, VdiNotFound
from sheepdog.model.inode import InodeHeader
from sheepdog.model.vdi_lookup import Outcome, lookup, run
from sheepdog.model.vid_bitmap import VidBitmap
from sheepdog.testing.vectors import vectors


class Numbers:
    """What a daemon does with lookups: numbers in use and the headers behind them."""

    def __init__(self, recycle=False):
        self.recycle = recycle
        self.in_use, self.deleted = VidBitmap(), VidBitmap()
        self.headers = {}
        self.gone = set()
        self.reads = []

    def read(self, vid):
        self.reads.append(vid)
        return self.headers[vid]

    def find(self, name, tag="", snap_id=0):
        steps = lookup(
            name.encode(), tag.encode(), snap_id, in_use=self.in_use, deleted=self.deleted, recycle=self.recycle
        )
        return run(steps, self.read)

    def add(self, vid, header):
        self.headers[vid] = header
        self.in_use.add(vid)
        return vid

    def create(self, name, parent=0):
        found = self.find(name)
        if found.outcome is not Outcome.NO_VDI:
            return None
        snap_id = 1 if parent and self.headers[parent].name != name.encode() else found.next_snap_id
        header = InodeHeader(name.encode(), snap_id=snap_id, vdi_id=found.free, parent_vdi_id=parent)
        return self.add(found.free, header)

    def snapshot(self, name, tag):
        found = self.find(name)
        vid, header = found.found()
        self.headers[vid] = replace(header, tag=tag.encode(), snap_ctime=1)
        new = InodeHeader(name.encode(), snap_id=header.snap_id + 1, vdi_id=found.free, parent_vdi_id=vid)
        return vid, self.add(found.free, new)

    def delete(self, name, tag=""):
        vid, header = self.find(name, tag).found()
        self.headers[vid] = replace(header, name=b"", vdi_size=0)
        self.deleted.add(vid)
        self.gone.add(vid)
        if self.recycle:
            self.reclaim(vid)

    def reclaim(self, vid):
        """Numbers of a family are given back once all of it is deleted."""
        while self.headers[vid].parent_vdi_id:
            vid = self.headers[vid].parent_vdi_id
        family = {vid}
        while True:
            more = {one for one, header in self.headers.items() if header.parent_vdi_id in family} - family
            if not more:
                break
            family |= more
        if family <= self.gone:
            for one in family:
                self.in_use.discard(one)
                self.deleted.discard(one)
                self.gone.discard(one)
                del self.headers[one]


@pytest.mark.parametrize("number", range(5))
def test_recorded(number):
    """Every vdi gets the number that it got in the original, and what remains is what the original listed."""
    scenario = vectors()["vdi_numbering"][number]
    numbers = Numbers(recycle="-R" in scenario["format_options"])
    for op in scenario["ops"]:
        name, tag = op["name"], op.get("tag", "")
        if op["op"] == "create":
            made = numbers.create(name)
            assert (made is None) == (op["vid"] is None) == (op["exit"] != 0)
            if made is not None:
                assert made == int(op["vid"], 16)
        elif op["op"] == "snapshot":
            assert numbers.snapshot(name, tag) == (int(op["snapshot_vid"], 16), int(op["new_working_vid"], 16))
        elif op["op"] == "clone":
            base, _ = numbers.find(name, tag).found()
            assert numbers.create(op["new_name"], base) == int(op["vid"], 16)
        elif op["op"] == "rollback":
            base, _ = numbers.find(name, tag).found()
            numbers.delete(name)
            assert numbers.create(name, base) == int(op["vid"], 16)
        else:
            assert op["op"] == "delete"
            numbers.delete(name, tag)

    left = []
    for vid, header in sorted(numbers.headers.items()):
        if header.name:
            kind = "snapshot" if header.is_snapshot else "clone" if header.is_clone else "working"
            snap_id = header.snap_id if header.is_snapshot else 0
            left.append((kind, header.name.decode(), snap_id, header.tag.decode(), f"{vid:x}"))
    listed = [(row["kind"], row["name"], row["snap_id"], row["tag"], row["vid"]) for row in scenario["list_after"]]
    assert sorted(left) == sorted(listed)


def test_newest_first():
    """The working VDI of a name is met before its snapshots, so opening it reads one header."""
    numbers = Numbers()
    numbers.create("test")
    for tag in "abc":
        numbers.snapshot("test", tag)
    numbers.reads.clear()

    assert numbers.find("test").found()[0] == 0x7C2B28
    assert numbers.reads == [0x7C2B28]


def test_tag_or_id():
    """A tag and a snapshot id given together match if either does."""
    numbers = Numbers()
    numbers.create("test")
    numbers.snapshot("test", "a")
    numbers.snapshot("test", "b")

    assert numbers.find("test", "a").found()[0] == 0x7C2B25
    assert numbers.find("test", "", 2).found()[0] == 0x7C2B26
    assert numbers.find("test", "a", 2).found()[0] == 0x7C2B26
    assert numbers.find("test", "nope", 1).found()[0] == 0x7C2B25


def test_unknown_tag():
    """An unknown tag is told from an unknown name only while the name has a working VDI."""
    numbers = Numbers()
    numbers.create("test")
    numbers.snapshot("test", "a")

    assert numbers.find("test", "zz").outcome is Outcome.NO_TAG
    with pytest.raises(TagNotFound):
        numbers.find("test", "zz").found()
    numbers.delete("test")
    assert numbers.find("test", "zz").outcome is Outcome.NO_VDI
    assert numbers.find("test", "a").outcome is Outcome.FOUND


def test_deleted_head():
    """A name that has only snapshots left is free again, and its line of snapshot ids goes on."""
    numbers = Numbers()
    numbers.create("test")
    numbers.snapshot("test", "a")
    numbers.delete("test")

    found = numbers.find("test")

    assert (found.outcome, found.vid, found.next_snap_id, found.free) == (Outcome.NO_VDI, 0x7C2B25, 2, 0x7C2B27)
    with pytest.raises(VdiNotFound):
        found.found()


def test_no_read_for_unknown():
    """A name whose number is free needs no read at all."""
    numbers = Numbers()

    found = numbers.find("test")

    assert (found.outcome, found.free, found.next_snap_id, numbers.reads) == (Outcome.NO_VDI, 0x7C2B25, 1, [])


def test_unreadable():
    """A header that cannot be read ends the lookup with that error, never with "no such vdi"."""
    numbers = Numbers()
    numbers.create("test")
    steps = lookup(b"test", b"", 0, in_use=numbers.in_use)

    assert next(steps) == 0x7C2B25
    with pytest.raises(StoreError):
        steps.throw(StoreError("lost"))


@pytest.mark.parametrize("recycle", [False, True])
def test_full(recycle):
    """When every number is in use there is a result of its own."""
    numbers = Numbers(recycle)
    numbers.in_use = VidBitmap.unpack(b"\xff" * 2097152)

    found = numbers.find("test")

    assert found.outcome is Outcome.FULL
    with pytest.raises(RequestError) as caught:
        found.found()
    assert caught.value.result == 0x13


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["zf0b95a", "z35002cb", "wb5b727", "w23e9da9", "test"]), max_size=12), st.booleans())
def test_finds_what_was_made(names, recycle):
    """However names collide and wrap around, each is found under the number it got."""
    numbers = Numbers(recycle)
    made = {}
    for name in names:
        vid = numbers.create(name)
        assert (vid is None) == (name in made)
        made.setdefault(name, vid)

    assert {name: numbers.find(name).found()[0] for name in made} == made
    assert len(set(made.values())) == len(made)
    assert 0 not in made.values()
