"""What a voter keeps on disk, and what crashes and damages do to it."""

from __future__ import annotations

import pytest

from sheepdog_cluster_raft.journal import FRAME, DurableJournal, JournalDamaged, write_snapshot

ME = "10.0.0.1:4"


def opened(directory) -> DurableJournal:
    return DurableJournal(directory, ME)


def filled(directory, count: int = 6) -> DurableJournal:
    journal = opened(directory)
    for index in range(1, count + 1):
        journal.add(b"entry %d" % index, index, 1)
    journal.setCurrentTerm(7, "10.0.0.2:4")
    journal.sync()
    return journal


def entries(journal) -> list[int]:
    return [index for _, index, _ in journal[:]]


def test_everything_comes_back(tmp_path):
    """Entries, cuts, term and vote are as they were before the process died."""
    journal = filled(tmp_path)
    journal.deleteEntriesFrom(4)
    journal.add(b"other", 5, 2)
    journal.sync()
    again = opened(tmp_path)

    assert again[:] == [*((b"entry %d" % i, i, 1) for i in range(1, 5)), (b"other", 5, 2)]
    assert (again.getCurrentTerm(), again.getVotedForNodeId()) == (7, "10.0.0.2:4")
    assert again[-1] == (b"other", 5, 2) and len(again) == 5


def test_not_synced(tmp_path):
    """What nobody was told of may be lost; nothing else is."""
    journal = filled(tmp_path)
    journal.add(b"late", 7, 1)
    journal.setCurrentTerm(8, None)

    assert entries(opened(tmp_path)) == [1, 2, 3, 4, 5, 6]
    assert opened(tmp_path).getCurrentTerm() == 7


def test_torn_append(tmp_path):
    """A crash at any byte of an append leaves what was there before it."""
    filled(tmp_path)
    path = tmp_path / "journal"
    before = path.read_bytes()
    journal = opened(tmp_path)
    before = path.read_bytes()
    journal.add(b"torn", 7, 1)
    journal.sync()
    after = path.read_bytes()
    assert after.startswith(before)
    for end in range(len(before), len(after)):
        path.write_bytes(after[:end])
        assert entries(opened(tmp_path)) == [1, 2, 3, 4, 5, 6], f"cut after {end} bytes"
    path.write_bytes(after[: len(before)] + bytes(len(after) - len(before)))

    assert entries(opened(tmp_path)) == [1, 2, 3, 4, 5, 6], "zeroes where the append was to be"


def test_appended_after_a_torn_end(tmp_path):
    """The torn end is gone, so what is appended next is found."""
    filled(tmp_path)
    path = tmp_path / "journal"
    path.write_bytes(path.read_bytes() + FRAME.pack(100, 0) + b"part")
    journal = opened(tmp_path)
    journal.add(b"next", 7, 1)
    journal.sync()

    assert entries(opened(tmp_path)) == [1, 2, 3, 4, 5, 6, 7]


def test_damage_is_refused(tmp_path):
    """A damaged entry with sound ones behind it is no torn end: others count on what is there."""
    filled(tmp_path)
    path = tmp_path / "journal"
    data = bytearray(path.read_bytes())
    data[data.index(b"entry 3")] ^= 1
    path.write_bytes(data)
    with pytest.raises(JournalDamaged, match="is damaged at byte"):
        opened(tmp_path)

    assert path.read_bytes() == data


@pytest.mark.parametrize("content", [b"something else", b"\0" * 100])
def test_foreign_file(tmp_path, content):
    """A file that is no journal is refused, and stays as it is."""
    (tmp_path / "journal").write_bytes(content)
    with pytest.raises(JournalDamaged, match="not written by this driver"):
        opened(tmp_path)

    assert (tmp_path / "journal").read_bytes() == content


def test_another_voter(tmp_path):
    """The vote of one voter is not that of another one."""
    filled(tmp_path)
    with pytest.raises(JournalDamaged, match=r"belongs to the voter 10.0.0.1:4"):
        DurableJournal(tmp_path, "10.0.0.9:4")


def snapshot(directory, last: int) -> None:
    fields = [[b"entry %d" % index, index, 1] for index in (last - 1, last)]
    write_snapshot(directory / "snapshot", [*fields, "state"])


def test_compacted(tmp_path):
    """Entries that a snapshot replaces are gone; the others, term and vote stay."""
    journal = filled(tmp_path)
    snapshot(tmp_path, 4)
    journal.deleteEntriesTo(2)
    journal.add(b"entry 7", 7, 1)
    journal.sync()
    again = opened(tmp_path)

    assert entries(again) == [3, 4, 5, 6, 7]
    assert again.getVotedForNodeId() == "10.0.0.2:4"


def test_crash_before_compaction(tmp_path):
    """A crash between the snapshot and the removal of what it replaces costs no entry behind it."""
    filled(tmp_path)
    snapshot(tmp_path, 4)

    assert entries(opened(tmp_path)) == [3, 4, 5, 6]


def test_replaced(tmp_path):
    """After a leader's snapshot replaced the whole log, the log begins with it."""
    journal = filled(tmp_path)
    snapshot(tmp_path, 20)
    journal.clear()
    for index in (19, 20):
        journal.add(b"entry %d" % index, index, 1)
    journal.sync()

    assert entries(opened(tmp_path)) == [19, 20]


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_snapshot_lost(tmp_path, damage):
    """A log whose beginning is in a snapshot that is not there is none."""
    journal = filled(tmp_path)
    snapshot(tmp_path, 4)
    journal.deleteEntriesTo(2)
    if damage == "missing":
        (tmp_path / "snapshot").unlink()
    else:
        (tmp_path / "snapshot").write_bytes(b"x" * 40)
    with pytest.raises(JournalDamaged, match=damage):
        opened(tmp_path)
