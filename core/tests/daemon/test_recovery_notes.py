"""What recovery remembers over a restart."""

from __future__ import annotations

import random

from sheepdog.daemon import recovery_notes
from sheepdog.daemon.recovery_notes import FileNotes


def test_removals_survive_a_kill(tmp_path):
    """Removals are there for the next process though the last one closed nothing; objects made again are not."""
    notes = FileNotes(str(tmp_path))
    notes.note_removal(1, 5)
    notes.note_removal(2, 6)
    notes.forget_removal(1)
    notes.note_removal(3, 6)
    notes.note_removal(3, 7)

    again = FileNotes(str(tmp_path))
    assert again.removed == {2: 6, 3: 7}

    again.forget_removals()
    assert FileNotes(str(tmp_path)).removed == {}


def test_removals_are_bounded(tmp_path, monkeypatch):
    """However often objects go and come, the file says what is true and does not grow; too many are not noted."""
    monkeypatch.setattr(recovery_notes, "REMOVALS_MAX", 64)
    rng = random.Random(1)
    notes = FileNotes(str(tmp_path))
    size = (tmp_path / "recovery.removed").stat().st_size
    for step in range(1, 2000):
        if len(notes.removed) < 30 and rng.random() < 0.6:
            notes.note_removal(rng.randrange(1000), step)
        elif notes.removed:
            notes.forget_removal(rng.choice(list(notes.removed)))
        if step % 97 == 0:
            assert FileNotes(str(tmp_path)).removed == notes.removed
    for oid in range(2000, 2100):
        notes.note_removal(oid, 1)

    noted = FileNotes(str(tmp_path)).removed
    assert len(noted) <= 64 and noted.items() <= notes.removed.items()
    assert (tmp_path / "recovery.removed").stat().st_size == size
    notes.forget_removal(2050)
    assert 2050 not in FileNotes(str(tmp_path)).removed


def test_a_damaged_list_of_removals_is_harmless(tmp_path):
    """A count beyond the end of the file is taken for the end."""
    FileNotes(str(tmp_path)).close()
    with open(tmp_path / "recovery.removed", "r+b") as file:
        file.write(b"\xff" * 8)

    assert FileNotes(str(tmp_path)).removed == {}
