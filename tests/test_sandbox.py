"""What a program in the sandbox can and cannot do, by every isolation that works here."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT
from sandboxing import ISOLATIONS, attempt, proven, run

from stages.rewards.sandbox import Sandbox

TMP = Path("/tmp/posttrain-test-outside")
SECRET = "the expected output"
# Each must raise an OSError. FILE is a file of the parent's; PARENT its process, PORT one on which it listens.
ACTIONS = {
    "fork": "import os\nif os.fork() == 0: os._exit(0)",
    "vfork": "system(58)",
    "clone a process": "if system(56, 17, 0, 0, 0, 0) == 0:\n  import os; os._exit(0)",
    "clone3": "system(435, 0, 0)",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'])",
    "posix_spawn": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "system's shell": "import os\nif os.system('true') == 0: raise SystemExit\nraise OSError",
    "signal the parent": "import os; os.kill(PARENT, 0)",
    "signal everyone": "import os; os.kill(-1, 0)",
    "signal its group": "import os; os.killpg(0, 0)",
    "signal by thread": "system(234, PARENT, PARENT, 0)",
    "signal by queue": "system(129, PARENT, 0, bytes(128))",
    "signal by pidfd": "import os; os.pidfd_open(PARENT)",
    "signal by a file's owner": "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, PARENT)",
    "a signal of a file's owner": "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETSIG, 9)",
    "outlive the parent": "system(157, 1, 0, 0, 0, 0)",
    "ptrace": "system(101, 16, PARENT, 0, 0)",
    "read the parent's memory": "system(310, PARENT, 0, 0, 0, 0, 0)",
    "limit the parent": "import resource; resource.prlimit(PARENT, resource.RLIMIT_NOFILE)",
    "slow the parent": "import os; os.setpriority(os.PRIO_PROCESS, PARENT, 19)",
    "move the parent": "import os; os.sched_setaffinity(PARENT, {0})",
    "leave its session": "import os; os.setsid()",
    "become root": "import os; os.setuid(0)",
    "tcp": "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=1)",
    "udp": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "tcp over ipv6": "import socket; socket.socket(socket.AF_INET6)",
    "listen": "import socket; socket.create_server(('127.0.0.1', 0))",
    "raw socket": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK)",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX).connect(SOCKET)",
    "unix datagram": "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', SOCKET)",
    "dns": "import socket; socket.getaddrinfo('example.com', 80)",
    "write in /tmp": "open(TMP, 'w').write('x')",
    "write in home": "import os; open(HOME + '/posttrain-test', 'w')",
    "write in the repository": "open(ROOT + '/posttrain-test', 'w')",
    "write in /dev/shm": "open('/dev/shm/posttrain-test', 'w')",
    "write in /": "open('/posttrain-test', 'w')",
    "write in /usr": "open('/usr/posttrain-test', 'w')",
    "write in Python": "import os; open(os.path.dirname(os.__file__) + '/posttrain_test.py', 'w')",
    "change Python": "import os; open(os.__file__, 'r+')",
    "change a system's file": "open('/usr/bin/env', 'r+')",
    "shared memory": "from multiprocessing import shared_memory; shared_memory.SharedMemory(create=True, size=9)",
    "shared memory of System V": "system(29, 0, 4096, 0o1600)",
    "uncounted memory": "import os; os.memfd_create('x')",
    "overwrite": "open(FILE, 'w')",
    "append": "open(FILE, 'a')",
    "truncate": "import os; os.truncate(FILE, 0)",
    "remove": "import os; os.remove(FILE)",
    "rename": "import os; os.rename(FILE, 'mine')",
    "rename over": "import os; open('mine', 'w'); os.rename('mine', FILE)",
    "link": "import os; os.link(FILE, 'mine')",
    "chmod": "import os; os.chmod(FILE, 0o777)",
    "chown": "import os; os.chown(FILE, os.getuid(), os.getgid())",
    "touch": "import os; os.utime(FILE)",
    "set an attribute": "import os; os.setxattr(FILE, 'user.x', b'x')",
    "read": "open(FILE).read()",
    "read by symbolic link": "import os; os.symlink(FILE, 'link'); open('link').read()",
    "write by symbolic link": "import os; os.symlink(FILE, 'link2'); open('link2', 'w')",
    "read by a folder's link": "import os; os.symlink(os.path.dirname(FILE), 'up'); os.listdir('up')",
    "read by dots": "import os; open('../' * 20 + FILE)",
    "read /etc/shadow": "open('/etc/shadow').read()",
    "read /etc/passwd": "open('/etc/passwd').read()",
    # bubblewrap makes the folders above Python's own, but empty
    "list home": "import os\nif set(os.listdir(HOME)) < set(NAMES): raise OSError",
    "list the repository": "import os; os.listdir(ROOT)",
    "list /tmp": "import os; assert os.listdir('/tmp') == [os.path.basename(os.getcwd())]; raise OSError",
    "the parent's environment": "open(f'/proc/{PARENT}/environ').read()",
    "the parent's files": "import os; os.listdir(f'/proc/{PARENT}/fd')",
    "its own start": "open('/proc/self/cmdline').read()",
    "the kernel's settings": "open('/proc/sys/kernel/core_pattern').read()",
    "the machine": "import os; os.listdir('/sys')",
    "mount": "system(165, b'none', b'/tmp', b'tmpfs', 0, 0)",
    "namespaces": "system(272, 0x10000000)",
    "bpf": "system(321, 0, 0, 0)",
    "io_uring": "system(425, 1, bytes(120))",
    "keys": "system(250, 0, -3, 0)",
    "a kernel call of tomorrow": "system(600)",
    "raise its limits": "from resource import *\ntry: setrlimit(RLIMIT_AS, (-1, -1))\nexcept ValueError: raise OSError",
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """Things of the parent's to reach for: a file, a listening port, a unix socket."""
    folder = tmp_path_factory.mktemp("outside")
    file = folder / "secret"
    file.write_text(SECRET)
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
        unix.bind(str(folder / "socket"))
        yield {
            "FILE": str(file),
            "PORT": tcp.getsockname()[1],
            "SOCKET": str(folder / "socket"),
            "PARENT": os.getpid(),
            "HOME": str(Path.home()),
            "NAMES": [path.name for path in Path.home().iterdir()],
            "ROOT": str(ROOT),
            "TMP": str(TMP),
        }
    assert file.read_text() == SECRET
    assert not TMP.exists()


