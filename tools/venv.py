"""Makes the virtual environment ``.venv`` of this checkout. Used by ``./demo`` and ``./check``; needs only Python.

The packages of the checkout are installed in place (``-e``), so the environment follows the sources. A stamp remembers
what was installed from which ``pyproject.toml`` files; as long as these are the same nothing is done. uv does the work
when pip can install it (seconds instead of a minute), pip itself otherwise.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
VENV = CHECKOUT / ".venv"
PYTHON_MIN = (3, 11)
STANDARD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def prepare_process() -> None:
    """This Python is new enough, and PATH names the directories of system tools even in an empty environment."""
    known = os.environ.get("PATH", "").split(":")
    os.environ["PATH"] = ":".join(
        [part for part in known if part] + [part for part in STANDARD_PATH.split(":") if part not in known]
    )
    if sys.version_info < PYTHON_MIN:
        for minor in range(14, PYTHON_MIN[1] - 1, -1):
            newer = shutil.which(f"python3.{minor}")
            if newer is not None:
                os.execv(newer, [newer, *sys.argv])
        sys.exit(f"Python {'.'.join(map(str, PYTHON_MIN))} or newer is needed; this is {sys.version.split()[0]}")


def packages() -> list[Path]:
    """The distributions of this checkout: core first, then the command lines, then the plugins."""
    return [
        CHECKOUT / "core",
        CHECKOUT / "cli",
        *sorted(path.parent for path in CHECKOUT.glob("plugins/*/pyproject.toml")),
    ]


def ensure(name: str, extra: Sequence[str] = ()) -> Path:
    """The environment has everything that ``name`` stands for; returns its Python.

    :param name: of the stamp: ``demo`` or ``check``.
    :param extra: requirements beside the packages of the checkout.
    """
    python = VENV / "bin" / "python"
    requirements = ["-e" + str(package) for package in packages()]
    if extra:
        requirements[0] += "[testing]"
    wanted = _fingerprint([*requirements, *extra])
    stamp = VENV / f"{name}.stamp"
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    if not python.exists() or not _works(python):
        print("making .venv", flush=True)
        _make(python)
    print("installing the packages of this checkout into .venv", flush=True)
    _install(python, [*requirements, *extra])
    stamp.write_text(wanted)
    return python


def _fingerprint(requirements: Sequence[str]) -> str:
    digest = hashlib.sha256("\n".join(requirements).encode())
    for package in packages():
        digest.update((package / "pyproject.toml").read_bytes())
    return digest.hexdigest()


def _works(python: Path) -> bool:
    return subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def _make(python: Path) -> None:
    shutil.rmtree(VENV, ignore_errors=True)
    tried = []
    # without PATH in the environment Python does not know its own name
    own = sys.executable or os.path.realpath("/proc/self/exe")
    for interpreter in dict.fromkeys([own, "/usr/bin/python3"]):
        if not os.access(interpreter, os.X_OK):
            continue
        done = subprocess.run([interpreter, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
        if done.returncode == 0 and _works(python):
            return
        tried.append(f"{interpreter}: {(done.stderr or done.stdout).strip()}")
        shutil.rmtree(VENV, ignore_errors=True)
    sys.exit("cannot make .venv (Debian: apt-get install python3-venv)\n" + "\n".join(tried))


def _install(python: Path, requirements: Sequence[str]) -> None:
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    has_uv = subprocess.run([*pip, "install", "--quiet", "uv"], check=False, capture_output=True).returncode == 0
    if has_uv:
        uv = [str(python), "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
        # certificates of the system, as pip has them; the first name is the one of older versions
        environment = {"UV_NATIVE_TLS": "1", "UV_SYSTEM_CERTS": "1", **os.environ}
        done = subprocess.run(
            [*uv, *requirements], check=False, cwd=CHECKOUT, env=environment, capture_output=True, text=True
        )
        if done.returncode == 0:
            return
        print(f"uv could not: {done.stderr.strip().splitlines()[:1]}; trying pip", flush=True)
    by_pip = subprocess.run([*pip, "install", "--quiet", *requirements], check=False, cwd=CHECKOUT)
    if by_pip.returncode != 0:
        sys.exit("the packages cannot be installed; the message of pip is above")
