"""Rules about the code itself: which way imports point, what files may contain, what is documented."""

import ast
import functools
import os
import re
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
CORE = CHECKOUT / "core" / "src" / "sheepdog"
PYTHON_LINES_MAX = 700
SKIPPED_DIRECTORIES = {".git", ".venv", ".tox", "__pycache__", ".hypothesis", "build", "dist", "node_modules"}
PLUGIN_DIRECTORIES = sorted(path.parent for path in (CHECKOUT / "plugins").glob("*/pyproject.toml"))


def files(*suffixes):
    """Every file of the checkout that is meant to be kept, in order."""
    for directory, names, found in os.walk(CHECKOUT):
        names[:] = sorted(
            name
            for name in names
            if name not in SKIPPED_DIRECTORIES and not name.endswith((".egg-info", "_cache")) and name[:1] != "."
        )
        for name in sorted(found):
            if not suffixes or name.endswith(suffixes):
                yield Path(directory) / name


@functools.cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path, *, type_checking=True):
    """(line, module) of every import in a file; those under TYPE_CHECKING can be left out."""
    found = []

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not type_checking:
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.extend((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.lineno, node.module))
            found.extend((node.lineno, f"{node.module}.{name.name}") for name in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(parse(path))
    return found


def is_in(module, packages):
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def offenders(paths, forbidden, *, allowed=(), type_checking=False):
    """What these files import although they must not, as "file:line module"."""
    return [
        f"{path.relative_to(CHECKOUT)}:{line} {module}"
        for path in paths
        for line, module in imports(path, type_checking=type_checking)
        if is_in(module, forbidden) and not is_in(module, allowed)
    ]


def room(name):
    return sorted((CORE / name).rglob("*.py"))


PLUGIN_PACKAGES = [path.name for plugin in PLUGIN_DIRECTORIES for path in (plugin / "src").iterdir() if path.is_dir()]


@pytest.mark.parametrize("plugin", PLUGIN_DIRECTORIES, ids=lambda path: path.name)
def test_plugins_import_the_api_only(plugin):
    """A plugin sees ``sheepdog.api`` and itself: no other part of core, and no other plugin."""
    own = [path.name for path in (plugin / "src").iterdir()]
    sources = sorted((plugin / "src").rglob("*.py"))

    assert sources
    forbidden = ["sheepdog", "sheepdog_cli", *PLUGIN_PACKAGES]
    bare = ["sheepdog.api", *own]
    found = offenders(sources, forbidden, allowed=bare, type_checking=True)
    assert [line for line in found if not line.endswith(" sheepdog")] == []


def test_built_ins_see_what_plugins_see():
    """What core ships as plugins is written against the plugin interface, with no private door into the daemon."""
    forbidden = [f"sheepdog.{name}" for name in ("daemon", "client", "wire", "plugins", "testing", "model")]
    assert offenders(room("builtin"), [*forbidden, "sheepdog_cli", *PLUGIN_PACKAGES], type_checking=True) == []


@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        ("model", ["wire", "contracts", "daemon", "client", "builtin", "plugins", "api", "testing"]),
        ("wire", ["contracts", "daemon", "client", "builtin", "plugins", "api", "testing"]),
        ("contracts", ["wire", "daemon", "client", "builtin", "plugins", "api", "testing"]),
        ("client", ["daemon", "builtin", "testing"]),
        ("daemon", ["client", "testing"]),
    ],
)
def test_core_points_one_way(name, forbidden):
    """daemon, client -> wire, model, contracts -> errors; nothing points back."""
    assert room(name)
    assert offenders(room(name), [f"sheepdog.{other}" for other in forbidden]) == []


def test_errors_stand_at_the_bottom():
    """``sheepdog.errors`` imports nothing of ours."""
    assert offenders([CORE / "errors.py"], ["sheepdog"]) == []


def test_core_knows_no_plugin():
    """Core imports no plugin, no command line, and no library that only these need."""
    forbidden = [*PLUGIN_PACKAGES, "sheepdog_cli", "typer", "kazoo", "etcd3", "pysyncobj", "pyeclib", "zfec"]
    sources = sorted(CORE.rglob("*.py"))

    assert offenders(sources, forbidden, type_checking=True) == []


