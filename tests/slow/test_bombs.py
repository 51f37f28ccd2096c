"""Programs that would harm the host, in the sandbox: fork and thread bombs, 10 GB of memory, full disks, `kill -9 -1`.

Each runs only in a sandbox that has first refused its mild version (sandboxing.proven).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandboxing import ISOLATIONS, MB, proven

from stages.rewards import score
from stages.rewards.program import Limits, wait
from stages.rewards.sandbox import open_sandbox

pytestmark = pytest.mark.slow
SECONDS = 3.0
RAW_THREADS = """
import ctypes, mmap
libc = ctypes.CDLL(None)
stack = mmap.mmap(-1, 65536)
spin = mmap.mmap(-1, 4096, prot=7)
spin.write(bytes([0xeb, 0xfe]))
code = ctypes.addressof(ctypes.c_char.from_buffer(spin))
libc.clone.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
top = ctypes.addressof(ctypes.c_char.from_buffer(stack)) + 65536
while True: libc.clone(code, top, 0x10f00, None)
"""
BOMBS = {
    "forks": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "forks by system call": "import ctypes\nl = ctypes.CDLL(None)\n"
    "while True: l.fork(); l.vfork(); l.syscall(56, 17, 0, 0, 0, 0)",
    "daemons": "import os, time\nwhile True:\n  try:\n    if os.fork() == 0:\n      os.setsid(); os.fork(); time.sleep(99)\n"
    "  except OSError: pass",
    "threads": "import threading, time\nthreading.stack_size(32768)\n"
    "while True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "threads that start threads": "import threading\nthreading.stack_size(32768)\ndef f():\n  while True:\n"
    "    try: threading.Thread(target=f).start()\n    except RuntimeError: pass\nf()",
    "threads by system call": RAW_THREADS,
    "10 GB": "x = []\nwhile True: x.append(bytearray(10 * 2**20))",
    "10 GB at once": "x = bytes(10 * 2**30)",
    "10 GB of small things": "x = []\nwhile True: x.append([x])",
    "10 GB whatever happens": "x = []\nwhile True:\n  try: x.append(bytearray(2**20))\n  except MemoryError: pass",
    "10 GB of pipes": "import os\nx = []\nwhile True:\n  try:\n       x.append(os.pipe())\n"
    "       os.set_blocking(x[-1][1], 0); os.write(x[-1][1], bytes(2**20))\n"
    "  except OSError: pass",
    "10 GB in removed files": "import os\nx = []\nwhile True:\n  try:\n    x.append(open('a', 'wb'))\n"
    "    os.remove('a'); x[-1].write(bytes(2**24))\n"
    "  except OSError: pass",
    "10 GB in files": "n = 0\nwhile True:\n  n += 1\n"
    "  try:\n    with open(f'{n}', 'wb') as f: f.write(bytes(2**23))\n  except OSError: pass",
    "files without end": "n = 0\nwhile True: n += 1; open(f'{n}', 'w').close()",
    "folders without end": "import os\nwhile True: os.mkdir('d'); os.chdir('d')",
    "output without end": "while True:\n  try: print('x' * 10**6)\n  except OSError: pass",
    "links without end": "import os\nn = 0\nwhile True: n += 1; os.symlink('/', f'{n}')",
    "shared memory": "n = 0\nwhile True:\n  n += 1\n"
    "  try: open(f'/dev/shm/posttrain-{n}', 'wb').write(bytes(2**24))\n  except OSError: pass",
    "kill everyone": "import os\nwhile True:\n  for pid in (-1, 0, os.getppid(), *range(2, 999)):\n    try: os.kill(pid, 9)\n"
    "    except OSError: pass",
    "deep recursion in C": "import sys\nsys.setrecursionlimit(10**9)\nx = []\n"
    "for _ in range(10**7): x = [x]\nrepr(x)\nwhile True: pass",
    "a number without end": "x = 7\nwhile True: x = x ** 7",
    "a slow pattern": "import re\nre.match('(a*)*b', 'a' * 60)",
}


def free_mb(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines[name].split()[0]) // 1024


@pytest.fixture
def watched() -> Iterator[list[int]]:
    """The free memory in MB while a bomb runs; the host's processes, and its disk, must be as before."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    disk, done, memory = shutil.disk_usage(tempfile.gettempdir()).free, threading.Event(), [free_mb("MemAvailable")]
    watcher = threading.Thread(
        target=lambda: [memory.append(free_mb("MemAvailable")) for _ in iter(lambda: done.wait(0.05), True)]
    )
    watcher.start()
    yield memory
    done.set()
    watcher.join()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert memory[0] - min(memory) < 4096, "MB, of which other processes take some"
    assert disk - shutil.disk_usage(tempfile.gettempdir()).free < 2000 * MB
    assert not list(Path("/dev/shm").glob("posttrain-*"))


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("name", BOMBS)
def test_the_host_is_unharmed(name: str, isolation: str, watched: list[int]) -> None:
    started = proven(isolation).start(BOMBS[name], limits=Limits(seconds=SECONDS))
    (ended,) = wait(started)
    assert ended.reason
    assert ended.status != 0
    assert not Path(f"/proc/{started.process.pid}").exists()
    assert not started.folder.exists()
    assert watched


def test_a_batch_of_bombs_and_right_programs(watched: list[int]) -> None:
    """Side by side: every right program passes, no bomb does."""
    proven(open_sandbox("auto").isolation)
    right = "print(int(input()) + 1)"
    sources = [source for bomb in BOMBS.values() for source in (bomb, right)]
    rows = [{"id": n, "tests": [{"input": "3", "output": "4"}]} for n in range(len(sources))]
    texts = [f"```python\n{source}\n```" for source in sources]
    found = score("code", texts, rows, allow_execution=True, seconds=5.0)
    assert [one and one.total for one in found] == [0.0, 1.0] * len(BOMBS)
    assert watched
