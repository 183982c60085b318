"""Checks of the object store contract: whole shards that arrive in pieces. Part of the kit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from sheepdog.contracts.store import ObjectStore, StoreOptions
from sheepdog.errors import ObjectNotFound, StoreBusy
from sheepdog.testing.store_tools import KEY, KiB, StoreFactory, content, get, put

PIECE = 256 * KiB


class IncomingChecks:
    """Pieces in any order, beside each other; all of them or nothing."""

    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize("durable", [False, True])
    def test_pieces_make_a_shard(self, store: ObjectStore, sparse: bool, durable: bool) -> None:
        """Whatever the order of the pieces, also at once: the shard has them all, zeros where there were none or where
        they had zeros, and its full size. Until it is finished nobody sees any of it."""
        size = 8 * PIECE + 5000
        expected = bytearray(size)
        pieces = {3: content(3, PIECE), 0: content(1, PIECE), 8: content(8, 5000), 5: bytes(PIECE), 7: content(7, 100)}
        pieces[6] = bytes(PIECE - 4 * KiB) + content(6, 4 * KiB)
        incoming = store.receive(KEY, size, sparse=sparse)
        with ThreadPoolExecutor(4) as pool:
            for number, piece in pieces.items():
                expected[number * PIECE : number * PIECE + len(piece)] = piece
                pool.submit(incoming.write, piece, offset_bytes=number * PIECE).result()
        assert not store.exists(KEY) and not list(store.keys())
        incoming.finish(durable=durable)

        assert store.size(KEY) == size
        assert get(store, KEY) == expected
        assert list(store.keys()) == [KEY]
        store.write(KEY, b"later", offset_bytes=10, durable=False)
        incoming.discard()
        expected[10:15] = b"later"
        assert get(store, KEY) == expected

    def test_pieces_at_once(self, store: ObjectStore) -> None:
        """Several threads write their pieces at the same time."""
        whole = content(9, 16 * PIECE)
        incoming = store.receive(KEY, len(whole), sparse=False)
        with ThreadPoolExecutor(4) as pool:
            list(
                pool.map(
                    lambda at: incoming.write(whole[at : at + PIECE], offset_bytes=at), range(0, len(whole), PIECE)
                )
            )
        incoming.finish(durable=False)
        assert get(store, KEY) == whole

    def test_pieces_replace(self, store: ObjectStore) -> None:
        """What was there stays until the pieces take its place, all of it."""
        put(store, KEY, content(1, 3 * PIECE))
        incoming = store.receive(KEY, 64 * KiB, sparse=False)
        incoming.write(content(2, 64 * KiB), offset_bytes=0)
        assert get(store, KEY) == content(1, 3 * PIECE)
        incoming.finish(durable=False)
        assert get(store, KEY) == content(2, 64 * KiB)

    def test_no_pieces(self, store: ObjectStore) -> None:
        """Without a piece it is a shard of zeros."""
        store.receive(KEY, 10_000, sparse=False).finish(durable=False)
        assert get(store, KEY) == bytes(10_000)

    def test_discarded_pieces(self, store: ObjectStore, store_factory: StoreFactory, options: StoreOptions) -> None:
        """What is given up leaves nothing, what was never finished is gone when the store is opened again."""
        used = store.usage().used_bytes
        given_up, forgotten = (store.receive(KEY, 2 * PIECE, sparse=False) for _ in range(2))
        for incoming in (given_up, forgotten):
            incoming.write(content(1, PIECE), offset_bytes=PIECE)
        given_up.discard()
        given_up.discard()
        store.close()
        again = store_factory(options)
        with pytest.raises(ObjectNotFound):
            again.size(KEY)
        assert not list(again.keys())
        assert again.usage().used_bytes == used
        again.close()

    def test_pieces_of_a_store_that_was_emptied(self, store: ObjectStore) -> None:
        """A shard that was arriving while the store was wiped is never a part of what it was to be."""
        whole = content(5, 3 * PIECE)
        incoming = store.receive(KEY, len(whole), sparse=False)
        incoming.write(whole[:PIECE], offset_bytes=0)
        store.wipe()
        try:
            incoming.write(whole[PIECE:], offset_bytes=PIECE)
            incoming.finish(durable=False)
        except StoreBusy:
            assert not store.exists(KEY)
        else:
            assert get(store, KEY) == whole
