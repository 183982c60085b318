"""Checks of the object store contract: whole contents that take each other's place. Part of the kit."""

from __future__ import annotations

import pytest

from sheepdog.contracts.store import ObjectStore, Staged, StoreOptions
from sheepdog.errors import StoreError
from sheepdog.testing.store_tools import KEY, OTHER, KiB, StoreFactory, content, get, put


class ExchangeChecks:
    """Skipped for a store that writes everything in place."""

    def _staged(self, store: ObjectStore, seed: int) -> Staged:
        put(store, KEY, content(1, 64 * KiB))
        put(store, OTHER, content(2, 64 * KiB))
        staged = store.stage(KEY, content(seed, 64 * KiB), durable=True)
        if staged is None:
            pytest.skip("this store writes in place")
        return staged

    def test_exchange(self, store: ObjectStore) -> None:
        """What is staged is the shard after the exchange only; what it replaced comes back until it is released."""
        staged = self._staged(store, 3)
        assert get(store, KEY) == content(1, 64 * KiB)
        store.exchange(staged)
        store.sync([KEY])

        assert get(store, KEY) == content(3, 64 * KiB)
        assert store.put_back(KEY, staged.old, durable=True) and store.put_back(KEY, staged.old, durable=True)
        assert get(store, KEY) == content(1, 64 * KiB)
        again = store.stage(KEY, content(4, 64 * KiB), durable=False)
        assert again is not None
        store.exchange(again)
        store.purge_stale()
        store.release([(KEY, again.old)])
        assert not store.put_back(KEY, again.old, durable=False)
        assert get(store, KEY) == content(4, 64 * KiB) and get(store, OTHER) == content(2, 64 * KiB)
        assert list(store.keys()) == [KEY, OTHER] and not list(store.stale_keys())

    def test_unstage(self, store: ObjectStore) -> None:
        """What was given up is no shard and becomes none."""
        staged = self._staged(store, 3)
        for _ in range(2):
            store.unstage(staged)

        assert get(store, KEY) == content(1, 64 * KiB)
        with pytest.raises(StoreError):
            store.exchange(staged)

    @pytest.mark.parametrize("exchanged", [False, True])
    def test_finish_exchanges(self, store_factory: StoreFactory, options: StoreOptions, exchanged: bool) -> None:
        """A store that is opened later makes the exchange, or finds it made, and can still put back."""
        first = store_factory(options)
        staged = self._staged(first, 3)
        if exchanged:
            first.exchange(staged)
        store = store_factory(options)

        assert store.finish_exchanges([staged], [(KEY, staged.old)]) == [KEY]
        assert get(store, KEY) == content(3, 64 * KiB) and get(store, OTHER) == content(2, 64 * KiB)
        assert store.put_back(KEY, staged.old, durable=True)
        assert get(store, KEY) == content(1, 64 * KiB)
        store.close()
