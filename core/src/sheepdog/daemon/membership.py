"""The membership of one sheep: its session with the cluster driver, the cluster's status, and the epochs.

One task handles the driver's events strictly in order; whatever it changes is replicated state, the same on every
admitted member after the same event. What a sheep does alone on the way (epoch files, opening a store, recovery)
never influences that state. A member that cannot go on in order must not go on at all, so errors of this task end the
process.

A member is *admitted* by a WELCOME of the oldest admitted member. The invariant that makes "oldest" agree everywhere:
joiners are judged strictly in the order of joining, so an admitted member is older than every one that still waits. A
sheep that finds itself the oldest of all without having been welcomed is therefore alone with what it knows, and founds
the cluster from its own disks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from sheepdog.contracts.cluster import ClusterDriver, Delivered, Event, Joined, Left, Updated
from sheepdog.contracts.services import Clock
from sheepdog.daemon import messages, scan
from sheepdog.daemon.admission import Member, Transfer, refusal
from sheepdog.daemon.epoch_log import EpochLog
from sheepdog.daemon.interfaces import Backend, Lifecycle, PeerCaller
from sheepdog.daemon.messages import Fields, Greeting
from sheepdog.daemon.sections import Sections
from sheepdog.daemon.session import SessionKeeper
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.transfer import FrozenStates, fetch
from sheepdog.errors import ClusterUnavailable, ProtocolError, SessionLost
from sheepdog.model.clusterinfo import ClusterFlag, ClusterStatus, mode_flag
from sheepdog.model.epochs import epoch_after
from sheepdog.model.node import Node, NodeId, VnodeMode
from sheepdog.model.ring import Ring, auto_vnodes, disk_vnodes
from sheepdog.model.vdi_state import VdiState
from sheepdog.wire.opcodes import SHEEP_PROTO_VER

logger = logging.getLogger(__name__)

Export = Callable[[], Any]
Restore = Callable[[Any], None]
Inventory = Callable[[], tuple[list[VdiState], list[Any]]]  # states; half-done volumes in their own form


class Membership(SessionKeeper):
    """Epochs, members and status of one sheep; the owner of its session."""

    def __init__(
        self,
        state: SheepState,
        driver: ClusterDriver,
        backend: Backend,
        peers: PeerCaller,
        sections: Sections,
        lifecycle: Lifecycle,
        clock: Clock,
        random_u64: Callable[[], int],
        *,
        auto_vnodes: bool,
    ) -> None:
        """
        :param random_u64: a new number at each call, to tell one join from the next.
        :param auto_vnodes: this sheep was started without ``-V``.
        """
        super().__init__(state, driver)
        self.log = EpochLog(state, backend, peers)
        self.sections = sections
        self.auto_vnodes = auto_vnodes
        self.gateway = state.me.gateway
        self.epoch_nodes: tuple[Node, ...] = ()  # members of state.epoch as logged
        self.frozen = FrozenStates()
        self.inventory: Inventory = lambda: (state.vdis.states(), [])  # what we bring to a cluster that we join
        self.merge_unfinished: Callable[[tuple[Any, ...]], None] = lambda entries: None
        self._backend = backend
        self._peers = peers
        self._lifecycle = lifecycle
        self._clock = clock
        self._random_u64 = random_u64
        self._extras: dict[str, tuple[Export, Restore]] = {}
        self._left_hooks: list[Callable[[NodeId], None]] = []
        self._members: dict[NodeId, Member] = {}  # in the order of joining
        self._deciding: tuple[NodeId, int] | None = None
        self._nonce = 0
        self._attached = False
        self._serving = False  # this sheep's disks belong to the running cluster

    # ---- what others ask

    @property
    def admitted(self) -> bool:
        """This sheep takes part, and has the state of the others."""
        return self._attached

    def members(self) -> list[Member]:
        """Admitted members, oldest first."""
        return [member for member in self._members.values() if member.admitted]

    def other_members(self) -> list[NodeId]:
        """Admitted members but ourselves, oldest first."""
        return [member.node.id for member in self.members() if member.node.id != self.state.me.id]

    @property
    def oldest(self) -> bool:
        """This sheep is the oldest admitted member."""
        members = self.members()
        return bool(members) and members[0].node.id == self.state.me.id

    def extra(self, name: str, export: Export, restore: Restore) -> None:
        """More replicated state that a joiner needs. ``restore(None)`` must reset it."""
        self._extras[name] = (export, restore)

    def on_left(self, hook: Callable[[NodeId], None]) -> None:
        """``hook(node)`` is called after an admitted member's ``Left`` was applied."""
        self._left_hooks.append(hook)

    async def reached(self, position: int) -> None:
        """Every event up to ``position`` is finished here."""
        while self.done < position or not self.admitted:
            await self._progress.wait()

    async def update(self, node: Node) -> None:
        """The cluster has our new record, and we have seen it.

        :raises ClusterUnavailable: not a member, or the coordination service does not answer.
        :raises SessionLost: it may or may not have been announced.
        """
        session = self._session
        if session is None or not self.admitted:
            raise ClusterUnavailable("this sheep is not a member at the moment")
        await session.update(node)
        while True:
            member = self._members.get(node.id)
            if self._session is not session:
                raise SessionLost("the session ended while the cluster was told about this sheep's new record")
            if member is not None and member.node == node:
                return
            await self._progress.wait()

    async def epoch_ring(self, epoch: int) -> Ring | None:
        """The ring of an earlier epoch as it was logged; ``None`` when no member knows it."""
        return await self.log.ring(epoch, self.other_members())

    async def complete_epochs(self) -> None:
        """The log of every epoch that another member knows is stored here."""
        await self.log.complete(self.other_members())

    # ---- life

    async def _prepare(self, *, again: bool) -> tuple[bytes, list[bytes]]:
        if not again:
            await self._load()
        elif self.log.own_ctime and self.log.own_ctime == self.state.ctime:
            # The session may have ended while an epoch was being written.
            epoch, self.epoch_nodes = await self.log.load_newest()
            self.state.install(epoch=epoch)
        self._nonce = self._random_u64()
        states, unfinished = self.inventory()
        first, *others = messages.inventory_chunks(states)
        greeting = self._greeting(first, unfinished, complete=not others)
        return greeting.pack(), messages.inventory_messages(others)

    async def _load(self) -> None:
        """What this sheep's own disks say."""
        config = await self.log.load_config()
        if config is None:
            return
        state = self.state
        state.ctime, state.flags = config.ctime, config.flags
        state.copies, state.copy_policy = config.copies, config.copy_policy
        state.block_size_shift, state.store_name = config.block_size_shift, config.default_store
        epoch, self.epoch_nodes = await self.log.load_newest()
        if self._backend.store is not None:
            state.vdis.merge(await self._backend.use(scan.local_states))
        state.install(epoch=epoch)

    def _greeting(self, inventory: Iterable[VdiState], unfinished: Iterable[Any], *, complete: bool) -> Greeting:
        state = self.state
        return Greeting(
            proto=SHEEP_PROTO_VER,
            nonce=self._nonce,
            ctime=state.ctime,
            epoch=state.epoch,
            epoch_time=self.log.time(state.epoch),
            flags=int(state.flags),
            copies=state.copies,
            copy_policy=state.copy_policy,
            block_size_shift=state.block_size_shift,
            store=state.store_name,
            auto_vnodes=self.auto_vnodes,
            vnode_mode=state.mode,
            gateway=self.gateway,
            recovery_disabled=state.recovery_disabled,
            members=self.epoch_nodes,
            inventory=tuple(inventory),
            unfinished=tuple(unfinished),
            complete=complete,
        )

    def _ended(self) -> None:
        self._attached = False
        self._deciding = None
        self._serving = False
        self._members.clear()
        self.frozen.clear()
        self.sections.detach()

    # ---- events

    async def _handle(self, event: Event) -> None:
        if isinstance(event, Delivered):
            await self._delivered(event)
        elif isinstance(event, Joined):
            await self._joined(event)
        elif isinstance(event, Left):
            await self._left(event)
        else:
            await self._updated(event)

    async def _joined(self, event: Joined) -> None:
        try:
            greeting = Greeting.unpack(event.greeting)
        except ProtocolError as error:
            logger.warning("node=%s joins with a greeting that is not understood: %s", event.node.id.text, error)
            greeting = Greeting(proto=0, nonce=0)
        self._members[event.node.id] = Member(
            event.node, greeting, complete=greeting.complete, inventory=list(greeting.inventory)
        )
        if event.node.id == self.state.me.id:
            await self._found_if_oldest(event.view)
        self._decide()

    async def _left(self, event: Left) -> None:
        member = self._members.pop(event.node.id, None)
        if self._deciding is not None and self._deciding[0] == event.node.id:
            self._deciding = None
        if member is not None:
            self.frozen.drop(member.greeting.nonce)
        if not self.admitted:
            await self._found_if_oldest(event.view)
        elif member is not None and member.admitted:
            self.sections.node_left(event.node.id)
            self.state.vdis.drop_node(event.node.id)
            await self._member_left(member)
            for hook in self._left_hooks:
                hook(event.node.id)
        self._decide()

    async def _member_left(self, member: Member) -> None:
        if self._ending:
            return
        if (
            self.state.status is ClusterStatus.OK
            and member.node.space
            and not any(other.node.space for other in self.members())
        ):
            logger.info("only gateway nodes are remaining, exiting")
            self._lifecycle.stop(0, "only gateway nodes are remaining, exiting")
            return
        await self._refresh(changed=True)

    async def _updated(self, event: Updated) -> None:
        member = self._members.get(event.node.id)
        if member is None:
            return
        member.node = event.node
        if event.node.id == self.state.me.id:
            self.state.me = event.node
        if self.admitted and member.admitted and not self._ending:
            await self._refresh(changed=True)

    async def _delivered(self, event: Delivered) -> None:
        try:
            fields = messages.decode(event.payload)
            kind, token = messages.text(fields, "k"), messages.integer(fields, "t")
            sender = self._members.get(event.sender)
            if kind == messages.INVENTORY:
                if sender is not None and sender.pending:
                    sender.inventory.extend(messages.unpack_states(fields.get("vdis")))
                    sender.complete = bool(messages.integer(fields, "last"))
                    self._decide()
            elif kind == messages.WELCOME:
                await self._welcomed(event.sender, fields)
            elif kind == messages.REFUSE:
                self._refused(event.sender, fields)
            elif not self.admitted or sender is None or not sender.admitted:
                pass  # what happened before our time is in the state that we shall fetch
            elif kind == messages.CHANGE:
                await self.sections.delivered_change(event.sender, token, fields)
            elif kind == messages.CLAIM:
                self.sections.delivered_claim(event.sender, token)
            elif kind == messages.RELEASE:
                self.sections.delivered_release(event.sender, token)
            elif kind == messages.READY:
                self.frozen.drop(sender.greeting.nonce)
            elif kind == messages.PING:
                pass
            elif kind == messages.STAMP:
                await self.log.stamped(fields.get("e"))
            else:
                logger.debug("node=%s says %r, which is not known here", event.sender.text, kind)
        except ProtocolError as error:
            logger.warning("a message of node=%s is not understood: %s", event.sender.text, error)

    @property
    def _ending(self) -> bool:
        return self.state.status in (ClusterStatus.SHUTDOWN, ClusterStatus.KILLED)

    # ---- admission

    def _decide(self) -> None:
        """The oldest admitted member judges the first that waits. One at a time: each verdict changes the state."""
        if not self.oldest or self._deciding is not None or self._ending:
            return
        joiner = next((member for member in self._members.values() if member.pending), None)
        if joiner is None or not joiner.complete:
            return
        node, nonce = joiner.node.id, joiner.greeting.nonce
        self._deciding = (node, nonce)
        reason = refusal(self.state, self._members, joiner)
        if reason is None:
            self._send_soon(messages.WELCOME, node=node.pack(), nonce=nonce)
        else:
            logger.warning("node=%s is refused: %s", node.text, reason)
            self._send_soon(messages.REFUSE, node=node.pack(), nonce=nonce, why=reason)

    def _judged(self, sender: NodeId, fields: Fields) -> Member | None:
        """The member that a verdict is about, unless it is not valid (any more)."""
        node = messages.node_id_field(fields, "node")
        member = self._members.get(node)
        if self._deciding is not None and self._deciding[0] == node:
            self._deciding = None
        if member is None or not member.pending or member.greeting.nonce != messages.integer(fields, "nonce"):
            return None
        if self.admitted and self.members()[0].node.id != sender:
            return None
        return member

    def _refused(self, sender: NodeId, fields: Fields) -> None:
        member = self._judged(sender, fields)
        if member is not None:
            member.refused = True
            if member.node.id == self.state.me.id:
                self._refusal = messages.text(fields, "why")
                logger.error("%s", self._refusal)
                logger.error("failed to join Sheepdog")
        self._decide()

    async def _welcomed(self, sender: NodeId, fields: Fields) -> None:
        member = self._judged(sender, fields)
        if member is None:
            self._decide()
            return
        if member.node.id == self.state.me.id:
            await self._adopt(sender)
        elif self.admitted:
            before, epoch = self.epoch_nodes, self.state.epoch
            await self._admit(member)
            self.frozen.keep(member.greeting.nonce, self._transfer(before, lifted=self.state.epoch != epoch).pack())
        self._decide()

    async def _found_if_oldest(self, view: tuple[Node, ...]) -> None:
        me = self._members.get(self.state.me.id)
        if me is None or not me.pending or not view or view[0].id != self.state.me.id:
            return
        state = self.state
        state.ctime = state.epoch = 0
        state.flags = mode_flag(state.mode) | (ClusterFlag.AUTO_VNODES if self.auto_vnodes else ClusterFlag(0))
        state.recovery_disabled = False
        me.inventory.extend(self.inventory()[0])  # all of it, though only a part may have been sent
        state.vdis.clear()
        self.epoch_nodes = ()
        self.sections.restore([])
        for _, restore in self._extras.values():
            restore(None)
        await self._admit(me)
        self._attach()
        logger.info("node=%s is the first member, epoch=%d status=%s", state.me.id.text, state.epoch, state.status.name)

    async def _admit(self, member: Member) -> None:
        """``member`` belongs to the cluster; status, epoch and volumes follow from what it brings."""
        state, greeting = self.state, member.greeting
        if (
            state.status is ClusterStatus.WAIT
            and greeting.ctime
            and (not state.ctime or (greeting.ctime == state.ctime and epoch_after(greeting.epoch, state.epoch)))
        ):
            state.ctime, state.epoch = greeting.ctime, greeting.epoch
            state.flags = ClusterFlag(greeting.flags)
            state.copies, state.copy_policy = greeting.copies, greeting.copy_policy
            state.block_size_shift, state.store_name = greeting.block_size_shift, greeting.store
            state.recovery_disabled = greeting.recovery_disabled
            self.epoch_nodes = greeting.members
            self.log.learn_time(greeting.epoch, greeting.epoch_time)
        last_member = any(node.id == member.node.id for node in self.epoch_nodes)
        if greeting.ctime == state.ctime and (last_member or not state.flags & ClusterFlag.RECYCLE_VID):
            # With recycling, volumes that only an outsider knows may be ones that were reclaimed in its absence.
            state.vdis.merge(member.inventory)
            self.merge_unfinished(greeting.unfinished)
        member.inventory = []
        member.admitted = True
        logger.info("node=%s joined", member.node.id.text)
        if not self._ending:
            await self._refresh(changed=False)

    async def _adopt(self, sender: NodeId) -> None:
        """We were welcomed: the state of the others becomes ours."""

        def candidates() -> list[NodeId]:
            # Only who was there before us can have what was frozen for us.
            return sorted(self._older, key=lambda node: node != sender)

        data = await fetch(self._peers, self._nonce, candidates)
        if data is None:
            # Everybody who had it is gone. Younger members may have a newer state, and take us for the oldest.
            logger.warning("nobody is left who could hand over the state")
            self._give_up = True
            return
        transfer = Transfer.unpack(data)
        state = self.state
        state.ctime, state.flags = transfer.ctime, transfer.flags
        state.copies, state.copy_policy = transfer.copies, transfer.copy_policy
        state.block_size_shift, state.store_name = transfer.block_size_shift, transfer.store
        state.recovery_disabled = transfer.recovery_disabled
        state.vdis = transfer.vdis
        self.epoch_nodes = transfer.epoch_nodes
        self.log.learn_time(transfer.epoch, transfer.epoch_time)
        younger = self._members
        self._members = {member.node.id: member for member in transfer.members}
        for node, member in younger.items():
            self._members.setdefault(node, member)
        self.position = transfer.position
        self.done = self.position - 1
        self.sections.restore(transfer.claims)
        for name, (_, restore) in self._extras.items():
            restore(transfer.extras.get(name))
        if transfer.status is ClusterStatus.OK:
            await self._start_serving(transfer.before_nodes, transfer.epoch)
            time = transfer.epoch_time or self.log.time(transfer.epoch)
            await self.log.write(transfer.epoch, transfer.epoch_nodes, time)
        ring = self._ring()
        state.install(
            status=transfer.status, epoch=transfer.epoch, members=tuple(m.node for m in self.members()), ring=ring
        )
        if transfer.status is ClusterStatus.OK:
            if transfer.lifted:
                self._backend.recovery.membership_changed(Ring(transfer.before_nodes), True)
            elif not self.log.clean:
                self._backend.recovery.membership_changed(ring, False)
            self.log.clean = False
        self._attach()
        self._send_soon(messages.READY)
        self._fetch_epochs()
        logger.info("joined: epoch=%d status=%s members=%d", state.epoch, state.status.name, len(state.members))

    def _attach(self) -> None:
        """We take part from here on."""
        self._attached = True
        self.sections.attach(self.broadcast)
        if self.state.joining:
            self.state.joining = False
            self.state.install()

    def _transfer(self, before: tuple[Node, ...], *, lifted: bool) -> Transfer:
        state = self.state
        return Transfer(
            position=self.position,
            status=state.status,
            ctime=state.ctime,
            epoch=state.epoch,
            flags=state.flags,
            copies=state.copies,
            copy_policy=state.copy_policy,
            block_size_shift=state.block_size_shift,
            store=state.store_name,
            recovery_disabled=state.recovery_disabled,
            epoch_nodes=self.epoch_nodes,
            epoch_time=self.log.time(state.epoch),
            before_nodes=before,
            lifted=lifted,
            members=tuple(self._members.values()),
            vdis=state.vdis,
            claims=self.sections.export(),
            extras={name: export() for name, (export, _) in self._extras.items()},
        )

    # ---- epochs

    def _ring(self) -> Ring:
        nodes = [member.node for member in self.members()]
        if self.state.mode is VnodeMode.DISK:
            return Ring(disk_vnodes(nodes))
        auto = self.state.flags & ClusterFlag.AUTO_VNODES if self.state.ctime else self.auto_vnodes
        return Ring(auto_vnodes(nodes) if auto else nodes)

    async def _refresh(self, *, changed: bool) -> None:
        """Status, epoch and ring follow the members.

        :param changed: a running cluster needs a new epoch even if the set of members is that of the newest one.
        """
        state = self.state
        # Where vnodes belong to disks a member with other disks than in the newest epoch is not quite the same member.
        present = {member.node.id: member.node.shares for member in self.members()}
        last = {node.id: node.shares for node in self.epoch_nodes}
        if state.status is ClusterStatus.OK:
            if changed or present != last:
                await self.lift()
            else:
                self._install_ring()
        elif state.ctime and state.epoch and last and last.keys() <= present.keys():
            if present != last:
                await self.lift()
            else:
                await self._resume()
        else:
            self._install_ring()
            self._fetch_epochs()

    def _install_ring(self) -> None:
        self.state.install(members=tuple(member.node for member in self.members()), ring=self._ring())

    async def lift(self) -> None:
        """A new epoch of the present members stands, the cluster runs, and recovery from the previous epoch began."""
        state = self.state
        before = self.epoch_nodes
        old_ring = state.ring if state.status is ClusterStatus.OK else Ring(before)
        await self._start_serving(before, state.epoch)
        ring = self._ring()
        epoch = state.epoch + 1
        self.epoch_nodes = ring.nodes
        await self.log.write(epoch, ring.nodes, int(self._clock.time()))
        state.install(
            status=ClusterStatus.OK, epoch=epoch, members=tuple(member.node for member in self.members()), ring=ring
        )
        self.log.clean = False
        logger.info("epoch=%d members=%d zones=%d", epoch, len(ring.nodes), ring.zones)
        self._backend.recovery.membership_changed(old_ring, True)
        self._fetch_epochs()
        if self.oldest:
            self._send_soon(messages.STAMP, e=self.log.stamp())

    async def _resume(self) -> None:
        """Exactly the members of the newest epoch are back: the cluster runs in that epoch."""
        state = self.state
        await self._start_serving(self.epoch_nodes, state.epoch)
        ring = self._ring()
        state.install(status=ClusterStatus.OK, members=tuple(member.node for member in self.members()), ring=ring)
        logger.info("epoch=%d goes on, members=%d", state.epoch, len(ring.nodes))
        if not self.log.clean:
            self._backend.recovery.membership_changed(ring, False)
        self.log.clean = False
        self._fetch_epochs()

    async def formatted(self, time: int) -> None:
        """After a format: epoch 1 of the present members, nothing to recover."""
        state = self.state
        ring = self._ring()
        self.epoch_nodes = ring.nodes
        self._serving = True
        self.log.clean = False
        await self.log.write_config()
        await self.log.write(1, ring.nodes, time)
        state.install(
            status=ClusterStatus.OK, epoch=1, members=tuple(member.node for member in self.members()), ring=ring
        )

    async def _start_serving(self, before: tuple[Node, ...], epoch: int) -> None:
        """The disks of this sheep are fit for the running cluster; done once per membership.

        :param before: the members of the epoch whose data is valid.
        :param epoch: the newest epoch of the cluster.
        """
        if self._serving:
            return
        state, backend = self.state, self._backend
        if self.log.own_ctime == state.ctime:
            if self.log.own_epoch and all(node.id != state.me.id for node in before):
                # We missed an epoch: whatever we hold may be outdated, but others may need it.
                await backend.recovery.retire_all(self.log.own_epoch)
            await self.log.forget(epoch)
        else:
            await self.log.forget(0)
            if not self.gateway:
                await backend.switch(state.store_name)  # and whatever was on the disks is gone
        await self.log.write_config()
        self._serving = True

    def _fetch_epochs(self) -> None:
        if self._tasks is not None and self.state.epoch:
            self._tasks.start_soon(self._try_complete_epochs)

    async def _try_complete_epochs(self) -> None:
        try:
            await self.complete_epochs()
        except Exception as error:
            # STAT_CLUSTER tries again; an incomplete log loses nothing but history.
            logger.warning("older epochs could not be fetched: %s", error)
