"""``dog node stat``: counters of one sheep."""

from __future__ import annotations

import sys
import time

from sheepdog.client import admin
from sheepdog.errors import ProtocolError, TransportError
from sheepdog_cli.output import print_json
from sheepdog_cli.session import RESULT_EIO, RESULT_SUCCESS, Session, complain, describe, fail
from sheepdog_cli.sizes import format_size

HEADING = "Request\tActive\tTotal\tWrite\tRead\tRemove\tFlush\tAll WR\tAll RD"
RATE_HEADING = "\tWRBW\tRDBW\tRPS"
INTERVAL_S = 1.0


class Row:
    """The counters of one kind of requests."""

    def __init__(self, label: str, counts: tuple[int, ...], received: int, sent: int) -> None:
        self.label = label
        self.counts = counts  # active, total, write, read, remove, flush
        self.received = received
        self.sent = sent


def run(session: Session) -> None:
    if session.options.json:
        print_json(_counters(session)._asdict())
        return
    if "watch" not in session.options:
        _print(rows(_counters(session)), None, session.options.raw)
        return
    before: list[Row] | None = None
    while True:
        now = rows(_counters(session))
        _print(now, before or now, session.options.raw)
        sys.stdout.flush()
        before = now
        time.sleep(INTERVAL_S)


def rows(counters: admin.Counters) -> list[Row]:
    """Client (as gateway), then Peer (from other sheep)."""
    c = counters
    client = (c.gateway_active, c.gateway_total, c.gateway_writes, c.gateway_reads, c.gateway_removes)
    return [
        Row(
            "Client",
            (*client, c.gateway_flushes),
            c.gateway_received_bytes,
            c.gateway_sent_bytes,
        ),
        Row(
            "Peer",
            (c.peer_active, c.peer_total, c.peer_writes, c.peer_reads, c.peer_removes, 0),
            c.peer_received_bytes,
            c.peer_sent_bytes,
        ),
    ]


def _counters(session: Session) -> admin.Counters:
    failure = "failed to get stat information: "
    try:
        response = session.call(admin.OP_STAT, data_length=admin.STATS_BYTES)
        if response.result != RESULT_SUCCESS:
            fail(failure + describe(response.result))
        return admin.unpack_counters(response.body)
    except ProtocolError as error:
        complain(str(error))
    except TransportError:
        pass  # said already
    fail(failure + describe(RESULT_EIO))


def _print(now: list[Row], before: list[Row] | None, raw: bool) -> None:
    out = sys.stdout.write
    if not raw:
        out(HEADING + (RATE_HEADING if before is not None else "") + "\n")
    for at, row in enumerate(now):
        words = [] if raw else [row.label]
        words += [str(count) for count in row.counts]
        words += [format_size(row.received, raw), format_size(row.sent, raw)]
        if before is not None:
            old = before[at]
            words.append(format_size(row.received - old.received, raw))
            words.append(format_size(row.sent - old.sent, raw))
            words.append(str(row.counts[1] - old.counts[1]))
        out("\t".join(words) + "\n")
