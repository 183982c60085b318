"""What dog knows: commands, subcommands, their options and arguments. Data only, so that looking at it costs nothing.

Each subcommand names the module of ``sheepdog_cli.dog_commands`` that does it; nothing else of the package is imported
for it. ``letters`` gives its options in the order in which its usage shows them; a letter means what the family's
option list says, else what ``COMMON`` says. Options without a letter are our own: ``--json`` on listings, and those of
``long``.
"""

from __future__ import annotations

from typing import NamedTuple

from sheepdog_cli.getopt import Option


class Nested(NamedTuple):
    """A word below a subcommand, as ``map`` in ``dog vdi object map``."""

    name: str
    help: str
    needs_argument: bool = False
    nodes: bool = False
    nested: tuple[Nested, ...] = ()


class Command(NamedTuple):
    """One subcommand.

    ``nodes``: the node list is fetched before it runs. ``needs_argument``: without arguments only the usage is shown.
    """

    family: str
    name: str
    help: str
    letters: str
    module: str
    synopsis: str = ""
    nodes: bool = False
    needs_argument: bool = False
    nested: tuple[Nested, ...] = ()
    json: bool = False
    long: tuple[Option, ...] = ()


RAW_HELP = "raw output: no headings, sizes in bytes,\n" + " " * 26 + "words separated by single blanks"

COMMON = {
    "a": Option("a", "address", "address", "sheep to contact"),
    "p": Option("p", "port", "port", "its TCP port"),
    "r": Option("r", "raw", "", RAW_HELP),
    "v": Option("v", "verbose", "", "print more"),
    "T": Option("T", "time", "", "print the elapsed time at the end"),
    "h": Option("h", "help", "", "this text"),
}

JSON = Option("", "json", "", "print one JSON document")
DRY_RUN = Option("", "dry-run", "", "say what is wrong and repair nothing")


def _options(*rows: Option) -> dict[str, Option]:
    return {row.letter: row for row in rows}


FAMILY_OPTIONS: dict[str, dict[str, Option]] = {
    "vdi": _options(
        Option("P", "prealloc", "", "write every object at once"),
        Option("n", "no-share", "", "copy the objects instead of sharing them"),
        Option("i", "index", "index", "index of a data object"),
        Option("s", "snapshot", "snapshot", "snapshot, by id or tag"),
        Option("x", "exclusive", "", "fail if the key exists"),
        Option("d", "delete", "", "delete the key"),
        Option("w", "writeback", "", "allow write-back caching"),
        Option("c", "copies", "copies", "redundancy: N copies, or D:P strips"),
        Option("m", "max-reclaim", "max", "clear at most that many entries"),
        Option("F", "from", "snapshot", "the snapshot to compare with"),
        Option("f", "force", "", "ask nothing"),
        Option("y", "hyper", "", "a hyper volume (up to 16 PB)"),
        Option("o", "oid", "oid", "object id, in hex"),
        Option("e", "exist", "", "only look whether objects exist"),
        Option("z", "block_size_shift", "shift", "log2 of the object size, 20 to 31"),
        Option("R", "reduce-identical-snapshots", "", "no snapshot if nothing changed since the last"),
        Option("B", "nr-batched-reclamation", "number", "entries cleared per request"),
        Option("I", "reclamation-interval", "seconds", "pause between those requests"),
    ),
    "node": _options(
        Option("A", "all", "", "all nodes, not only the contacted one"),
        Option("P", "progress", "", "follow the recovery of the node"),
        Option("w", "watch", "", "repeat every second"),
        Option("l", "local", "", "the contacted node itself"),
        Option("R", "rate", "MB/s", "read at most so much"),
        Option("f", "force", "", "ask nothing"),
    ),
    "cluster": _options(
        Option("b", "store", "store", "store driver of all nodes"),
        Option("c", "copies", "copies", "default redundancy: N copies, or D:P strips"),
        Option("f", "force", "", "ask nothing"),
        Option("F", "avoid-diskfull", "", "skip recovery that would fill a disk"),
        Option("l", "lock", "", "enforce the locking of vdis"),
        Option("m", "multithread", "", "use several threads"),
        Option("R", "recyclevid", "", "use the ids of deleted vdis again"),
        Option("t", "strict", "", "refuse writes while zones are fewer than copies"),
        Option("z", "block_size_shift", "shift", "default log2 of the object size, 20 to 31"),
        Option("V", "fixedvnodes", "", "all sheep have fixed numbers of vnodes"),
        Option("d", "diff", "", "show what changed from epoch to epoch"),
    ),
    "upgrade": _options(Option("o", "orig-version", "version", "version that wrote the file, v0.7 or v0.8")),
    "benchmark": _options(
        Option("t", "total", "number", "number of writes"),
        Option("w", "workqueue", "type", "ordered, dynamic or fixed"),
        Option("n", "nr-threads", "number", "threads of a fixed queue"),
        Option("f", "force", "", "ask nothing"),
    ),
    "trace": {},
    "nfs": {},
    "plugin": {},
}

