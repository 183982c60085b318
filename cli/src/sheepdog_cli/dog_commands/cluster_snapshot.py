"""``dog cluster snapshot``: all snapshots of the cluster in a local directory, and back."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue

from sheepdog.client import admin, volume
from sheepdog.client.connection import Response
from sheepdog.errors import ProtocolError, RequestError, SheepdogError, TransportError
from sheepdog.model.farm import SnapshotLog, SnapshotRecord, TrunkEntry
from sheepdog.model.hashing import vdi_hash
from sheepdog.model.ids import data_oid, inode_oid, is_inode, object_bytes, vid_of, vmstate_oid
from sheepdog.model.inode import InodeHeader
from sheepdog_cli.dog_commands.common import complain_object
from sheepdog_cli.dog_commands.farm import Farm, FarmError
from sheepdog_cli.dog_commands.farm_references import LoadedReferences
from sheepdog_cli.dog_commands.vdi_alter_copy import VDI_STATE_VARIANT
from sheepdog_cli.dog_commands.vdi_walk import walk
from sheepdog_cli.output import Progress, print_json
from sheepdog_cli.session import (
    EXIT_SYSTEM,
    RESULT_SUCCESS,
    Quit,
    Session,
    Usage,
    complain,
    describe,
    fail,
    misuse,
    name_bytes,
    name_text,
)
from sheepdog_cli.sizes import parse_decimal

OP_NOTIFY_VDI_DEL = 0x99
OP_NOTIFY_VDI_ADD = 0xAF
VDIS_MAX = (1 << 24) - 1  # numbers are 1 to this
THREADS = 8


def run(session: Session) -> None:
    if not session.nested:
        raise Usage
    {"save": _save, "list": _list, "show": _show, "load": _load}[session.nested[0]](session)


def _arguments(session: Session, word: str) -> tuple[str, str, list[bytes]]:
    """(tag or index, path, names of vdis)."""
    tag, path = session.arguments[0], session.argument(1)
    if not path:
        misuse(f"Please specify the path to {word} snapshot.")
    return tag, path, [name_bytes(name) for name in session.arguments[2:]]


def _open_farm(path: str, last_line: str | None) -> Farm:
    try:
        return Farm(path)
    except FarmError as error:
        for line in str(error).splitlines():
            complain(line)
    complain("Fail to init farm.")
    if last_line is not None:
        complain(last_line)
    raise Quit(EXIT_SYSTEM)


# --- save ---


def _save(session: Session) -> None:
    if session.arguments[0][:1].isdigit():
        misuse("Tag should not start with number.")
    tag, path, names = _arguments(session, "save")
    failed = f"Fail to save snapshot to path: {path}."
    farm = _open_farm(path, failed)
    if farm.find(name_bytes(tag)) is not None:
        complain("Snapshot tag has already been used for another snapshot, please, use another one.")
        fail(failed, EXIT_SYSTEM)
    headers: list[InodeHeader] = []
    objects: dict[int, InodeHeader] = {}
    for walked in walk(session, maps=True):
        header = walked.header
        if not header.is_snapshot or (names and header.name not in names):
            continue
        headers.append(header)
        for index, owner in walked.items():
            objects.setdefault(data_oid(owner, index), header)
        for number in range((header.vm_state_size + (1 << header.block_size_shift) - 1) >> header.block_size_shift):
            objects[vmstate_oid(header.vdi_id, number)] = header
    if not headers:
        complain("Cannot execute. It may be caused by:")
        if names:
            complain("1. The specified VDIs are not found.")
            complain("2. The specified VDIs don't have snapshots.")
        else:
            complain("1. The cluster is empty.")
            complain("2. All VDIs of the cluster don't have snapshots.")
        fail(failed, EXIT_SYSTEM)
    for header in headers:
        objects[inode_oid(header.vdi_id)] = header
    try:
        info = admin.cluster_info(session.call)
        entries = _save_objects(session, farm, objects)
        defaults = SnapshotLog(info.copies, info.copy_policy, info.block_size_shift)
        farm.add(defaults, name_bytes(tag), int(time.time()), entries)
    except (SheepdogError, FarmError) as error:
        complain_object(error)
        if isinstance(error, FarmError):
            complain(str(error))
        fail(failed, EXIT_SYSTEM)


def _save_objects(session: Session, farm: Farm, objects: dict[int, InodeHeader]) -> list[TrunkEntry]:
    progress = Progress(len(objects), count=True)
    threads = THREADS if "multithread" in session.options else 1
    calls = _Calls(session, threads)
    entries = []

    def save(item: tuple[int, InodeHeader]) -> TrunkEntry:
        oid, header = item
        with calls.borrow() as call:
            data = volume.read_object(call, oid, object_bytes(oid, header.block_size_shift))
        digest = farm.store_object(data)
        return TrunkEntry(oid, header.nr_copies, header.copy_policy, header.block_size_shift, digest)

    with calls, ThreadPoolExecutor(threads) as pool:
        for entry in pool.map(save, objects.items()):
            entries.append(entry)
            progress.advance(1)
    return entries


class _Calls:
    """One connection per thread; the first is the session's own."""

    def __init__(self, session: Session, threads: int) -> None:
        self._free: SimpleQueue[admin.Call] = SimpleQueue()
        self._opened = [session.open() for _ in range(threads - 1)]
        self._free.put(session.call)
        for connection in self._opened:
            self._free.put(connection.request)

    @contextmanager
    def borrow(self) -> Iterator[admin.Call]:
        call = self._free.get()
        try:
            yield call
        finally:
            self._free.put(call)

    def __enter__(self) -> _Calls:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._opened:
            connection.close()


