"""What all cluster drivers do for real sheep: a cluster moves from one to the other, loses contact, and is misused."""

import json
import random
import socket
import subprocess
import threading
import urllib.request
from contextlib import ExitStack, suppress

import pytest
from kazoo.client import KazooClient

from sheepdog.client import admin
from sheepdog.errors import SheepdogError
from sheepdog.testing import services
from sheepdog.testing.cluster import HOST, SheepCluster, run_python, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.service, pytest.mark.timeout(300)]

MiB = 1 << 20
DATA = random.Random(5).randbytes(5 * MiB)
END_S = 60.0  # for a sheep that cannot start; drivers give up after about ten seconds


@pytest.fixture
def servers():
    """What is put on it has ended when the test has."""
    with ExitStack() as stack:
        yield stack


def serving(cluster, index):
    """Whether that sheep carries out requests at this moment."""
    try:
        with cluster.connect(index, timeout_s=2.0) as connection:
            return connection.request(admin.OP_STAT_SHEEP, data_length=64).result == 0
    except (SheepdogError, OSError):
        return False


def fill(cluster):
    cluster.format()
    cluster.dog("vdi", "create", "a", "8M")
    cluster.dog("vdi", "write", "a", "0", str(len(DATA)), input=DATA)


def read(cluster, node):
    return cluster.dog("vdi", "read", "a", "0", str(len(DATA)), node=node).stdout


def driver_status(cluster, node=0):
    return json.loads(cluster.dog("cluster", "driver", "--json", node=node).stdout)


# -- one cluster, several drivers --


def test_from_driver_to_driver(sheep_cluster, tmp_path, servers):
    """A cluster that was shut down starts on another driver with the same epoch and data, and tells which it is.

    A sheep of another cluster that is sent to the same place ends with a message, and changes nothing (MEM-9).
    """
    cluster, foreign = sheep_cluster(3, driver="local"), sheep_cluster(1, driver="local")
    fill(cluster)
    foreign.format()
    foreign.stop(0)
    epoch = cluster.epoch(0)
    local = cluster._specs
    for kind, name in (("zk", "zookeeper"), ("etcd", "etcd"), ("raft", "raft"), ("local", "local")):
        cluster.dog("cluster", "shutdown")
        for sheep in cluster.sheep:
            assert sheep.process.wait(30) == 0
        cluster._specs = local if kind == "local" else services.driver_specs(kind, 3, tmp_path, servers)
        for index in range(3):
            cluster.restart(index, wait=False)
        cluster.wait_recovered()
        foreign._specs = [cluster._specs[0].partition(",self=")[0] + (",self=none" if kind == "raft" else "")]
        foreign.restart(0, wait=False)

        assert foreign.sheep[0].process.wait(END_S) == 1
        assert "joining node ctime doesn't match" in foreign.sheep[0].log_tail()
        status = driver_status(cluster, 1)
        assert (status["driver"], status["session"], len(status["members"])) == (name, "alive", 3)
        assert status["round_trip_s"] > 0 and status["status"]["members"] == 3
        assert cluster.epoch(2) == epoch
        assert [read(cluster, node) == DATA for node in range(3)] == [True] * 3


# -- contact lost --


STARTERS = {
    "zk": (services.start_zookeeper, "zk:{}/{},timeout=2000"),
    "etcd": (services.start_etcd, "etcd:{}/{},ttl=2"),
}
WITH_SERVICE = pytest.mark.parametrize("driver", list(STARTERS))
ALL = pytest.mark.parametrize("driver", ["local", "zk", "etcd", "raft"])


@WITH_SERVICE
def test_service_stops(sheep_cluster, tmp_path, servers, driver):
    """Without its coordination service no sheep serves; when it is back all are members again and nothing is lost."""
    start, spec = STARTERS[driver]
    service = start(tmp_path, servers)
    cluster = sheep_cluster(3, driver=spec.format(service.address, "sheepdog"))
    fill(cluster)
    service.pause()
    wait_until(lambda: not any(serving(cluster, i) for i in range(3)), "all sheep to stop serving", timeout_s=30)
    lost = cluster.dog("cluster", "driver", "--json", node=0, check=False)
    service.resume()
    cluster.wait_recovered(timeout_s=90)

    assert lost.returncode == 2 and "error" in json.loads(lost.stdout)
    assert [read(cluster, node) == DATA for node in range(3)] == [True] * 3