_OBJECT = (
    Nested("location", "show which nodes hold an object", nodes=True),
    Nested("map", "show which objects are allocated"),
    Nested("dump-inode", "print an inode object from a file"),
)
_LOCK = (
    Nested("list", "list the locked vdis"),
    Nested("unlock", "release a lock by force", True),
)
_LOG = (
    Nested(
        "level",
        "the log level of the daemon",
        True,
        nested=(
            Nested("set", "change the level", True),
            Nested("get", "show the level"),
            Nested("list", "list all levels"),
        ),
    ),
)
_MD = (
    Nested("info", "show the disks", nodes=True),
    Nested("plug", "add disks", True),
    Nested("unplug", "take disks out", True),
)
_SCRUB = (
    Nested("status", "show what the scrub does and has found (default)", nodes=True),
    Nested("start", "look at everything that is stored", nodes=True),
    Nested("stop", "interrupt it", nodes=True),
)
_RECOVERY = (
    Nested("info", "show the nodes in recovery (default)"),
    Nested("set-throttle", "slow recovery down"),
    Nested("get-throttle", "show the throttle"),
)
_RECOVER = (
    Nested("force", "run a waiting cluster with the nodes present"),
    Nested("enable", "recover automatically"),
    Nested("disable", "do not recover automatically"),
)
_SNAPSHOT = (
    Nested("save", "save all snapshots of the cluster", True, nodes=True),
    Nested("list", "list what is saved", True),
    Nested("load", "load into a new cluster", True, nodes=True),
    Nested("show", "list the vdis of one saved state", True, nodes=True),
)

