"""What all cluster drivers do for real sheep: a cluster moves from one to the other, loses contact, and is misused."""

import json
import os
import random
import signal
import subprocess
from contextlib import ExitStack

import pytest

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
    """A cluster that was shut down starts on another driver with the same epoch and data, and tells which it is."""
    cluster = sheep_cluster(3, driver="local")
    fill(cluster)
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

        status = driver_status(cluster, 1)
        assert (status["driver"], status["session"], len(status["members"])) == (name, "alive", 3)
        assert status["round_trip_s"] > 0 and status["status"]["members"] == 3
        assert cluster.epoch(2) == epoch
        assert [read(cluster, node) == DATA for node in range(3)] == [True] * 3


# -- contact lost --


@pytest.mark.parametrize(
    ("start", "spec"),
    [
        (services.start_zookeeper, "zk:{}/sheepdog,timeout=2000"),
        (services.start_etcd, "etcd:{}/sheepdog,ttl=2"),
    ],
    ids=["zk", "etcd"],
)
def test_service_stops(sheep_cluster, tmp_path, servers, start, spec):
    """Without its coordination service no sheep serves; when it is back all are members again and nothing is lost."""
    service = start(tmp_path, servers)
    cluster = sheep_cluster(3, driver=spec.format(service.address))
    fill(cluster)
    os.kill(service.process.pid, signal.SIGSTOP)
    wait_until(lambda: not any(serving(cluster, i) for i in range(3)), "all sheep to stop serving", timeout_s=30)
    lost = cluster.dog("cluster", "driver", "--json", node=0, check=False)
    os.kill(service.process.pid, signal.SIGCONT)
    cluster.wait_recovered(timeout_s=90)

    assert lost.returncode == 2 and "error" in json.loads(lost.stdout)
    assert [read(cluster, node) == DATA for node in range(3)] == [True] * 3


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


@pytest.mark.parametrize("driver", ["local", "raft"])
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
    assert_refused(
        tmp_path,
        [
            ("zk:", "You must specify zookeeper servers"),
            ("etcd:", "no etcd endpoint"),
            ("raft:", "no raft voter"),
            ("zk:127.0.0.1:1/", "cluster id"),
            ("etcd:127.0.0.1:1/", "prefix"),
            ("raft:10.0.0.1:1,10.0.0.2:1", "password-file"),
            (f"local:{tmp_path}/none/file", "cluster file"),
        ],
    )


def test_nobody_answers(tmp_path):
    """Servers that cannot be reached end the sheep with 1, in bounded time, with their addresses."""
    one, two = services.free_ports(2)
    assert_refused(
        tmp_path,
        [
            (f"zk:{HOST}:{one},timeout=2000", f"failed to connect to zk server {HOST}:{one}"),
            (f"etcd:{HOST}:{one}", f"etcd {HOST}:{one} does not answer"),
            (f"raft:{HOST}:{one},{HOST}:{two}", "no raft leader among"),
        ],
    )


def test_wrong_secret(tmp_path, servers):
    """Who has the wrong password is not let in, and is told so where the service says so."""
    (tmp_path / "right").write_text("secret")
    (tmp_path / "wrong").write_text("guess")
    zookeeper = services.start_zookeeper(tmp_path, servers).address
    (voter,) = services.free_ports(1)
    raft = f"raft:{HOST}:{voter},self={HOST}:{voter},dir={tmp_path}/raft,password-file={tmp_path}/right"
    with (
        SheepCluster(1, driver=f"zk:{zookeeper}/s,timeout=2000,auth=me:secret", base=tmp_path / "zk"),
        SheepCluster(1, driver=raft, base=tmp_path / "members"),
    ):
        assert_refused(
            tmp_path,
            [
                (f"zk:{zookeeper}/s,timeout=2000,auth=me:guess", "denies access"),
                (f"raft:{HOST}:{voter},password-file={tmp_path}/wrong", "no raft leader among"),
            ],
        )