# --- list, show ---


def _list(session: Session) -> None:
    farm = _open_farm(session.arguments[0], None)
    records = farm.log.records
    if session.options.json:
        print_json([{"index": one.index, "tag": name_text(one.tag), "time": one.time} for one in records])
        return
    out = sys.stdout.write
    out("Index\t\tTag\t\tSnapshot Time\n")
    for one in records:
        out(f"{one.index}\t\t{name_text(one.tag)}\t\t{time.asctime(time.localtime(one.time))}\n")


def _find(farm: Farm, text: str) -> SnapshotRecord | None:
    number = parse_decimal(text, 1, 1 << 31)
    return farm.find(name_bytes(text)) if number is None else farm.at(number)


def _inodes(farm: Farm, entries: Sequence[TrunkEntry]) -> Iterator[tuple[TrunkEntry, InodeHeader]]:
    """The inodes of a saved state, by VDI id."""
    for entry in sorted((one for one in entries if is_inode(one.oid)), key=lambda one: one.oid):
        yield entry, InodeHeader.unpack(farm.load_head(entry.digest))


def _show(session: Session) -> None:
    failed = "Fail to show snapshot"
    text, path, names = _arguments(session, "show")
    farm = _open_farm(path, failed)
    record = _find(farm, text)
    if record is None:
        complain("Snapshot index or tag does not exist.")
        fail(failed, EXIT_SYSTEM)
    try:
        headers = [header for _, header in _inodes(farm, farm.trunk(record)) if header.name]
        if names:
            headers = [header for header in headers if header.name in names]
    except (FarmError, ProtocolError) as error:
        complain(str(error))
        fail(failed, EXIT_SYSTEM)
    if session.options.json:
        print_json(
            [{"vid": f"{one.vdi_id:x}", "name": name_text(one.name), "tag": name_text(one.tag)} for one in headers]
        )
        return
    for number, header in enumerate(headers, 1):
        complain(f"{number}. VDI id: {header.vdi_id:x}, name: {name_text(header.name)}, tag: {name_text(header.tag)}")


# --- load ---


def _load(session: Session) -> None:
    from sheepdog_cli.dog_commands.cluster_format import DEFAULT_STORE, format_cluster

    failed = "Fail to load snapshot"
    text, path, names = _arguments(session, "save")
    farm = _open_farm(path, failed)
    record = _find(farm, text)
    if record is None:
        complain("Snapshot index or tag does not exist.")
        fail(failed, EXIT_SYSTEM)
    try:
        entries: Sequence[TrunkEntry] = farm.trunk(record)
        headers = {entry.oid: header for entry, header in _inodes(farm, entries)}
        if names:
            entries = _select(farm, entries, headers, names)
    except (FarmError, ProtocolError) as error:
        complain(str(error))
        fail(failed, EXIT_SYSTEM)
    if names and not entries:
        complain("Objects of specified VDIs are not found in local cluster snapshot storage.")
        fail(failed, EXIT_SYSTEM)
    log = farm.log
    format_cluster(
        session,
        store=DEFAULT_STORE,
        copies=log.copies,
        policy=log.copy_policy,
        shift=log.block_size_shift,
        flags=0,
        fixed=None,
        force=False,
    )
    try:
        _load_objects(session, farm, entries)
        loaded = [headers[entry.oid] for entry in entries if entry.oid in headers]
        _bury(session, loaded)
        _resume(session, loaded)
    except (SheepdogError, FarmError) as error:
        complain_object(error)
        if not isinstance(error, TransportError):
            complain(str(error))
        fail(failed, EXIT_SYSTEM)


