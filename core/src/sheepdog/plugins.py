"""Finds plugins and loads the chosen ones: the only module that uses stevedore and pluggy.

stevedore decides which plugins are in the process: exactly the chosen entry point is imported. pluggy decides what they
may say: the module is registered against the hook specifications, and everything that it marks must fit one. Names are
resolved once, when ``sheep`` starts; what comes out are plain objects, and nothing on the data path comes back here.

What is installed is read from ``importlib.metadata`` without importing any backend, so ``dog plugin list`` stays cheap.
stevedore is given those entry points instead of reading its own copy: it keeps one on disk (``~/.cache``), keyed by
modification times rounded to about two minutes, which can be stale just after ``pip install``, and a daemon has no
business writing to a home directory.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from sheepdog import errors

if TYPE_CHECKING:
    import pluggy

    from sheepdog.contracts.cluster import ClusterDriver
    from sheepdog.contracts.frontend import FrontEnd
    from sheepdog.contracts.redundancy import RedundancyFactory
    from sheepdog.contracts.store import ObjectStore, StoreOptions
    from sheepdog.contracts.transport import Transport
    from sheepdog.model.node import Node

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PluginKind:
    """One of the things that can be plugged in."""

    name: str
    """What error messages and ``dog plugin list`` call it."""

    group: str
    """The entry point group."""

    hook: str | None
    """The hook that a plugin of this kind must implement; ``None`` for observers, which implement what they like."""


KINDS: Mapping[str, PluginKind] = {
    kind.name: kind
    for kind in (
        PluginKind("cluster", "sheepdog.cluster", "sheepdog_cluster_driver"),
        PluginKind("store", "sheepdog.store", "sheepdog_object_store"),
        PluginKind("redundancy", "sheepdog.redundancy", "sheepdog_redundancy"),
        PluginKind("transport", "sheepdog.transport", "sheepdog_transport"),
        PluginKind("frontend", "sheepdog.frontend", "sheepdog_frontend"),
        PluginKind("observer", "sheepdog.observer", None),
    )
}

# Plugin names that are not the last word of their distribution's name.
_DISTRIBUTIONS = {("cluster", "zookeeper"): "sheepdog-cluster-zk"}


@dataclass(frozen=True, slots=True)
class PluginRow:
    """An installed plugin, as far as can be told without importing it."""

    kind: str
    name: str
    distribution: str
    version: str
    state: str
    """``ok``, ``ambiguous`` (two distributions claim the name) or ``needs NAME...`` (requirements not installed)."""


def _entry_points(kind: PluginKind) -> list[importlib.metadata.EntryPoint]:
    """Of a group, ordered by name, then distribution: what the file system happens to list first decides nothing."""
    found = importlib.metadata.entry_points(group=kind.group)
    return sorted(found, key=lambda entry: (entry.name, _distribution_name(entry)))


def _distribution_name(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "unknown"


def _missing_requirements(distribution: importlib.metadata.Distribution) -> list[str]:
    """Unconditional requirements that are not installed. Those with a marker (extras, platforms) are not judged."""
    missing = []
    for requirement in distribution.requires or ():
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        if match is None or ";" in requirement:
            continue
        try:
            importlib.metadata.distribution(match[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(match[0])
    return missing


def list_plugins(kinds: Iterable[str] | None = None) -> list[PluginRow]:
    """All installed plugins, ordered by kind as in ``KINDS``, then by name. Nothing is imported.

    :param kinds: names of kinds, all when ``None``.
    :raises KeyError: no such kind.
    """
    rows = []
    for kind in KINDS.values() if kinds is None else [KINDS[name] for name in kinds]:
        entries = _entry_points(kind)
        names = [entry.name for entry in entries]
        for entry in entries:
            state = "ok"
            if names.count(entry.name) > 1:
                state = "ambiguous"
            elif entry.dist is not None and (missing := _missing_requirements(entry.dist)):
                state = "needs " + " ".join(missing)
            version = entry.dist.version if entry.dist is not None else ""
            rows.append(PluginRow(kind.name, entry.name, _distribution_name(entry), version, state))
    return rows


def plugin_packages() -> set[str]:
    """The import packages of all installed plugins. Nothing is imported."""
    return {entry.module.partition(".")[0] for kind in KINDS.values() for entry in _entry_points(kind)}


def package_for(kind: str, name: str) -> str:
    """The distribution that offers this plugin if it follows the naming rule ``sheepdog-<kind>-<name>``."""
    return _DISTRIBUTIONS.get((kind, name), f"sheepdog-{kind}-{name}")


def _find(kind: PluginKind, name: str) -> importlib.metadata.EntryPoint:
    entries = _entry_points(kind)
    chosen = [entry for entry in entries if entry.name == name]
    if len(chosen) > 1:
        owners = " and ".join(_distribution_name(entry) for entry in chosen)
        raise errors.PluginAmbiguous(
            f"{kind.name} plugin {name!r} is claimed by {owners}; uninstall all but one of them (pip uninstall)"
        )
    if chosen:
        return chosen[0]

    import difflib

    names = sorted({entry.name for entry in entries})
    message = f"no {kind.name} plugin {name!r} (installed: {', '.join(names) or 'none'})"
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        raise errors.PluginMissing(
            f"{message}; did you mean {near[0]!r}? Otherwise: pip install {package_for(kind.name, name)}"
        )
    raise errors.PluginMissing(f"{message}; try: pip install {package_for(kind.name, name)}")


def _import(kind: PluginKind, entry: importlib.metadata.EntryPoint) -> types.ModuleType:
    """The module that the entry point names, imported by stevedore.

    :raises PluginBroken: the import failed.
    """
    from stevedore.driver import DriverManager

    class Chosen(DriverManager[Any]):  # Any: stevedore's type of an extension object, which we do not use
        def list_entry_points(self) -> list[importlib.metadata.EntryPoint]:
            return [entry]

    def failed(_manager: object, _entry: object, error: BaseException) -> None:
        raise errors.PluginBroken(_why_broken(kind, entry, error)) from error

    try:
        manager = Chosen(
            namespace=kind.group, name=entry.name, on_load_failure_callback=failed, on_missing_entrypoints_callback=None
        )
    except AssertionError as error:  # stevedore passes these through
        raise errors.PluginBroken(_why_broken(kind, entry, error)) from error
    module: Any = manager.extensions[0].plugin  # Any: stevedore calls it a type, our entry points name modules
    if not isinstance(module, types.ModuleType):
        raise errors.PluginIncompatible(f"the entry point {entry.value!r} of {_distribution_name(entry)} is no module")
    return module


def _why_broken(kind: PluginKind, entry: importlib.metadata.EntryPoint, error: BaseException) -> str:
    owner = _distribution_name(entry)
    what = f"{kind.name} plugin {entry.name!r} of {owner} cannot be imported"
    if isinstance(error, ModuleNotFoundError) and error.name:
        library = error.name.partition(".")[0]
        own = entry.value.partition(":")[0].partition(".")[0]
        if library == own:
            return f"{what}: its module {error.name!r} is missing; try: pip install --force-reinstall {owner}"
        return f"{what}: the library {library!r} is missing; try: pip install --force-reinstall {owner}"
    return f"{what}: {type(error).__name__}: {error}"


@dataclass(slots=True)
class PluginHost:
    """The plugins of one process (or of one test)."""

    _pluggy: pluggy.PluginManager | None = None
    _loaded: dict[tuple[str, str], types.ModuleType] = field(default_factory=dict)

    @property
    def manager(self) -> pluggy.PluginManager:
        """pluggy's manager with our specifications, made when first used."""
        if self._pluggy is None:
            import pluggy

            from sheepdog.contracts import hookspecs

            self._pluggy = pluggy.PluginManager(hookspecs.PROJECT)
            self._pluggy.add_hookspecs(hookspecs)
        return self._pluggy

    def load(self, kind: str, name: str) -> types.ModuleType:
        """The plugin's module, imported, registered and found to fit. Asking again gives the same module.

        :param kind: a key of ``KINDS``.
        :raises PluginMissing: nothing of that name is installed.
        :raises PluginAmbiguous: two distributions offer it; neither was imported.
        :raises PluginBroken: its import fails.
        :raises PluginIncompatible: it was written for another API, or its hooks do not fit ours.
        """
        if (kind, name) not in self._loaded:
            kind_of = KINDS[kind]
            entry = _find(kind_of, name)
            module = _import(kind_of, entry)
            self.register(kind, module, f"{kind} plugin {name!r} of {_distribution_name(entry)}")
            self._loaded[kind, name] = module
        return self._loaded[kind, name]

    def register(self, kind: str, module: types.ModuleType, title: str) -> None:
        """``module`` is a plugin of ``kind`` and fits. Registering the same module again changes nothing.

        :param title: what error messages call it.
        :raises PluginIncompatible: as ``load``; the module is not registered.
        """
        _check_api(module, title)
        if self.manager.is_registered(module):
            self._check_hook(kind, module, title)
            return
        import pluggy

        try:
            self.manager.register(module)
            self.manager.check_pending()
            self._check_hook(kind, module, title)
        except pluggy.PluginValidationError as error:
            self._forget(module)
            reason = " ".join(str(error).split())
            raise errors.PluginIncompatible(f"{title} does not fit the hook specifications: {reason}") from error
        except errors.PluginIncompatible:
            self._forget(module)
            raise

    def _forget(self, module: types.ModuleType) -> None:
        if self.manager.is_registered(module):  # pluggy undoes some failures itself
            self.manager.unregister(module)

    def _check_hook(self, kind: str, module: types.ModuleType, title: str) -> None:
        hook = KINDS[kind].hook
        callers = {caller.name for caller in self.manager.get_hookcallers(module) or ()}
        if hook is not None and hook not in callers:
            raise errors.PluginIncompatible(
                f"{title} does not implement {hook}; is it marked with sheepdog.api.hookimpl?"
            )
        if not callers:
            raise errors.PluginIncompatible(f"{title} implements no hook; is it marked with sheepdog.api.hookimpl?")

    def make(self, kind: str, name: str, expected: type[T], **arguments: object) -> T:
        """What the maker hook of one plugin returns.

        :raises PluginIncompatible: it is not what the contract says; otherwise as ``load``.
        """
        module = self.load(kind, name)
        hook = KINDS[kind].hook
        assert hook is not None, kind
        others = [plugin for plugin in self.manager.get_plugins() if plugin is not module]
        made = self.manager.subset_hook_caller(hook, remove_plugins=others)(**arguments)
        if len(made) != 1 or not isinstance(made[0], expected):  # pluggy drops a result of None
            found = type(made[0]).__name__ if made else "nothing"
            raise errors.PluginIncompatible(f"{kind} plugin {name!r} made {found} instead of a {expected.__name__}")
        result: T = made[0]
        return result

    def load_observers(self, names: Sequence[str] | None = None) -> Announcer:
        """Every installed observer (or the named ones) hears what is announced through the result.

        An observer that cannot be loaded is logged and left out when it was not asked for by name.
        """
        from sheepdog.contracts import hookspecs

        wanted = names if names is not None else [entry.name for entry in _entry_points(KINDS["observer"])]
        modules = []
        for name in wanted:
            try:
                modules.append(self.load("observer", name))
            except errors.PluginError as error:
                if names is not None:
                    raise
                logger.warning("observer left out: %s", error)
        everybody = self.manager.get_plugins()
        return Announcer(
            {
                hook: [
                    # one caller per observer: pluggy would end the round at the first one that raises
                    self.manager.subset_hook_caller(hook, remove_plugins=everybody - {module})
                    for module in dict.fromkeys(modules)
                ]
                for hook in hookspecs.ANNOUNCEMENTS
            }
        )