class Cable:
    """A way to a server that can be pulled out and plugged in again: connections stand, nothing gets through."""

    def __init__(self, address, stack):
        host, _, port = address.rpartition(":")
        self.target = (host, int(port))
        self.plugged = threading.Event()
        self.plugged.set()
        self.listener = stack.enter_context(socket.create_server((HOST, 0)))
        stack.callback(self.listener.shutdown, socket.SHUT_RDWR)
        self.address = f"{HOST}:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(self.target)
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source, target):
        with suppress(OSError), source, target:
            while data := source.recv(1 << 16):
                self.plugged.wait()
                target.sendall(data)


@WITH_SERVICE
def test_partition(sheep_cluster, tmp_path, servers, driver):
    """MEM-22: a sheep without contact stops serving while the others go on; with contact it is one of them again."""
    start, spec = STARTERS[driver]
    service = start(tmp_path, servers)
    cable = Cable(service.address, servers)
    cluster = sheep_cluster(3, driver=spec.format(cable.address, "sheepdog"))
    cluster._specs[:2] = [spec.format(service.address, "sheepdog")] * 2
    for index in range(2):
        cluster.stop(index)
        cluster.restart(index)
    fill(cluster)
    changed = bytes(MiB) + DATA[MiB:]
    cable.plugged.clear()
    wait_until(lambda: not serving(cluster, 2), "the sheep without contact to stop serving", timeout_s=30)
    wait_until(lambda: len(cluster.members(0)) == 2, "the others to go on", timeout_s=30)
    cluster.dog("vdi", "write", "a", "0", str(MiB), input=bytes(MiB), node=0)
    cable.plugged.set()
    cluster.wait_recovered(timeout_s=90)

    assert [read(cluster, node) == changed for node in range(3)] == [True] * 3


def zookeeper_password(session_id):
    """How ZooKeeper derives the password of a session from its number (``SessionTracker``, java.util.Random)."""
    seed = ((session_id ^ 0xB3415C00) ^ 0x5DEECE66D) & ((1 << 48) - 1)
    found = b""
    for _ in range(4):
        seed = (seed * 0x5DEECE66D + 0xB) & ((1 << 48) - 1)
        found += (seed >> 16).to_bytes(4, "little")
    return found


def end_session(driver, service, status):
    """The service itself ends the session that a sheep told of."""
    if driver == "zk":
        number = int(status["session"], 16)
        thief = KazooClient(service.address, client_id=(number, zookeeper_password(number)))
        thief.start()
        thief.stop()
        thief.close()
    else:
        body = json.dumps({"ID": int(status["lease"], 16)}).encode()
        with urllib.request.urlopen(f"http://{service.address}/v3/kv/lease/revoke", body, timeout=10) as answer:
            answer.read()


@WITH_SERVICE
def test_session_expires(sheep_cluster, tmp_path, servers, driver):
    """MEM-20: a sheep whose session the service ended is left behind, and comes back by itself as the same process.

    This holds for the oldest one too. Clients of the others see no error.
    """
    start, spec = STARTERS[driver]
    service = start(tmp_path, servers)
    cluster = sheep_cluster(3, driver=spec.format(service.address, "sheepdog"))
    fill(cluster)
    for victim, other in ((1, 0), (0, 2)):
        before = cluster.epoch(other)
        processes = [sheep.process.pid for sheep in cluster.sheep]
        end_session(driver, service, driver_status(cluster, victim)["status"])
        wait_until(lambda other=other, before=before: cluster.epoch(other) >= before + 2, "it to leave and come back")
        assert read(cluster, other) == DATA
        cluster.wait_recovered()

        assert [sheep.process.pid for sheep in cluster.sheep] == processes
        assert read(cluster, victim) == DATA
        cluster.dog("vdi", "create", f"after{victim}", "4M", node=victim)
        listings = [cluster.dog("vdi", "list", "-r", node=node).stdout for node in range(3)]
        assert all(f" after{victim} ".encode() in listing for listing in listings)


@ALL
def test_early_return(sheep_cluster, driver):
    """MEM-21: a sheep killed and started again at once, before anybody missed it, is a member in the end.

    ZooKeeper's ends with the original's words first, and has to be started once more.
    """
    cluster = sheep_cluster(3, driver=driver)
    fill(cluster)
    cluster.kill(1)
    cluster.sheep[1].start(cluster._specs[1], (), sync=False)  # at once; ``restart`` would wait for ZooKeeper
    if driver == "zk":
        assert cluster.sheep[1].process.wait(30) == 1
        assert "Previous zookeeper session exist, shoot myself. Please wait for" in cluster.sheep[1].log_tail()
        cluster.wait_members(timeout_s=60)  # the two others, who have seen it leave
        cluster.restart(1, wait=False)
    cluster.wait_recovered(timeout_s=90)

    assert [read(cluster, node) == DATA for node in range(3)] == [True] * 3


