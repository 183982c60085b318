"""The option table of ``sheep`` and everything it prints about it."""

from __future__ import annotations

from sheepdog_cli.getopt import Option

VERSION = "1.0.1+py"
COLUMN = 18

# In the order of the help text: alphabetical ignoring case, lower case before upper case of the same letter.
OPTIONS = (
    Option("b", "bindaddr", "ADDRESS", "listen on this address only"),
    Option("c", "cluster", "DRIVER", "cluster driver and its options"),
    Option("D", "directio", "", "bypass the page cache for data objects"),
    Option("f", "foreground", "", "stay in the foreground"),
    Option("g", "gateway", "", "store no objects"),
    Option("h", "help", "", "this text"),
    Option("i", "ioaddr", "LIST", "second network for traffic between sheep"),
    Option("j", "journal", "LIST", "journal writes"),
    Option("l", "log", "LIST", "log level, format, directory and destination"),
    Option("n", "nosync", "", "do not wait for the disk"),
    Option("p", "port", "PORT", "TCP port (7000)"),
    Option("P", "pidfile", "PATH", "write the process id to a file"),
    Option("r", "http", "LIST", "serve objects by HTTP"),
    Option("R", "recovery", "LIST", "slow recovery down"),
    Option("u", "upgrade", "", "upgrade an older store layout, or say how to"),
    Option("v", "version", "", "print the version"),
    Option("V", "vnodes", "NUMBER", "fixed number of virtual nodes"),
    Option("w", "wq-threads", "LIST", "fixed numbers of threads"),
    Option("W", "wildcard-recovery", "", "ask every node in the first recovery"),
    Option("x", "max-dynamic-threads", "NUMBER", "most threads of a pool"),
    Option("y", "myaddr", "ADDRESS", "address announced to other sheep"),
    Option("z", "zone", "NUMBER", "failure zone"),
)  # fmt: skip

# Additions of this implementation; they have no letters.
EXTENSIONS = (
    Option("", "store", "NAME", "store plugin"),
    Option("", "redundancy", "NAME", "erasure code plugin"),
    Option("", "transport", "NAME", "transport plugin (tcp)"),
    Option("", "nbd", "ADDRESS", "serve volumes by NBD at [HOST:]PORT or unix:PATH; may be repeated"),
    Option("", "frontend", "NAME[:OPTIONS]", "serve volumes by another front end plugin; may be repeated"),
    Option("", "recovery-delay", "SECONDS", "wait before moving data when a node left, it may be back soon (0)"),
    Option("", "disk-vnodes", "", "vnodes belong to disks, in proportion to their sizes; for every sheep of a cluster"),
    Option("", "scrub", "LIST", "how often and how fast to look for corrupt objects"),
)

ALL_OPTIONS = OPTIONS + EXTENSIONS

TRY = "Try 'sheep --help' for more information."

# What is said on stdout when the argument of an option is missing.
ARGUMENT_HELP = {
    "bindaddr": """\
-b ADDRESS   listen on this IPv4 or IPv6 address only
Example:
\t$ sheep -b 192.168.1.1 /srv/sheep
""",
    "cluster": """\
-c DRIVER[:OPTIONS]   how sheep find each other
Examples:
\t$ sheep -c local /srv/sheep
\t$ sheep -c zookeeper:10.0.0.1:2181,10.0.0.2:2181/prod,timeout=3000 /srv/sheep
""",
    "ioaddr": """\
-i host=ADDRESS[,port=PORT]   listen here for other sheep, too (port 7000)
Example:
\t$ sheep -i host=10.1.0.5,port=7001 /srv/sheep
""",
    "journal": """\
-j size=SIZE[,dir=DIRECTORY][,skip]   journal writes in files of SIZE together (at least 64M);
skip: do not replay what a crash left
Example:
\t$ sheep -j size=256M,dir=/ssd/journal /srv/sheep
""",
    "log": """\
-l level=LEVEL,format=FORMAT,dir=DIRECTORY,dst=DESTINATION   in any order, all optional
LEVEL: emerg alert crit err warning notice info debug
FORMAT: server default json
DESTINATION: default (DIRECTORY/sheep.log), stdout, syslog
Example:
\t$ sheep -l level=debug,format=json,dir=/var/log /srv/sheep
""",
    "http": """\
-r host=HOST,port=PORT,buffer=SIZE,swift,s3   in any order, all optional
Example:
\t$ sheep -r host=localhost,port=8000,buffer=32M,swift /srv/sheep
""",
    "recovery": """\
-R max=NUMBER,interval=MILLISECONDS   pause after every NUMBER recovered objects
Example:
\t$ sheep -R max=50,interval=1000 /srv/sheep
""",
    "scrub": """\
--scrub interval=TIME,rate=MB/s   look at everything stored once in so long (7d), reading at most so much (32)
TIME: seconds, or a number with s, m, h or d; 0: only when 'dog node scrub start' asks for it
Example:
\t$ sheep --scrub interval=14d,rate=50 /srv/sheep
""",
    "vnodes": """\
-V NUMBER   fixed number of virtual nodes, 1 to 65535
Example:
\t$ sheep -V 100 /srv/sheep
""",
    "myaddr": """\
-y ADDRESS   address that other sheep and clients reach this one at
Example:
\t$ sheep -y 192.168.1.1 /srv/sheep
""",
    "zone": """\
-z NUMBER   failure zone, 0 to 4294967295; no two copies of an object are in one zone
Example:
\t$ sheep -z 1 /srv/sheep
""",
}


def help_text() -> str:
    """What ``sheep -h`` prints."""
    lines = [
        f"Sheepdog daemon (version {VERSION})",
        "Usage: sheep [OPTION]... [PATH] (default: /tmp)",
        "Options:",
    ]
    lines += [f"  -{option.letter}, --{option.name:<{COLUMN}}{option.help}" for option in OPTIONS]
    lines += [f"      --{option.name:<{COLUMN}}{option.help}" for option in EXTENSIONS]
    lines += ["", "Options that take lists print their keys when the list is missing, as in 'sheep -l'."]
    return "\n".join(lines) + "\n"


def installed(kind: str) -> list[str]:
    """Names of the installed plugins of a kind, sorted; nothing is imported."""
    from importlib.metadata import entry_points

    return sorted({entry.name for entry in entry_points(group=f"sheepdog.{kind}")})


def drivers_line() -> str:
    return "\tCluster drivers: " + " ".join(installed("cluster"))


def version_text(*, drivers: bool, disk_vnodes: bool) -> str:
    """What ``sheep -v`` prints.

    :param drivers: false when a driver was chosen already.
    :param disk_vnodes: vnodes belong to disks, as in an original that was built so; scripts may act on it.
    """
    lines = [f"Sheepdog daemon version {VERSION}", "", "Supported features:"]
    if drivers:
        lines.append(drivers_line())
    present: list[str] = [name for name in ("http", "nfs") if name in installed("frontend")]
    present += ["diskvnodes"] if disk_vnodes else []
    lines.append("\tMiscellaneous: " + " ".join([*present, "trace"]))
    return "\n".join(lines) + "\n"