def _check_api(module: types.ModuleType, title: str) -> None:
    from sheepdog.api import API_VERSION

    wanted = getattr(module, "SHEEPDOG_API", None)
    if not (isinstance(wanted, tuple) and len(wanted) == 2 and all(type(number) is int for number in wanted)):
        raise errors.PluginIncompatible(
            f"{title} does not state SHEEPDOG_API = (major, minor), for example {API_VERSION}"
        )
    major, minor = wanted
    if major != API_VERSION[0] or minor > API_VERSION[1]:
        ours = ".".join(map(str, API_VERSION))
        raise errors.PluginIncompatible(
            f"{title} was written for plugin API {major}.{minor}, this is {ours}; install the release that fits"
        )


class Announcer:
    """Tells observers what happened. Never raises: what an observer raises is logged and the others still hear."""

    def __init__(self, callers: Mapping[str, Sequence[Callable[..., object]]] | None = None) -> None:
        self._callers = callers or {}

    def _announce(self, hook: str, **arguments: object) -> None:
        for call in self._callers.get(hook, ()):
            try:
                call(**arguments)
            except Exception:
                logger.exception("an observer of %s failed", hook)

    def started(self, node: Node, epoch: int) -> None:
        """See ``sheepdog_started``."""
        self._announce("sheepdog_started", node=node, epoch=epoch)

    def stopped(self, node: Node) -> None:
        """See ``sheepdog_stopped``."""
        self._announce("sheepdog_stopped", node=node)

    def epoch_changed(self, epoch: int, nodes: tuple[Node, ...]) -> None:
        """See ``sheepdog_epoch_changed``."""
        self._announce("sheepdog_epoch_changed", epoch=epoch, nodes=nodes)

    def recovery_progressed(self, epoch: int, done: int, total: int) -> None:
        """See ``sheepdog_recovery_progressed``."""
        self._announce("sheepdog_recovery_progressed", epoch=epoch, done=done, total=total)

    def object_corrupt(self, oid: int, index: int, reason: str) -> None:
        """See ``sheepdog_object_corrupt``."""
        self._announce("sheepdog_object_corrupt", oid=oid, index=index, reason=reason)


