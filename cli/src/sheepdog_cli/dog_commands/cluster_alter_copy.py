"""``dog cluster alter-copy``: another default number of copies."""

from __future__ import annotations

from sheepdog.client import admin
from sheepdog.errors import ProtocolError, TransportError
from sheepdog_cli.dog_commands.vdi_alter_copy import wanted_copies
from sheepdog_cli.output import confirm_banner
from sheepdog_cli.session import RESULT_SUCCESS, Session, complain, describe, fail

OP_ALTER_CLUSTER_COPY = 0xBF


def run(session: Session) -> None:
    copies = wanted_copies(session, "cluster")
    failure = "Changing the cluster's redundancy level failure."
    try:
        result, newest = admin.newest_epoch(session.call)
    except (TransportError, ProtocolError):
        fail(failure)
    if result != RESULT_SUCCESS or newest is None:
        fail(f"Response's result: {describe(result)}")
    if newest.copy_policy:
        fail("The cluster's copy policy is erasure code, changing it is not supported yet.")
    if newest.copies == copies:
        fail(f"The cluster's redundancy level is already set to {copies}, nothing changed.")
    if not session.options.force:
        confirm_banner("Caution! Changing cluster's redundancy level will affect", "all the VDIs to be created later.")
    try:
        response = session.call(OP_ALTER_CLUSTER_COPY, copies=copies)
    except TransportError:
        fail(failure)
    if response.result != RESULT_SUCCESS:
        complain(describe(response.result))
        fail(failure)
    complain(f"The cluster's redundancy level is set to {copies}, the old one was {newest.copies}.")