@pytest.fixture(params=ISOLATIONS)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return proven(request.param)


@cache
def outcomes(isolation: str, given: str) -> dict[str, str]:
    return attempt(proven(isolation), ACTIONS, **json.loads(given))


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="system calls by number")
@pytest.mark.parametrize("action", ACTIONS)
def test_refused(action: str, sandbox: Sandbox, theirs: dict[str, object]) -> None:
    assert outcomes(sandbox.isolation, json.dumps(theirs))[action] == "refused"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="system calls by number")
def test_the_same_attempts_succeed_outside(theirs: dict[str, object], tmp_path: Path) -> None:
    """The attempts are real ones: most of them work for a program under limits alone and without the filter."""
    mild = ["fork", "subprocess", "signal the parent", "tcp", "unix datagram", "uncounted memory", "touch", "read"]
    mild += ["read by symbolic link", "list home", "list the repository", "append"]
    bare = Sandbox("rlimits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.rewards.sandbox.seccomp_filter", lambda: (_ for _ in ()).throw(OSError("none")))
        assert attempt(bare, {name: ACTIONS[name] for name in mild}, **theirs) == dict.fromkeys(mild, "escaped")


def test_no_capability_is_left_even_without_a_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.rewards.sandbox.seccomp_filter", lambda: (_ for _ in ()).throw(OSError("none")))
    status = run(Sandbox("rlimits"), "print(open('/proc/self/status').read())").stdout.decode()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[name] for name in ("CapEff", "CapPrm", "CapInh")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"