_host = PluginHost()


def require(kind: str, name: str) -> None:
    """Exactly one plugin of that name is installed. Nothing is imported.

    :raises PluginMissing: none is.
    :raises PluginAmbiguous: two distributions offer it.
    """
    _find(KINDS[kind], name)


def load(kind: str, name: str) -> types.ModuleType:
    """``PluginHost.load`` of this process."""
    return _host.load(kind, name)


def load_observers(names: Sequence[str] | None = None) -> Announcer:
    """``PluginHost.load_observers`` of this process."""
    return _host.load_observers(names)


def split_spec(spec: str) -> tuple[str, str]:
    """``name[:options]`` in two; the options may contain further colons."""
    name, _, options = spec.partition(":")
    return name, options


def make_cluster_driver(spec: str, directory: str) -> ClusterDriver:
    """The driver that ``sheep -c name[:options]`` asks for. Errors as ``load``, and ``ConfigError`` for bad options.

    :param directory: the base directory of the sheep.
    """
    from sheepdog.contracts.cluster import ClusterDriver

    name, options = split_spec(spec)
    # mypy wants a concrete class for type[T]; an abstract one is exactly what is meant here
    arguments = {"options": options, "directory": directory}
    return _host.make("cluster", name, ClusterDriver, **arguments)  # type: ignore[type-abstract]  # see above


