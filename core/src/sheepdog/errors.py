"""Every error that crosses a module boundary.

Each class knows the result code that the wire carries for it, the exit code of the command line and whether trying the
same thing again can help. Callers decide by class, never by message::

    SheepdogError
    ├── ConfigError                 what the operator asked for cannot be done
    │   └── PluginError
    │       ├── PluginMissing       nothing installed under that name
    │       ├── PluginAmbiguous     two distributions claim the name
    │       ├── PluginBroken        installed, but its import fails (a library is missing)
    │       └── PluginIncompatible  made for another plugin API
    ├── ProtocolError               bytes that no correct peer sends; costs the connection
    ├── ClusterError                the cluster driver
    │   ├── ClusterUnavailable      the coordination service does not answer
    │   ├── SessionLost             the others have seen, or will see, our Left
    │   ├── JoinRefused
    │   └── PayloadTooLarge
    ├── StoreError                  the object store
    │   ├── ObjectNotFound
    │   ├── ObjectExists
    │   ├── StoreFull
    │   ├── StoreDeviceError        a disk is failing or gone
    │   ├── ShardCorrupt            the bytes are not those that were stored
    │   └── StoreBusy               transient, for example out of file descriptors
    ├── RequestError                a request was understood and refused (one class, any result code)
    │   ├── InvalidParameters, VdiNotFound, TagNotFound, VdiExists, VdiLocked, ReadOnlyObject, Halted
    └── TransportError              a connection cannot be made or broke

Result codes are those of the wire protocol (docs/compatibility.md); they are repeated here as plain numbers because
this module stands below ``sheepdog.wire``. A test keeps the two in step.
"""

from __future__ import annotations

from typing import ClassVar


class SheepdogError(Exception):
    """Root of the tree."""

    result: int = 0x06  # SYSTEM_ERROR
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False


class ConfigError(SheepdogError):
    """What the operator asked for cannot be done; the message says what to change."""

    result = 0x05


class PluginError(ConfigError):
    """A plugin cannot be used."""


class PluginMissing(PluginError):
    """No installed distribution offers a plugin of that name."""


class PluginAmbiguous(PluginError):
    """Two installed distributions offer a plugin of that name."""


class PluginBroken(PluginError):
    """The plugin is installed but cannot be imported, usually because a library is missing."""


class PluginIncompatible(PluginError):
    """The plugin was written for another version of the plugin API."""


class ProtocolError(SheepdogError):
    """Bytes that no correct peer sends. The connection is closed; nothing else is lost."""

    result = 0x05
    exit_code = 2


class ClusterError(SheepdogError):
    """The cluster driver could not do what was asked."""

    result = 0x91
    exit_code = 2


class ClusterUnavailable(ClusterError):
    """The coordination service does not answer, or has no quorum. Retrying later can help."""

    retryable = True


class SessionLost(ClusterError):
    """The other members have seen, or will see, our ``Left``. Stop serving, then join again."""

    retryable = True


class JoinRefused(ClusterError):
    """The members refuse this sheep; the message is what the log must say."""

    result = 0x18


class PayloadTooLarge(ClusterError):
    """A broadcast payload is above the limit of the contract. Nothing was sent."""

    result = 0x05


class StoreError(SheepdogError):
    """The object store could not do what was asked."""

    result = 0x03


class ObjectNotFound(StoreError):
    """No such object here."""

    result = 0x02


class ObjectExists(StoreError):
    """An object of that name is there already."""

    result = 0x8E


class StoreFull(StoreError):
    """The disk is full; nothing was written. Retrying helps after space was freed."""

    result = 0x15


class StoreDeviceError(StoreError):
    """A disk is failing or its directory is gone. ``path`` names the disk when it is known."""

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class ShardCorrupt(StoreError):
    """What was read is not what was stored: nothing of it may be used. Other holders may have the object.

    :param index: as in ``ShardKey``; ``epoch`` names a version that was set aside, ``None`` the live shard.
    """

    def __init__(self, oid: int, index: int, reason: str, *, epoch: int | None = None) -> None:
        where = "" if index < 0 else f" strip={index}"
        aside = "" if epoch is None else f" (set aside at epoch={epoch})"
        super().__init__(f"oid={oid:016x}{where}{aside} is corrupt: {reason}")
        self.oid = oid
        self.index = index
        self.reason = reason
        self.epoch = epoch


class StoreBusy(StoreError):
    """A transient local shortage (file descriptors, memory). Retryable at once."""

    result = 0x86
    retryable = True


class RequestError(SheepdogError):
    """A request was refused with a result code. ``result`` is that code."""

    def __init__(self, message: str = "", *, result: int | None = None) -> None:
        super().__init__(message)
        if result is not None:
            self.result = result


class InvalidParameters(RequestError):
    result = 0x05


class VdiNotFound(RequestError):
    result = 0x08


class TagNotFound(RequestError):
    result = 0x0E


class VdiExists(RequestError):
    result = 0x04


class VdiLocked(RequestError):
    result = 0x07


class ReadOnlyObject(RequestError):
    result = 0x1A


class Halted(RequestError):
    result = 0x19


class TransportError(SheepdogError):
    """A connection cannot be made, or it broke."""

    result = 0x86
    exit_code = 2
    retryable = True
