"""Which sheep vote, asked of those that run.

A voter answers with the list that it goes by, and so with itself; a follower answers with the voters that it follows,
which is good for asking those. So a sheep that comes may know any member, and in the end hears it from voters
themselves: what a follower once learned may be out of date.

Question and answer are messages of the library's connections: nothing of them is interpreted before both sides have
shown that they know the secret.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import anyio
import anyio.to_thread
import pysyncobj.utility

from sheepdog.api import ConfigError
from sheepdog_cluster_raft.options import RaftOptions, is_at
from sheepdog_cluster_raft.transport import WHO_VOTES, bound

ASK_S = 2.0
ASKED_MAX = 100  # members in one round; more than any list has


def voters_of(address: str, password: str) -> list[str] | None:
    """The voters that the member at this address knows; None if none answers. Blocks for about ``ASK_S`` at most."""
    utility = pysyncobj.utility.TcpUtility(password, timeout=ASK_S)
    connection = utility._TcpUtility__connection
    bound(connection, lambda: connection.sendRandKey is not None)
    with contextlib.suppress(pysyncobj.utility.UtilityException, OSError):
        answer = utility.executeCommand(address, [WHO_VOTES])
        if isinstance(answer, list) and all(isinstance(voter, str) for voter in answer):
            return answer
    return None


async def ask_voters(
    addresses: Iterable[str],
    options: RaftOptions,
    voters_of: Callable[[str, str], list[str] | None] = voters_of,
) -> list[list[str]]:
    """The lists that voters go by, of those that were found from these addresses. Takes little more than ``ASK_S``."""
    lists: list[list[str]] = []
    asked = {options.self_address}

    async def ask(address: str) -> None:
        answer = await anyio.to_thread.run_sync(voters_of, address, options.password, abandon_on_cancel=True)
        if answer is None:
            return
        if address in answer:
            lists.append(answer)
        else:
            start(answer)

    def start(more: Iterable[str]) -> None:
        for address in more:
            if address not in asked and len(asked) <= ASKED_MAX:
                asked.add(address)
                asking.start_soon(ask, address)

    with anyio.move_on_after(ASK_S + 0.5):
        async with anyio.create_task_group() as asking:
            start(addresses)
    return lists


def agreed_voters(options: RaftOptions, lists: Sequence[list[str]]) -> RaftOptions:
    """Our options, with what running voters say. May ask the DNS.

    Who follows goes by them, and knows all of them from any. Who votes goes by its own list; to replace a voter, one
    address is changed on one after the other, so two lists may differ in one, but not in more: two majorities would
    have nobody in common.

    :raises ConfigError: the lists differ too much, or voters count on our vote and we would not give it.
    """
    if not options.votes:
        voters = list(dict.fromkeys([voter for one in lists for voter in one])) or list(options.voters)
        ours = [voter for voter in voters if _is_ours(voter, options)]
        if ours:
            raise ConfigError(
                f"the raft voters that run go by {','.join(voters)}, and {ours[0]} is this sheep; give it that list, "
                "or say self=none if it is another"
            )
        return replace(options, peers=tuple(voters), voters_max=len(voters))
    mine = set(options.voters)
    for one in lists:
        theirs = set(one)
        if len(mine - theirs) > 1 or len(theirs - mine) > 1:
            raise ConfigError(
                f"the raft voters that run go by {','.join(one)}, and this one was given {options.text}; change one "
                "voter at a time, or leave its own address out of the list to join without a vote"
            )
    return options


def _is_ours(voter: str, options: RaftOptions) -> bool:
    if voter == options.self_address:
        return True
    return options.unlisted_host is not None and is_at(voter, options.unlisted_host)