def make_object_store(name: str, options: StoreOptions) -> ObjectStore:
    """An open store of the layout ``name``. Errors as ``load``, and ``StoreError`` when no disk is usable."""
    from sheepdog.contracts.store import ObjectStore

    return _host.make("store", name, ObjectStore, options=options)  # type: ignore[type-abstract]  # a contract


def make_redundancy(name: str) -> RedundancyFactory:
    """The maker of schemes called ``name``. Errors as ``load``."""
    from sheepdog.contracts.redundancy import RedundancyFactory

    return _host.make("redundancy", name, RedundancyFactory)  # type: ignore[type-abstract]  # a contract


def make_redundancies(names: Sequence[str] | None = None) -> tuple[RedundancyFactory, ...]:
    """Factories for the named plugins, or for every installed one: which is needed is known only per volume.

    Without names a plugin other than ``copies`` that cannot be loaded is logged and left out; volumes that use it are
    then refused one by one instead of keeping the whole sheep from starting.
    """
    if names is not None:
        return tuple(make_redundancy(name) for name in names)
    factories = []
    for name in sorted({entry.name for entry in _entry_points(KINDS["redundancy"])}):
        try:
            factories.append(make_redundancy(name))
        except errors.PluginError as error:
            if name == "copies":
                raise
            logger.warning("redundancy scheme left out: %s", error)
    return tuple(factories)


def make_transport(name: str = "tcp") -> Transport:
    """A transport, made inside the event loop that will use it. Errors as ``load``."""
    from sheepdog.contracts.transport import Transport

    return _host.make("transport", name, Transport)  # type: ignore[type-abstract]  # a contract


def make_front_end(name: str, options: str) -> FrontEnd:
    """A front end that does not listen yet. Errors as ``load``, and ``ConfigError`` for bad options."""
    from sheepdog.contracts.frontend import FrontEnd

    return _host.make("frontend", name, FrontEnd, options=options)  # type: ignore[type-abstract]  # a contract