def test_core_is_tested_alone():
    """Tests of core that cannot even be imported without a plugin are left out where core is installed alone."""
    directory = CHECKOUT / "core" / "tests" / "daemon"
    left_out = set(re.findall(r'"(test_\w+\.py)"', (directory / "conftest.py").read_text(encoding="utf-8")))

    def wanted(path):
        names = set()
        for node in parse(path).body:  # what stands deeper is met when it is asked for
            if isinstance(node, ast.ImportFrom):
                names.add(node.module)
            elif isinstance(node, ast.Import):
                names.update(name.name for name in node.names)
        return names.union(*(wanted(directory / f"{name}.py") for name in names if (directory / f"{name}.py").exists()))

    plugins = {path.parent.name for path in (CHECKOUT / "plugins").glob("*/src/*/__init__.py")}
    needing = {path.name for path in directory.glob("test_*.py") if wanted(path) & plugins}

    assert plugins
    assert needing - left_out == set()


def test_pluggy_and_stevedore_have_one_home():
    """Both are used in ``sheepdog/plugins.py`` alone, so nothing else depends on how plugins are found."""
    sources = [path for path in files(".py") if path != CORE / "plugins.py" and "src" in path.parts]

    assert offenders(sources, ["pluggy", "stevedore"], type_checking=True) == []


def test_pure_rooms_do_no_io():
    """model and wire compute; they open, wait for and start nothing."""
    forbidden = ["anyio", "asyncio", "socket", "selectors", "threading", "subprocess", "pathlib", "tempfile", "trio"]

    assert offenders([*room("model"), *room("wire")], forbidden) == []


def test_daemon_takes_time_and_chance_from_services():
    """The daemon asks its services for time and randomness, so that a simulation can own both."""
    found = []
    for path in room("daemon"):
        if path.name in {"clock.py", "spawner.py", "session.py"}:
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in {"time.time", "time.monotonic", "time.sleep", "random.random", "random.randrange"}:
                    found.append(f"{path.relative_to(CHECKOUT)}:{node.lineno} {called}")

    assert found == []


# The words are put together here, so that this file does not contain them.
FORBIDDEN = {
    "a path of somebody's machine": r"(?<![\w.])/(?:wo" + r"rk|fa" + r"rm)/",
    "a stub": "NotImplemented" + r"Error\b",
    "a postponed piece": r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b",
    "a number of somebody's tracker": r"\bissue\s#?\d+",
    "how the text was made": r"\b(?:sub" + r"agent|LL" + r"M|Cla" + r"ude|Chat" + r"GPT)s?\b",
    "a test that cannot fail": r"\bassert Tr" + r"ue\b|mark\.xf" + r"ail\b",
}


