"""Layouts and directories for the tests of the file store. Core is tested without its plugins."""

import os
import subprocess

import pytest

from sheepdog.builtin.filestore import FileStore, Layout
from sheepdog.contracts.store import StoreOptions
from sheepdog.model.ids import vid_of


class Flat(Layout):
    def directory(self, oid):
        return ""

    def directories(self):
        return ("",)


class ByVid(Layout):
    def directory(self, oid):
        return "even" if vid_of(oid) % 2 == 0 else "odd"

    def directories(self):
        return ("even", "odd")


@pytest.fixture(params=[Flat, ByVid], ids=["flat", "by-vid"])
def layout(request):
    return request.param()


@pytest.fixture
def by_vid():
    """The layout with sub-directories alone, for what only they can show."""
    return ByVid()


@pytest.fixture
def make(layout):
    """``make(path, ...)``: a store on these directories, which are made if need be."""

    def make(*paths, direct_io=False):
        return FileStore(StoreOptions(tuple(map(str, paths)), direct_io), layout)

    return make


@pytest.fixture
def mounted(tmp_path):
    """``mounted(name, mebibytes)``: a small file system of its own, and ``mounted.unmount(path)``."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mounts = []

    def mount(name, mebibytes):
        path = tmp_path / name
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "none", str(path)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("this environment does not allow mounts")
        mounts.append(path)
        try:
            os.setxattr(path, "user.probe", b"")
        except OSError:
            pytest.skip("this kernel's tmpfs takes no user attributes")
        return path

    def unmount(path):
        subprocess.run(["umount", str(path)], check=True)
        mounts.remove(path)

    mount.unmount = unmount
    yield mount
    for path in mounts:
        subprocess.run(["umount", "-l", str(path)], check=True)