ALLOWED = {
    "nothing": ("", b"", ""),
    "stdin": ("print(sum(map(int, input().split())))", b"1 2 3", "6\n"),
    "stdin as bytes": ("import sys; print(len(sys.stdin.buffer.read()))", bytes(range(256)), "256\n"),
    "files in its folder": (
        "open('a', 'w').write('x'); import os; os.mkdir('b'); print(sorted(os.listdir()))",
        b"",
        "['a', 'b']\n",
    ),
    "an empty folder": ("import os; print(os.listdir())", b"", "[]\n"),
    "temporary files": ("import tempfile; print(len(tempfile.TemporaryFile().read()))", b"", "0\n"),
    "its main guard": ("if __name__ == '__main__': print('main')", b"", "main\n"),
    "its arguments": ("import sys; print(sys.argv)", b"", "['program.py']\n"),
    "threads": (
        "import threading\nt = threading.Thread(target=print, args=('t',)); t.start(); t.join()\n"
        "import concurrent.futures as c\nprint(sum(c.ThreadPoolExecutor(8).map(abs, range(9))))",
        b"",
        "t\n36\n",
    ),
    "a deep stack": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
        "def f(n): return n and 1 + f(n - 1)\nt = threading.Thread(target=lambda: print(f(50000))); t.start(); t.join()",
        b"",
        "50000\n",
    ),
    "asyncio": ("import asyncio; print(asyncio.run(asyncio.sleep(0, 3)))", b"", "3\n"),
    "much of the library": (
        "import bisect, collections, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json\n"
        "import math, random, re, sqlite3, statistics, string, time, typing, uuid, zoneinfo\n"
        "time.sleep(0.01); print(uuid.uuid4().version)",
        b"",
        "4\n",
    ),
    "unicode": ("print(input() + '\\N{SNOWMAN} größe')", "é".encode(), "é☃ größe\n"),
    "future annotations are its own": ("def f(x: 1 + 1): pass\nprint(f.__annotations__)", b"", "{'x': 2}\n"),
    "the null device": ("print(open('/dev/null').read() == '', open('/dev/null', 'w').write('x'))", b"", "True 1\n"),
    "megabytes of source": ("x = '" + "a" * 3_000_000 + "'; print(len(x))", b"", "3000000\n"),
    "a quick exit": ("print('x', flush=True); import os; os._exit(0)", b"", "x\n"),
    "the same hashes each time": ("print(hash('x') == " + "HASH" + ")", b"", "True\n"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name: str, sandbox: Sandbox) -> None:
    source, stdin, expected = ALLOWED[name]
    if "HASH" in source:
        source = source.replace("HASH", run(sandbox, "print(hash('x'))").stdout.decode().strip())
    ended = run(sandbox, source, stdin)
    assert (ended.reason, ended.stdout.decode(), ended.stderr.decode()) == ("", expected, "")


def test_environment(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    seen = json.loads(run(sandbox, "import json, os; print(json.dumps([dict(os.environ), os.getcwd()]))").stdout)
    folder = seen[1]
    expected = {
        "HOME": folder,
        "TMPDIR": folder,
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
    }
    assert seen[0] == expected | ({"PWD": folder} if sandbox.isolation == "bwrap" else {})
    assert not Path(folder).exists()


WRONG = {
    "raises": ("1 / 0", "ZeroDivisionError"),
    "exits with 3": ("import sys; sys.exit(3)", "exit status 3"),
    "reads at the end of stdin": ("input()", "EOFError"),
    "a null byte": ("x = 1\0", "null bytes"),
    "a lone surrogate": ("x = '\ud800'", "surrogates not allowed"),
    "no Python": ("def f(:", "SyntaxError"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "nesting": ("(" * 5000 + ")" * 5000, "exit status 1"),
    "memory in one piece": ("x = bytearray(2**40)", "MemoryError"),
    "memory by mmap": ("import mmap; x = [mmap.mmap(-1, 2**26) for _ in range(100)]", "Cannot allocate memory"),
    "too many open files": ("x = [open('/dev/null') for _ in range(100)]", "Too many open files"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str, sandbox: Sandbox) -> None:
    source, reason = WRONG[name]
    assert reason in run(sandbox, source, memory_mb=300).reason


def test_segmentation_fault(sandbox: Sandbox) -> None:
    ended = run(sandbox, "import ctypes; ctypes.string_at(0)")
    # bubblewrap gives a signal as 128 + its number
    assert ended.status == (128 + signal.SIGSEGV if sandbox.isolation == "bwrap" else -signal.SIGSEGV)
    assert ended.reason


def test_the_parents_modules_are_not_there(sandbox: Sandbox) -> None:
    ended = run(sandbox, "import sys\nprint([p for p in sys.path if 'site-packages' in p or not p])\nimport numpy")
    assert ended.stdout == b"[]\n"
    assert "ModuleNotFoundError" in ended.reason
