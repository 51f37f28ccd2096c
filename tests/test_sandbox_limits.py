"""What becomes of programs that use too much, of their folders and processes, and of a sandbox that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT
from sandboxing import ISOLATIONS, MB, opened, proven, run

from stages.errors import InputError
from stages.rewards import program, sandbox
from stages.rewards.program import Limits, SandboxError, threads, usage, wait
from stages.rewards.sandbox import Sandbox, open_sandbox, probe

FOLDERS = "posttrain-program-*"


@pytest.fixture(params=ISOLATIONS)
def box(request: pytest.FixtureRequest) -> Sandbox:
    return proven(request.param)


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs' folders lie where no other process's do, so that it can be seen that none is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "import signal, time\nfor n in {*range(1, 32)} - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: time.sleep(1)",
        "import threading, time; threading.Thread(target=time.sleep, args=(1000,)).start()",
        "import os; r, w = os.pipe(); os.read(r, 1)",
        "import threading\nfor _ in range(4): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()",
    ],
    ids=["loop", "sleep", "ignored signals", "thread", "read", "four threads"],
)
def test_time(box: Sandbox, source: str, tmp_path: Path) -> None:
    started = box.start(f"print('begun', flush=True)\n{source}", limits=Limits(seconds=0.8))
    (ended,) = wait(started)
    assert (ended.stopped, ended.stdout) == ("not done after 0.8 s", b"begun\n")
    assert not alive(started.process.pid)
    assert not list(tmp_path.glob(FOLDERS))


def test_cpu_time_is_bounded_by_the_kernel_too(box: Sandbox) -> None:
    source = "import resource; print(resource.getrlimit(resource.RLIMIT_CPU), resource.getrlimit(resource.RLIMIT_CORE))"
    assert run(box, source, seconds=2.5).stdout == b"(4, 4) (0, 0)\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("while True: print('x' * 1000)", "File too large"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", ""),
        ("import os; os.pwrite(1, b'x', 10**12)", "File too large"),
        ("import os; os.ftruncate(1, 10**12)", "File too large"),
        ("open('a', 'wb').write(bytes(2**21))", "File too large"),
        ("open('a', 'wb').truncate(2**40)", "File too large"),
        ("import time\nfor n in range(9): open(f'{n}', 'wb').write(bytes(2**18))\ntime.sleep(9)", "1 MB in its folder"),
        ("import os, time\nfor n in range(300): os.mkdir(f'{n}')\ntime.sleep(9)", "256 files"),
        ("import os, time\nfor n in range(999): os.mkdir('d'); os.chdir('d')\ntime.sleep(9)", "256 files"),
        ("import os, time\nfor n in range(99): os.mkdir('d' * 250); os.chdir('d' * 250)\ntime.sleep(9)", "256 files"),
        ("import threading, time\nfor n in range(90): threading.Thread(target=time.sleep, args=(9,)).start()", "64 threads"),
    ],
)
def test_space(box: Sandbox, source: str, reason: str, tmp_path: Path) -> None:
    ended = run(box, source, seconds=8.0, file_mb=1, memory_mb=2048)
    assert ended.status != 0
    assert reason in ended.reason
    assert "not done" not in ended.reason
    assert max(len(ended.stdout), len(ended.stderr)) <= MB
    assert not list(tmp_path.glob(FOLDERS))


def test_deep_and_closed_folders_are_removed(tmp_path: Path) -> None:
    deep = "import os\nfor n in range(1500): os.mkdir('d'); os.chdir('d')\nos.mkdir('closed', 0o300); open('closed/x', 'w')"
    folder = tmp_path / "program"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", deep], cwd=folder, check=True)
    try:
        program.remove(folder)
        assert not folder.exists()
    finally:  # pytest could not remove it
        subprocess.run(["rm", "-rf", str(folder)], check=False)


def test_links_out_of_a_folder_are_not_followed(box: Sandbox, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    ended = run(box, f"import os; os.symlink({str(kept)!r}, 'a'); os.symlink('/', 'b'); print(len(os.listdir()))")
    assert ended.stdout == b"2\n"
    assert (kept / "file").read_text() == "x"


def test_usage(tmp_path: Path) -> None:
    folder, large = tmp_path / "program", tmp_path / "large"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "b").write_bytes(bytes(8192))
    large.write_bytes(bytes(MB))
    (folder / "link").symlink_to(large)
    number, size = usage(folder, 100)
    assert number == 3
    assert 8192 <= size < 65536
    assert usage(folder, 1)[0] == 2
    assert usage(folder / "none", 1) == (0, 0)


def test_threads_of_descendants_count() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 20
        while threads(parent.pid) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threads(parent.pid) == 2
    finally:
        for child in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        parent.kill()
        parent.wait()
    assert threads(parent.pid) == 0


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def descendants(pid: int) -> list[int]:
    children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [one for child in children for one in descendants(child)]


def test_programs_die_with_their_parent(box: Sandbox, tmp_path: Path) -> None:
    code = f"""