@WITH_SERVICE
def test_two_clusters(sheep_cluster, tmp_path, servers, driver):
    """MEM-23: clusters with different paths in one service never see each other, even while both change."""
    start, spec = STARTERS[driver]
    service = start(tmp_path, servers)
    one, other = (sheep_cluster(2, driver=spec.format(service.address, name)) for name in ("one", "other"))
    fill(one)
    one.kill(1)
    one.wait_members(timeout_s=60)
    other.format()

    assert [one.members(0), other.members(0)] == [{one.sheep[0].port}, {sheep.port for sheep in other.sheep}]
    assert b"Name" in other.dog("vdi", "list").stdout and b" a " not in other.dog("vdi", "list").stdout
    assert read(one, 0) == DATA


def test_raft_majority_dies(sheep_cluster):
    """The last of three voters serves nothing alone; with the others back the data is there."""
    cluster = sheep_cluster(3, driver="raft")
    fill(cluster)
    cluster.kill(0)
    cluster.kill(1)
    wait_until(lambda: not serving(cluster, 2), "the minority to stop serving", timeout_s=30)
    cluster.restart(0, wait=False)
    cluster.restart(1, wait=False)
    cluster.wait_recovered(timeout_s=90)

    assert [read(cluster, node) == DATA for node in range(3)] == [True] * 3


def raft_list(base, servers, count):
    """Addresses of Raft servers, and the options that all sheep have."""
    base.mkdir(exist_ok=True)
    (base / "secret").write_text("secret")
    addresses = [f"{HOST}:{port}" for port in services.hold_ports(count, servers)]
    return addresses, f"timeout=2000,password-file={base}/secret"


def test_raft_join_by_any_member(tmp_path, servers):
    """A sheep that was told only of one that does not vote joins by it, and does not need it any more afterwards.

    Of a longer list only the first few vote. Who is told of several, some of them dead, joins by any.
    """
    (voter, follower, dead), options = raft_list(tmp_path, servers, 3)
    everybody = f"raft:{voter},{follower},voters=1,{options}"
    cluster = SheepCluster(3, driver="raft", base=tmp_path / "sheep")
    servers.callback(cluster.close)
    cluster._specs = [
        f"{everybody},self={voter}",
        f"{everybody},self={follower}",
        f"raft:{follower},self=none,{options}",
    ]
    cluster.start()
    fill(cluster)
    roles = [driver_status(cluster, node)["status"] for node in range(3)]
    cluster.kill(1)
    cluster.pause(2)
    wait_until(lambda: len(cluster.members(0)) == 1, "both to be missed")
    cluster.resume(2)
    cluster.wait_recovered()
    rejoined = read(cluster, 2)
    cluster._specs[2] = f"raft:{dead},{follower},{voter},self=none,{options}"
    cluster.restart(2)
    cluster.restart(1)

    assert [(status["role"], status["voters"]) for status in roles] == [
        (r, voter) for r in ("voter", "follower", "follower")
    ]
    assert [status["answers_at"] for status in roles] == [voter, follower, None]
    assert rejoined == DATA and [read(cluster, node) == DATA for node in range(3)] == [True] * 3


def test_raft_voter_replaced(tmp_path, servers):
    """A host with a voter is lost for ever, and another one takes its place: the cluster serves, and afterwards it
    survives the loss of yet another voter."""
    (*voters, new), options = raft_list(tmp_path, servers, 4)
    old_list, new_list = ",".join(voters), ",".join([*voters[:2], new])
    cluster = SheepCluster(4, driver="raft", base=tmp_path / "sheep")
    servers.callback(cluster.close)
    cluster._specs = [f"raft:{old_list},{options},self={own}" for own in voters] + [
        f"raft:{old_list},{options},self=none"
    ]
    cluster.start()
    fill(cluster)
    cluster.kill(2)
    cluster.wait_recovered()
    cluster.stop(3)
    cluster._specs[:2] = [f"raft:{new_list},{options},self={own}" for own in voters[:2]]
    cluster._specs[3] = f"raft:{new_list},{options},self={new}"
    for index in (0, 1, 3):
        cluster.restart(index)
    cluster.wait_recovered()
    status = driver_status(cluster, 3)["status"]
    cluster.kill(0)
    cluster.wait_recovered()

    assert (status["role"], status["voters"]) == ("voter", new_list)
    assert [read(cluster, node) == DATA for node in (1, 3)] == [True] * 2


