"""``dog cluster format``: makes the cluster new and empty."""

from __future__ import annotations

import sys

from sheepdog.client import admin
from sheepdog.errors import ProtocolError, RequestError, TransportError
from sheepdog.model.node import VnodeMode
from sheepdog_cli.output import QUESTION, confirm, confirm_banner
from sheepdog_cli.session import EXIT_SYSTEM, RESULT_SUCCESS, Quit, Session, complain, describe, fail

OP_MAKE_FS = 0x84
OP_GET_STORE_LIST = 0x90
STORE_LIST_BYTES = 512
RESULT_NO_STORE = 0x8A
COPIES_DEFAULT = 3
DEFAULT_STORE = "plain"
STATUS_OF_ANY_FIXED = "there are vnode strategy of sheep is"


def run(session: Session) -> None:
    options = session.options
    redundancy = options.get("copies")
    flags = 0
    for name, flag in (
        ("strict", admin.FLAG_STRICT),
        ("lock", admin.FLAG_USE_LOCK),
        ("recyclevid", admin.FLAG_RECYCLE_VID),
        ("avoid-diskfull", admin.FLAG_AVOID_DISKFULL),
    ):
        if name in options:
            flags |= flag
    format_cluster(
        session,
        store=options.get("store", DEFAULT_STORE),
        copies=redundancy.copies if redundancy else 0,
        policy=redundancy.policy if redundancy else 0,
        shift=options.get("block_size_shift", 0),
        flags=flags,
        fixed="fixedvnodes" in options,
        force=options.force,
    )


def format_cluster(
    session: Session,
    *,
    store: str,
    copies: int,
    policy: int,
    shift: int,
    flags: int,
    fixed: bool | None,
    force: bool,
) -> None:
    """The cluster is new and empty, after the questions that were due.

    :param copies: 0 for the daemon's default.
    :param fixed: whether the numbers of virtual nodes are fixed; ``None``: as the sheep were started.
    :raises Quit: declined or refused; said.
    """
    if not check_vnode_strategy(session, fixed):
        flags |= admin.FLAG_AUTO_VNODES
    if session.mode is VnodeMode.DISK:
        flags |= admin.FLAG_DISK_MODE
    zones = len({node.zone for node in session.nodes if node.vnodes})
    if copies > zones:
        confirm(f"Number of copies ({copies}) is larger than number of zones ({zones}).\n{QUESTION}")
    try:
        used = admin.any_vid(session.call)
        if used and not force:
            confirm_banner("Caution! The cluster is not empty.")
    except (TransportError, RequestError) as error:
        if isinstance(error, RequestError):
            complain(str(error))
        fail("Format failed: I/O error", EXIT_SYSTEM)
    sys.stdout.write(f"using backend {store} store\n")
    sys.stdout.flush()
    import time

    from sheepdog.model.timestamps import pack_time

    variant = admin.pack_cluster_variant(
        ctime=pack_time(time.time()), copies=copies, policy=policy, flags=flags, shift=shift
    )
    try:
        response = session.call(OP_MAKE_FS, variant=variant, body=store.encode() + b"\0")
    except TransportError:
        fail("Format failed: I/O error", EXIT_SYSTEM)
    if response.result == RESULT_SUCCESS:
        return
    complain(f"Format failed: {describe(response.result)}")
    if response.result == RESULT_NO_STORE:
        _print_stores(session)
    raise Quit(EXIT_SYSTEM)


def check_vnode_strategy(session: Session, fixed: bool | None) -> bool:
    """Every storage node was started with the strategy that the format asks for. Whether that is the fixed one.

    :param fixed: ``None`` if any will do that all of them have.
    :raises Quit: some was not; said.
    """
    for node in session.nodes:
        try:
            info = admin.cluster_info(lambda opcode, node=node, **rest: session.call(opcode, node=node, **rest))
        except (TransportError, RequestError, ProtocolError) as error:
            if not isinstance(error, TransportError):
                complain(str(error))
            fail("Failed to get cluster information", EXIT_SYSTEM)
        if node.vnodes == 0:
            continue
        auto = bool(info.flags & admin.FLAG_AUTO_VNODES)
        if fixed is None:
            fixed = not auto
        if fixed and auto:
            fail(f"Can not apply the option of '-V', because {STATUS_OF_ANY_FIXED} auto in the cluster")
        if not fixed and not auto:
            fail(f"Need to specify the option of '-V', because {STATUS_OF_ANY_FIXED} fixed in the cluster")
    return bool(fixed)


def _print_stores(session: Session) -> None:
    try:
        response = session.call(OP_GET_STORE_LIST, data_length=STORE_LIST_BYTES)
    except TransportError:
        return
    names = bytes(response.body).split(b"\0", 1)[0].decode("ascii", "replace")
    sys.stdout.write("Available stores:\n" + "-" * 39 + "\n" + names + "\n")
