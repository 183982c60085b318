"""``dog vdi lock``: who holds which vdi."""

from __future__ import annotations

import sys

from sheepdog.client import admin, volume
from sheepdog.errors import ProtocolError, RequestError, TransportError
from sheepdog.model.node import NodeId
from sheepdog.model.vdi_state import LockState, SharedState, VdiState
from sheepdog_cli.dog_commands.common import flag_of
from sheepdog_cli.dog_commands.vdi_walk import walk
from sheepdog_cli.output import print_json
from sheepdog_cli.session import (
    EXIT_SYSTEM,
    RESULT_EIO,
    Quit,
    Session,
    Usage,
    complain,
    describe,
    fail,
    misuse,
    name_bytes,
    name_text,
    pad,
)
from sheepdog_cli.values import NO_SELECTOR, Selector

OP_RELEASE_VDI = 0x13
LOCK_NORMAL = 0
LOCK_SHARED = 1
HEADING = "  Name         Id  VDI id  Tag            Owner node(s)\n"


def run(session: Session) -> None:
    if not session.nested:
        raise Usage
    if session.nested[0] == "list":
        _list(session)
    else:
        _unlock(session)


def node_text(node: NodeId) -> str:
    """A node as the daemon's log spells it."""
    host = node.host
    return f"IPv{6 if ':' in host else 4} ip:{host} port:{node.port}"


def _states(session: Session) -> dict[int, VdiState]:
    try:
        return {state.vid: state for state in admin.vdi_states(session.call)}
    except (RequestError, ProtocolError) as error:
        complain(str(error))
    except TransportError:
        pass  # said already
    fail("Failed to get VDI state", EXIT_SYSTEM)


def _owners(state: VdiState) -> list[tuple[NodeId, str]]:
    if state.lock_state is LockState.LOCKED and state.owner is not None:
        return [(state.owner, "")]
    names = {SharedState.MODIFIED: "modified", SharedState.SHARED: "shared", SharedState.INVALIDATED: "invalidated"}
    return [(one.node, names[one.state]) for one in state.participants]


def _list(session: Session) -> None:
    states = _states(session)
    out = sys.stdout.write
    if not session.options.json:
        out(HEADING)
    documents = []
    for walked in walk(session, maps=True):
        header = walked.header
        state = states.get(header.vdi_id)
        if state is None or state.lock_state is LockState.UNLOCKED:
            continue
        snap_id = header.snap_id if header.is_snapshot else 0
        name, tag = name_text(header.name), name_text(header.tag)
        owners = _owners(state)
        if session.options.json:
            documents.append(
                {
                    "name": name,
                    "snap_id": snap_id,
                    "vid": f"{header.vdi_id:x}",
                    "tag": tag,
                    "shared": state.lock_state is LockState.SHARED,
                    "owners": [{"host": node.host, "port": node.port, "state": word} for node, word in owners],
                }
            )
            continue
        out(f"{flag_of(header)} {pad(name, 8)}  {snap_id:5d}  {header.vdi_id:6x}  {pad(tag, 13)} ")
        for node, word in owners:
            out(f" {node_text(node)}" + (f"({word})" if word else ""))
        out("\n")
    if session.options.json:
        print_json(documents)


def _description(name: str, selector: Selector, vid: int | None) -> str:
    parts = []
    if selector.tag:
        parts.append(f"tag={name_text(selector.tag)}")
    elif selector.snap_id:
        parts.append(f"snapid={selector.snap_id}")
    if vid is not None:
        parts.append(f"vid={vid:x}")
    return f"{name} ({', '.join(parts)})" if parts else name


def _unlock(session: Session) -> None:
    name = session.argument(0)
    if not name:
        misuse("VDI name must be specified")
    selector = session.options.get("snapshot", NO_SELECTOR)
    try:
        vid = volume.find_vdi(session.call, name_bytes(name), snap_id=selector.snap_id, tag=selector.tag).vid
    except RequestError as error:
        fail(f"Failed to find VDI {_description(name, selector, None)}: {error}")
    except TransportError:
        fail(f"Failed to find VDI {_description(name, selector, None)}: {describe(RESULT_EIO)}")
    state = _states(session).get(vid)
    if state is None or state.lock_state is LockState.UNLOCKED:
        fail(f"VDI {_description(name, selector, vid)} is not locked")
    kind = LOCK_NORMAL if state.lock_state is LockState.LOCKED else LOCK_SHARED
    try:
        session.simple(OP_RELEASE_VDI, variant=volume.pack_vdi_variant(base_vid=vid, lock_type=kind))
    except (RequestError, TransportError):
        raise Quit(1) from None