@ALL
def test_stopped_sheep_returns(sheep_cluster, driver):
    """A stopped process is left behind by the others, which go on; awake it joins again before it serves."""
    cluster = sheep_cluster(3, driver=driver)
    fill(cluster)
    changed = bytes(MiB) + DATA[MiB:]
    cluster.pause(1)
    cluster.wait_members(timeout_s=60)
    cluster.dog("vdi", "write", "a", "0", str(MiB), input=bytes(MiB), node=0)
    cluster.resume(1)
    # whatever it answers from the first moment on, it is not what was true before it slept
    first = cluster.dog("vdi", "read", "a", "0", str(MiB), node=1, check=False)
    cluster.wait_recovered(timeout_s=90)

    assert first.returncode != 0 or first.stdout == bytes(MiB)
    assert [read(cluster, node) == changed for node in range(3)] == [True] * 3


# -- misuse --


def start_sheep(base, index, spec):
    directory = base / f"bad{index}"
    (port,) = services.free_ports(1)
    words = ["-f", "-c", spec, "-b", HOST, "-y", HOST, "-p", str(port), "-l", "dst=stdout", str(directory)]
    command = run_python("sheepdog_cli.sheep", *words)
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def outcomes(base, specs):
    """Exit code and output of a sheep with each of these cluster options; all run at once."""
    processes = [start_sheep(base, index, spec) for index, spec in enumerate(specs)]
    try:
        return [(process.communicate(timeout=END_S)[0].decode(), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def assert_refused(base, expected):
    for (spec, words), (output, code) in zip(expected, outcomes(base, [spec for spec, _ in expected]), strict=True):
        assert code == 1, f"{spec} ended with {code}: {output}"
        assert words in output, f"{spec} said: {output}"
        assert "Traceback" not in output, output


def test_bad_options(tmp_path):
    """Options that make no sense end the sheep with 1 and with a message that names what is wrong."""
    (tmp_path / "secret").write_text("secret")
    assert_refused(
        tmp_path,
        [
            ("zk:", "You must specify zookeeper servers"),
            ("etcd:", "no etcd endpoint"),
            ("raft:", "no raft voter"),
            ("zk:127.0.0.1:1/", "cluster id"),
            ("zk:127.0.0.1:1/../x", "cannot be a path"),
            ("zk:127.0.0.1:port", "invalid zookeeper server"),
            ("etcd:127.0.0.1:1/", "prefix"),
            ("raft:10.0.0.1:1,10.0.0.2:1", "password-file"),
            (f"raft:{HOST}:1,{HOST}:2,password-file={tmp_path}/secret", "several raft voters are at our address"),
            (f"zk:{HOST}:1,tls=1,ca={tmp_path}/none.pem", "cannot use the certificate files"),
            (f"etcd:{HOST}:1,ca={tmp_path}/none.pem", "cannot read the certificate files"),
            (f"local:{tmp_path}/none/file", "cluster file"),
        ],
    )


def test_nobody_answers(tmp_path):
    """Servers that cannot be reached end the sheep with 1, in bounded time, with their addresses."""
    one, two = services.free_ports(2)
    (tmp_path / "secret").write_text("secret")
    assert_refused(
        tmp_path,
        [
            (f"zk:{HOST}:{one},timeout=2000", f"failed to connect to zk server {HOST}:{one}"),
            (f"etcd:{HOST}:{one}", f"etcd {HOST}:{one} does not answer"),
            (f"raft:{HOST}:{one},{HOST}:{two},self=none,password-file={tmp_path}/secret", "no raft leader among"),
        ],
    )


def test_wrong_secret(tmp_path, servers):
    """Who has the wrong password is not let in, and is told so where the service says so."""
    (tmp_path / "right").write_text("secret")
    (tmp_path / "wrong").write_text("guess")
    zookeeper = services.start_zookeeper(tmp_path, servers).address
    (voter,) = services.hold_ports(1, servers)
    raft = f"raft:{HOST}:{voter},password-file={tmp_path}/right"
    with (
        SheepCluster(1, driver=f"zk:{zookeeper}/s,timeout=2000,auth=me:secret", base=tmp_path / "zk"),
        SheepCluster(1, driver=raft, base=tmp_path / "members"),
    ):
        assert_refused(
            tmp_path,
            [
                (f"zk:{zookeeper}/s,timeout=2000,auth=me:guess", "denies access"),
                (f"raft:{HOST}:{voter},self=none,password-file={tmp_path}/wrong", "with the same secret?"),
            ],
        )
