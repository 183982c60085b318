"""Finding, loading and refusing plugins.

Fake distributions are directories on ``sys.path``: a module and the metadata that pip would have written.
"""

import subprocess
import sys
import textwrap

import pytest

from sheepdog import api, errors, plugins
from sheepdog.contracts import hookspecs

GOOD_STORE = """
    from sheepdog.api import ObjectStore, hookimpl
    SHEEPDOG_API = (1, 0)

    class Store(ObjectStore):
        def __init__(self, options):
            self.options = options
        __abstractmethods__ = frozenset()

    Store.__abstractmethods__ = frozenset()

    @hookimpl
    def sheepdog_object_store(options):
        return Store(options)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution with one module; everything is gone after the test."""
    installed = []

    def install(dist, module, source, entries, requires=()):
        site = tmp_path / dist
        info = site / f"{dist.replace('-', '_')}-0.9.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(textwrap.dedent(source))
        needs = "".join(f"Requires-Dist: {name}\n" for name in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 0.9\n{needs}")
        lines = [f"[{group}]\n{name} = {module}\n" for group, name in entries]
        (info / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(str(site))
        installed.append(module)

    yield install
    for module in installed:
        sys.modules.pop(module, None)


@pytest.fixture
def host():
    return plugins.PluginHost()


def test_loads_the_chosen_one(install, host):
    """The hook of the named plugin is called with the arguments, and the object that it makes comes out."""
    install("sheepdog-store-flat", "flat_store", GOOD_STORE, [("sheepdog.store", "flat")])

    store = host.make("store", "flat", api.ObjectStore, options=api.StoreOptions(disks=("/d",)))

    assert store.options.disks == ("/d",)
    assert host.load("store", "flat") is sys.modules["flat_store"]


def test_others_are_not_imported(install, host):
    """Loading one plugin imports no other one of its kind."""
    install("sheepdog-store-flat", "flat_store", GOOD_STORE, [("sheepdog.store", "flat")])
    install("sheepdog-store-bomb", "bomb_store", "raise SystemExit('imported')", [("sheepdog.store", "bomb")])

    host.load("store", "flat")

    assert "bomb_store" not in sys.modules


def test_only_the_chosen_maker_is_called(install, host):
    """With two plugins of a kind in the process each name still makes its own object."""
    install("sheepdog-store-one", "store_one", GOOD_STORE, [("sheepdog.store", "one")])
    install("sheepdog-store-two", "store_two", GOOD_STORE, [("sheepdog.store", "two")])
    options = api.StoreOptions(disks=())

    made = [host.make("store", name, api.ObjectStore, options=options) for name in ("one", "two", "one")]

    assert [type(store).__module__ for store in made] == ["store_one", "store_two", "store_one"]


def test_missing_names_the_package(install, host):
    """The message says what is installed and what to install."""
    install("sheepdog-store-flat", "flat_store", GOOD_STORE, [("sheepdog.store", "flat")])

    with pytest.raises(
        errors.PluginMissing, match=r"no store plugin 'zz' \(installed: .*flat.*pip install sheepdog-store-zz"
    ):
        host.load("store", "zz")


def test_missing_knows_names_that_differ(host):
    """zookeeper lives in sheepdog-cluster-zk."""
    assert plugins.package_for("cluster", "zookeeper") == "sheepdog-cluster-zk"
    assert plugins.package_for("cluster", "consul") == "sheepdog-cluster-consul"


def test_missing_suggests_a_near_name(install, host):
    """A typing error gets the name that was probably meant."""
    install("sheepdog-store-flat", "flat_store", GOOD_STORE, [("sheepdog.store", "flat")])

    with pytest.raises(errors.PluginMissing, match="did you mean 'flat'"):
        host.load("store", "flatt")


def test_ambiguous_names_both(install, host):
    """Two distributions with one name: neither is imported, both are named."""
    install("sheepdog-store-flat", "flat_store", GOOD_STORE, [("sheepdog.store", "flat")])
    install("acme-flat", "acme_flat", GOOD_STORE, [("sheepdog.store", "flat")])

    with pytest.raises(errors.PluginAmbiguous, match="acme-flat and sheepdog-store-flat"):
        host.load("store", "flat")

    assert "flat_store" not in sys.modules and "acme_flat" not in sys.modules


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_library.part", "the library 'no_such_library' is missing; .*sheepdog-store-bad"),
        ("import bad_store_missing_half", "the library 'bad_store_missing_half' is missing"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("assert False, 'wrong platform'", "AssertionError: wrong platform"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_broken_says_why(install, host, source, message):
    """An import that fails names the plugin, its distribution and the reason."""
    install("sheepdog-store-bad", "bad_store", source, [("sheepdog.store", "bad")])

    with pytest.raises(errors.PluginBroken, match=message) as caught:
        host.load("store", "bad")

    assert "store plugin 'bad' of sheepdog-store-bad" in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("SHEEPDOG_API = (1, 0)", "SHEEPDOG_API = (2, 0)", "written for plugin API 2.0, this is 1.0"),
        ("SHEEPDOG_API = (1, 0)", "SHEEPDOG_API = (1, 1)", "written for plugin API 1.1, this is 1.0"),
        ("SHEEPDOG_API = (1, 0)", "SHEEPDOG_API = (0, 9)", "written for plugin API 0.9"),
        ("SHEEPDOG_API = (1, 0)", "", "does not state SHEEPDOG_API"),
        ("SHEEPDOG_API = (1, 0)", "SHEEPDOG_API = '1.0'", "does not state SHEEPDOG_API"),
        ("def sheepdog_object_store(options)", "def sheepdog_object_store(options, colour)", "colour"),
        ("def sheepdog_object_store(options)", "def sheepdog_object_storage(options)", "sheepdog_object_storage"),
        ("@hookimpl", "", "does not implement sheepdog_object_store"),
        (
            "def sheepdog_object_store(options)",
            "def sheepdog_stopped(node)",
            "does not implement sheepdog_object_store",
        ),
    ],
)
def test_incompatible(install, host, old, new, message):
    """Another API version or a hook that fits no specification is refused before anything is called."""
    install("sheepdog-store-odd", "odd_store", GOOD_STORE.replace(old, new), [("sheepdog.store", "odd")])

    with pytest.raises(errors.PluginIncompatible, match=message):
        host.load("store", "odd")
    with pytest.raises(errors.PluginIncompatible, match=message):  # and nothing of it stays registered
        host.load("store", "odd")


def test_wrong_product(install, host):
    """A maker that returns something else than its contract is refused."""
    install(
        "sheepdog-store-odd",
        "odd_store",
        GOOD_STORE.replace("return Store(options)", "return 5"),
        [("sheepdog.store", "odd")],
    )

    with pytest.raises(errors.PluginIncompatible, match="made int instead of a ObjectStore"):
        host.make("store", "odd", api.ObjectStore, options=api.StoreOptions(disks=()))


def test_arguments_may_be_left_out(install, host):
    """An implementation takes only the arguments that it needs, so specifications can gain some."""
    source = GOOD_STORE.replace("def sheepdog_object_store(options)", "def sheepdog_object_store()").replace(
        "return Store(options)", "return Store(None)"
    )
    install("sheepdog-store-lean", "lean_store", source, [("sheepdog.store", "lean")])

    assert host.make("store", "lean", api.ObjectStore, options=api.StoreOptions(disks=())).options is None


def test_one_module_two_names(install, host):
    """An alias (zk, zookeeper) is the same plugin."""
    install("sheepdog-store-flat", "flat_store", GOOD_STORE, [("sheepdog.store", "flat"), ("sheepdog.store", "even")])

    assert host.load("store", "flat") is host.load("store", "even")


OBSERVER = """
    from sheepdog.api import hookimpl
    SHEEPDOG_API = (1, 0)
    seen = []

    @hookimpl
    def sheepdog_epoch_changed(epoch, nodes):
        seen.append((epoch, nodes))

    @hookimpl
    def sheepdog_object_corrupt(oid):
        seen.append(oid)
        raise RuntimeError("the observer is ill")
"""


def test_observers_hear(install, host, caplog):
    """Announcements reach every observer; what an observer raises is logged and harms nobody."""
    install("sheepdog-observer-a", "observer_a", OBSERVER, [("sheepdog.observer", "a")])
    install("sheepdog-observer-b", "observer_b", OBSERVER, [("sheepdog.observer", "b")])
    announcer = host.load_observers(["a", "b"])

    announcer.epoch_changed(4, ())
    announcer.stopped(None)
    announcer.object_corrupt(77, -1, "digest differs")

    assert [sys.modules[name].seen for name in ("observer_a", "observer_b")] == [[(4, ()), 77]] * 2
    assert "the observer is ill" in caplog.text


def test_broken_observer_is_left_out(install, host, caplog):
    """Without being asked for by name, an observer that cannot be loaded is a warning, not the end of the sheep."""
    install("sheepdog-observer-a", "observer_a", "import no_such_library", [("sheepdog.observer", "a")])

    host.load_observers().started(None, 1)

    assert "no_such_library" in caplog.text
    with pytest.raises(errors.PluginBroken):
        host.load_observers(["a"])


def test_list_reads_without_importing(install):
    """Rows are complete, in order, and no backend was imported."""
    bomb = "raise SystemExit('imported')"
    install(
        "sheepdog-store-bomb", "bomb_store", bomb, [("sheepdog.store", "bomb")], requires=["anyio>=4", "no-such-lib<3"]
    )
    install("acme-one", "acme_one", bomb, [("sheepdog.store", "twice")])
    install("acme-two", "acme_two", bomb, [("sheepdog.store", "twice")], requires=['no-such-extra; extra == "x"'])

    rows = [row for row in plugins.list_plugins(["store"]) if row.version == "0.9"]

    assert [(row.kind, row.name, row.distribution, row.version, row.state) for row in rows] == [
        ("store", "bomb", "sheepdog-store-bomb", "0.9", "needs no-such-lib"),
        ("store", "twice", "acme-one", "0.9", "ambiguous"),
        ("store", "twice", "acme-two", "0.9", "ambiguous"),
    ]


def test_built_ins_come_the_same_way():
    """copies and tcp are listed like any plugin, from core's own distribution."""
    rows = {(row.kind, row.name): row.distribution for row in plugins.list_plugins()}

    assert rows["redundancy", "copies"] == rows["transport", "tcp"] == "sheepdog-core"


def test_split_spec():
    """Only the first colon separates."""
    assert plugins.split_spec("zk:10.0.0.1:2181,10.0.0.2:2181/prod") == ("zk", "10.0.0.1:2181,10.0.0.2:2181/prod")
    assert plugins.split_spec("local") == ("local", "")


def test_hook_specifications_are_documented():
    """Every specification says what it is for and is listed as a maker or an announcement."""
    specs = [name for name, value in vars(hookspecs).items() if hasattr(value, "sheepdog_spec")]

    assert sorted(specs) == sorted(hookspecs.MAKERS + hookspecs.ANNOUNCEMENTS)
    for name in specs:
        assert (getattr(hookspecs, name).__doc__ or "").strip(), name


def test_every_kind_has_a_maker():
    """Kinds and maker hooks fit one to one; only observers have none."""
    hooks = [kind.hook for kind in plugins.KINDS.values() if kind.hook]

    assert tuple(hooks) == hookspecs.MAKERS
    assert plugins.KINDS["observer"].hook is None


def test_api_is_cheap_to_import():
    """The plugin API pulls in no event loop, no pluggy, no stevedore and no third-party package."""
    program = (
        "import sys; before = set(sys.modules); import sheepdog.api, sheepdog.plugins; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'anyio', 'asyncio', 'pluggy', 'stevedore', 'cbor2', 'uvloop', 'trio', 'numpy'}))"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_api_exports_exist():
    """Whatever ``__all__`` promises can be imported."""
    for name in api.__all__:
        assert getattr(api, name) is not None


def test_map_errors():
    """Foreign exceptions leave as ours, with the original as the cause; ours and unknown ones pass."""
    with (
        pytest.raises(errors.StoreFull, match="no room") as caught,
        api.map_errors({KeyError: errors.StoreBusy, OSError: errors.StoreFull}),
    ):
        raise OSError("no room")
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(errors.SessionLost), api.map_errors({Exception: errors.StoreBusy}):
        raise errors.SessionLost("gone")
    with pytest.raises(ZeroDivisionError), api.map_errors({KeyError: errors.StoreBusy}):
        1 / 0  # noqa: B018  (it is there to raise)