import sys
from stages.rewards.program import Limits
from stages.rewards.sandbox import Sandbox
program = Sandbox({box.isolation!r}).start("open('begun', 'w'); import time; time.sleep(600)", limits=Limits(seconds=600))
print(program.folder, flush=True)
program.process.wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    folder = Path(parent.stdout.readline().strip())
    deadline = time.monotonic() + 20
    while not (folder / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    programs = descendants(parent.pid)
    assert len(programs) == (2 if box.isolation == "bwrap" else 1)
    assert all(map(alive, programs))
    parent.kill()
    parent.wait()
    while any(map(alive, programs)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, programs))
    program.remove(folder)


def test_nothing_is_left_open(box: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    run(box, "pass")
    run(box, "while True: pass", seconds=0.3)
    monkeypatch.setattr(sandbox, "PYTHON", "/nowhere/python")
    with pytest.raises(SandboxError):
        run(box, "pass")
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert not list(tmp_path.glob(FOLDERS))


def test_a_process_that_could_not_be_confined_runs_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = Path(tempfile.gettempdir()) / "ran"
    monkeypatch.setattr(sandbox, "seccomp_filter", lambda: b"no filter at all")
    with pytest.raises(SandboxError, match="Invalid argument"):
        run(Sandbox("rlimits"), f"open({str(mark)!r}, 'w')")
    assert not mark.exists()


def test_a_sandbox_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> bytes:
        raise OSError("libseccomp.so.2: cannot open shared object file")

    proven("landlock")
    monkeypatch.setattr(sandbox, "seccomp_filter", missing)
    assert probe(Sandbox("landlock")) == "a program can open a socket, start a process, signal another process"
    monkeypatch.undo()
    whole = Sandbox._job
    monkeypatch.setattr(Sandbox, "_job", lambda *args: whole(*args) | {"landlock": None})
    assert probe(Sandbox("landlock")) == "a program can read outside its folder, write outside its folder"


@pytest.mark.parametrize(
    ("works", "isolation", "found"),
    [
        ({"bwrap", "landlock"}, "auto", "bwrap"),
        ({"landlock"}, "auto", "landlock"),
        ({"bwrap", "landlock"}, "landlock", "landlock"),
        ({"rlimits"}, "rlimits", "rlimits"),
        ({"rlimits"}, "auto", None),
        ({"landlock", "rlimits"}, "bwrap", None),
    ],
)
def test_the_best_that_works(works: set[str], isolation: str, found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "probe", lambda box: "" if box.isolation in works else f"no {box.isolation} here")
    choose = open_sandbox.__wrapped__
    if found:
        assert choose(isolation) == Sandbox(found)  # type: ignore[arg-type]
    else:
        with pytest.raises(InputError, match=r"no bwrap here.*apt-get install bubblewrap libseccomp2.*isolation: rlimits"):
            choose(isolation)


def test_an_unknown_isolation() -> None:
    with pytest.raises(InputError, match="'docker'; there are auto, bwrap, landlock, rlimits"):
        open_sandbox("docker")  # type: ignore[arg-type]


def test_this_machine_can_confine() -> None:
    assert isinstance(opened("auto"), Sandbox), opened("auto")


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"memory_mb": -1}, {"seconds": float("nan")}, {"files": True}])
def test_limits_are_numbers(limits: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(limits))!r} must be a number above 0"):
        Limits(**limits)  # type: ignore[arg-type]