COMMANDS: tuple[Command, ...] = (
    Command("vdi", "check", "compare the copies of a vdi and repair them", "seaphT", "vdi_check",
            "<vdiname>", True, True, long=(DRY_RUN,)),
    Command("vdi", "create", "make a new vdi", "PycaphrvzT", "vdi_create", "<vdiname> <size>", True, True),
    Command("vdi", "snapshot", "freeze the state of a vdi", "saphrvTR", "vdi_snapshot", "<vdiname>", False, True),
    Command("vdi", "clone", "make a vdi from a snapshot", "sPnaphrvT", "vdi_clone", "<src vdi> <dst vdi>", False, True),
    Command("vdi", "delete", "delete a vdi or a snapshot", "saphTBIm", "vdi_delete", "<vdiname>", False, True),
    Command("vdi", "rollback", "go back to a snapshot", "saphfrvTBI", "vdi_rollback", "<vdiname>", False, True),
    Command("vdi", "list", "list vdis and snapshots", "aprhoT", "vdi_list", "[vdiname]", json=True),
    Command("vdi", "tree", "show snapshots as a tree", "aphT", "vdi_tree", json=True),
    Command("vdi", "graph", "show the family of all vdis for Graphviz", "aphT", "vdi_tree"),
    Command("vdi", "object", "look at objects", "isaphT", "vdi_object", "<vdiname>", False, True, _OBJECT, True),
    Command("vdi", "track", "show where an object was in each epoch", "isaphoT", "vdi_track",
            "<vdiname>", True, True, json=True),
    Command("vdi", "setattr", "store an attribute", "dxaphT", "vdi_attr", "<vdiname> <key> [value]", False, True),
    Command("vdi", "getattr", "print an attribute", "aphT", "vdi_attr", "<vdiname> <key>", False, True),
    Command("vdi", "resize", "make a vdi larger", "aphT", "vdi_resize", "<vdiname> <new size>", False, True),
    Command("vdi", "read", "copy data to stdout", "saphT", "vdi_io", "<vdiname> [<offset> [<len>]]", False, True),
    Command("vdi", "write", "copy data from stdin", "apwhT", "vdi_io", "<vdiname> [<offset> [<len>]]", False, True),
    Command("vdi", "backup", "write the difference of two snapshots", "sFaphT", "vdi_backup", "<vdiname>", True, True),
    Command("vdi", "restore", "make a snapshot from a backup", "saphTBI", "vdi_restore", "<vdiname>", True, True),
    Command("vdi", "alter-copy", "change the number of copies", "caphTf", "vdi_alter_copy", "<vdiname>", True, True),
    Command("vdi", "lock", "look at locks", "saphT", "vdi_lock", "<vdiname>", False, True, _LOCK, True),
    Command("node", "kill", "stop a node", "aprhlT", "node_kill", "<node id>", True),
    Command("node", "list", "list the nodes", "aprhT", "node_list", nodes=True, json=True),
    Command("node", "info", "show the space on each node", "aprhT", "node_info", nodes=True, json=True),
    Command("node", "recovery", "show or throttle recovery", "aphPrT", "node_recovery",
            "[<max> <interval>]", True, False, _RECOVERY, True),
    Command("node", "md", "look at or change the disks", "aprAfhT", "node_md", "[disks]", False, True, _MD, True),
    Command("node", "scrub", "look for corrupt objects and repair them", "aprARhT", "node_scrub",
            "", False, False, _SCRUB, True),
    Command("node", "stat", "show the counters of a node", "aprwhT", "node_stat", json=True),
    Command("node", "log", "look at or change the log level", "aphT", "node_log", "", False, True, _LOG, True),
    Command("node", "vnodes", "change the number of virtual nodes", "aph", "node_vnodes",
            "<num of vnodes>", False, True,
            (Nested("set", "change the number of virtual nodes", True),)),
    Command("node", "format", "write the store format of a node", "aphT", "node_format",
            "<directory of sheep> <a name of store format>", False, True),
    Command("cluster", "info", "show the cluster and its epochs", "aprhvTd", "cluster_info", nodes=True, json=True),
    Command("cluster", "format", "make a new, empty cluster", "bcltaphzTVRfF", "cluster_format", nodes=True),
    Command("cluster", "shutdown", "stop all nodes", "aphT", "cluster_admin"),
    Command("cluster", "snapshot", "save and load the cluster", "aphTm", "cluster_snapshot",
            "<tag|idx> <path> [vdi1] [vdi2] ...", False, True, _SNAPSHOT, True),
    Command("cluster", "recover", "control recovery", "afphT", "cluster_admin", "", False, True, _RECOVER),
    Command("cluster", "reweight", "measure all disks again", "aphT", "cluster_admin"),
    Command("cluster", "check", "check and repair all vdis", "aphT", "cluster_check", nodes=True,
            long=(DRY_RUN,)),
    Command("cluster", "alter-copy", "change the default number of copies", "aphTcf", "cluster_alter_copy", nodes=True),
    Command("cluster", "driver", "show what keeps the cluster together", "aprhT", "cluster_driver",
             nested=(Nested("status", "show its state; also without this word"),), json=True),
    Command("trace", "enable", "start a tracer", "aph", "trace", "<tracer>", False, True),
    Command("trace", "disable", "stop a tracer and fetch what it saw", "aph", "trace", "<tracer>", False, True),
    Command("trace", "status", "show the tracers", "aph", "trace"),
    Command("trace", "graph", "show what the function tracer saw", "aph", "trace", "", False, True,
            (Nested("cat", "print every call"), Nested("stat", "print the time per function"))),
    Command("nfs", "create", "export a vdi by NFS", "aph", "nfs", "<vdiname>", False, True),
    Command("nfs", "delete", "end the export of a vdi", "aph", "nfs", "<vdiname>", False, True),
    Command("upgrade", "inode-convert", "convert an inode object", "ohT", "upgrade",
            "<old file> <new file>", False, True),
    Command("upgrade", "epoch-convert", "convert an epoch file", "ohT", "upgrade",
            "<old file> <new file>", False, True),
    Command("upgrade", "config-convert", "convert a config file", "hT", "upgrade",
            "<old file> <new file>", False, True),
    Command("upgrade", "object-location", "show the first holder of an object", "hT", "upgrade",
            "<epoch file> <oid>", False, True),
    Command("upgrade", "store-convert", "move the objects of a stopped sheep to another store", "hT", "upgrade",
            "<path> <plain|tree>", False, True),
    Command("benchmark", "io", "measure writes to a vdi", "aprhTfwtn", "benchmark", "<vdiname>", True, True),
    Command("plugin", "list", "list the installed plugins", "rh", "plugin", json=True),
)  # fmt: skip


def find(family: str, name: str) -> Command | None:
    for command in COMMANDS:
        if command.family == family and command.name == name:
            return command
    return None


def families() -> list[str]:
    return list(dict.fromkeys(command.family for command in COMMANDS))


def options_of(command: Command) -> list[Option]:
    """The options that the subcommand takes, in the order of its usage."""
    family = FAMILY_OPTIONS[command.family]
    options = [family.get(letter) or COMMON[letter] for letter in command.letters]
    options.extend(command.long)
    if command.json:
        options.append(JSON)
    return options