def _select(
    farm: Farm, entries: Sequence[TrunkEntry], headers: dict[int, InodeHeader], names: list[bytes]
) -> list[TrunkEntry]:
    """The inodes of the named vdis and the data objects that they refer to."""
    wanted: set[int] = set()
    for entry in entries:
        header = headers.get(entry.oid)
        if header is not None and header.name in names:
            wanted.add(entry.oid)
            inode = volume.Inode(_no_call, bytearray(farm.load_object(entry.digest)))
            wanted.update(data_oid(owner, index) for index, owner in inode.map.items())
    return [entry for entry in entries if entry.oid in wanted]


def _no_call(*_: object, **__: object) -> Response:
    raise ProtocolError("an inode of a saved state has no cluster behind it")


def _load_objects(session: Session, farm: Farm, entries: Sequence[TrunkEntry]) -> None:
    references = LoadedReferences()
    for entry in entries:
        if is_inode(entry.oid):
            references.add(farm.load_object(entry.digest))
    progress = Progress(len(entries), count=True)
    threads = THREADS if "multithread" in session.options else 1
    announced: dict[int, TrunkEntry] = {}
    for entry in entries:
        announced.setdefault(vid_of(references.oid(entry.oid)), entry)
    for vid, entry in sorted(announced.items()):
        # Before its first object: it tells every sheep how many copies the objects of this vdi have.
        variant = VDI_STATE_VARIANT.pack(0, vid, entry.copies, 1, entry.copy_policy, entry.block_size_shift)
        response = session.call(OP_NOTIFY_VDI_ADD, variant=variant)
        if response.result != RESULT_SUCCESS:
            raise RequestError(describe(response.result), result=response.result)
    calls = _Calls(session, threads)

    def load(entry: TrunkEntry) -> None:
        data: bytes | bytearray = farm.load_object(entry.digest)
        if is_inode(entry.oid):
            data = references.renewed(data)
        with calls.borrow() as call:
            volume.write_object(
                call,
                references.oid(entry.oid),
                data,
                copies=entry.copies,
                policy=entry.copy_policy,
                create=True,
                flags=volume.FLAG_DIRECT,
            )

    # Inodes last: whoever sees one can read its objects.
    ordered = sorted(entries, key=lambda entry: is_inode(entry.oid))
    with calls, ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(load, ordered):
            progress.advance(1)


def _bury(session: Session, headers: list[InodeHeader]) -> None:
    """Numbers between the first of a name and those that were loaded are used, as they were in the saved cluster.

    A name is looked for from its hash up to the first free number. What had the numbers between was deleted, or is not
    loaded; like any deleted vdi it gets an inode without a name.
    """
    have = {header.vdi_id for header in headers}
    for header in headers:
        vid = vdi_hash(header.name) or 1
        while header.name and vid != header.vdi_id:
            if vid not in have:
                have.add(vid)
                _bury_one(session, vid, header)
            vid = vid % VDIS_MAX + 1


def _bury_one(session: Session, vid: int, like: InodeHeader) -> None:
    copies, policy, shift = like.nr_copies, like.copy_policy, like.block_size_shift
    variant = VDI_STATE_VARIANT.pack(0, vid, copies, 1, policy, shift)
    session.simple(OP_NOTIFY_VDI_ADD, variant=variant)
    nobody = InodeHeader(nr_copies=copies, copy_policy=policy, block_size_shift=shift, vdi_id=vid)
    volume.write_object(session.call, inode_oid(vid), nobody.pack(), copies=copies, policy=policy, create=True)
    session.simple(OP_NOTIFY_VDI_DEL, body=vid.to_bytes(4, "little"))


def _resume(session: Session, headers: list[InodeHeader]) -> None:
    """Every name has a working vdi on top of its newest snapshot."""
    newest: dict[bytes, InodeHeader] = {}
    for header in headers:
        if header.name and (header.name not in newest or newest[header.name].snap_id < header.snap_id):
            newest[header.name] = header
    for name, header in sorted(newest.items()):
        volume.create_vdi(
            session.call,
            name,
            size=header.vdi_size,
            base_vid=header.vdi_id,
            copies=header.nr_copies,
            policy=header.copy_policy,
            store_policy=header.store_policy,
            shift=header.block_size_shift,
        )