def test_forbidden_words():
    """No stub, no postponed piece, no machine's own path, no test that cannot fail."""
    found = []
    for path in files(".py", ".md", ".toml", ".ini", ".cfg", ".sh", ".yml", ".txt"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for what, pattern in FORBIDDEN.items():
                if re.search(pattern, line):
                    found.append(f"{path.relative_to(CHECKOUT)}:{number}: {what}: {line.strip()[:80]}")

    assert found == []


def test_files_are_short():
    """A Python file that grows beyond this has probably found a second purpose."""
    long = {
        str(path.relative_to(CHECKOUT)): count
        for path in files(".py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > PYTHON_LINES_MAX
    }

    assert long == {}


def definitions(tree, *, inside=""):
    """(qualified name, node) of public classes and functions, methods included."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{inside}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, inside=f"{inside}{node.name}.")


def test_modules_open_with_prose():
    """Every module that is installed says first what it is for."""
    silent = [
        str(path.relative_to(CHECKOUT))
        for path in files(".py")
        if "src" in path.parts and not ast.get_docstring(parse(path)) and path.read_text(encoding="utf-8").strip()
    ]

    assert silent == []


def test_contracts_are_documented():
    """Each public class of the contracts has a docstring, and so has each method that a plugin must write."""
    silent = []
    for path in room("contracts"):
        for name, node in definitions(parse(path)):
            abstract = any("abstractmethod" in ast.unparse(mark) for mark in getattr(node, "decorator_list", ()))
            if not ast.get_docstring(node) and (isinstance(node, ast.ClassDef) or abstract):
                silent.append(f"{path.name}: {name}")

    # the counterpart of pause_reading, which says it for both; and an address that is what its name says
    assert sorted(silent) == ["transport.py: Channel.local", "transport.py: Channel.resume_reading"]


def test_hooks_are_in_the_guide():
    """docs/plugins.md names every hook and every kind of plugin."""
    from sheepdog import plugins
    from sheepdog.contracts import hookspecs

    guide = (CHECKOUT / "docs" / "plugins.md").read_text()
    for hook in hookspecs.MAKERS + hookspecs.ANNOUNCEMENTS:
        assert f"`{hook}(" in guide, hook
    for kind in plugins.KINDS.values():
        assert f"`{kind.group}`" in guide, kind


def test_api_exports_the_contracts():
    """Whatever a contract module defines in public is to be had from ``sheepdog.api``, sorted and only once."""
    from sheepdog import api

    names = list(api.__all__)
    assert len(set(names)) == len(names)
    missing = []
    for path in room("contracts"):
        if path.stem in {"__init__", "hookspecs"}:
            continue
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name not in names:
                missing.append(f"{path.name}: {node.name}")
    for node in ast.parse((CORE / "errors.py").read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name not in names:
            missing.append(f"errors.py: {node.name}")
    assert missing == []


def distributions():
    for path in [CHECKOUT / "core", CHECKOUT / "cli", *PLUGIN_DIRECTORIES]:
        yield path, tomllib.loads((path / "pyproject.toml").read_text())["project"]


def test_one_version():
    """All distributions carry one version and want each other in exactly that version."""
    versions = {project["version"] for _, project in distributions()}
    assert len(versions) == 1
    (version,) = versions
    for path, project in distributions():
        for requirement in project.get("dependencies", ()):
            if requirement.startswith("sheepdog-"):
                assert requirement.endswith(f"=={version}"), (path, requirement)


def test_distributions_are_alike():
    """Name, module and entry points of a plugin follow from its directory; types are published with each."""
    for path, project in distributions():
        name = path.name.replace("_", "-")
        assert project["name"] == f"sheepdog-{name}"
        assert project["requires-python"] == ">=3.11" and project["license"] == "Apache-2.0"
        package = "sheepdog" if path.name == "core" else f"sheepdog_{path.name}"
        assert (path / "src" / package / "py.typed").exists(), path
        for group, entries in project.get("entry-points", {}).items():
            if path.name not in {"core", "cli"}:
                assert group == f"sheepdog.{path.name.partition('_')[0]}"
                assert set(entries.values()) == {package}


def test_first_screen_of_the_readme():
    """The two commands stand where a reader sees them without scrolling, and both can be run."""
    screen = (CHECKOUT / "README.md").read_text().splitlines()[:25]
    for command in ("demo", "check"):
        assert any(line.strip().startswith(f"./{command}") for line in screen), command
        assert (CHECKOUT / command).stat().st_mode & stat.S_IXUSR
    assert (CHECKOUT / ".ci" / "run").stat().st_mode & stat.S_IXUSR


def test_ci_script_is_a_shell_script():
    """bash can read it."""
    subprocess.run(["bash", "-n", str(CHECKOUT / ".ci" / "run")], check=True)


def test_tests_say_what_they_defend():
    """Every test has a docstring."""
    silent = []
    for path in files(".py"):
        if not (path.name.startswith("test_") or path.name.endswith("_kit.py")):
            continue
        for name, node in definitions(parse(path)):
            short = name.rpartition(".")[2]
            if short.startswith("test_") and not isinstance(node, ast.ClassDef) and not ast.get_docstring(node):
                silent.append(f"{path.relative_to(CHECKOUT)}: {name}")

    assert silent == []
