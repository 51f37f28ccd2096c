"""The system calls that a sandboxed program may make: a seccomp filter, built once by libseccomp.

A list of what is allowed, so that a call which a later kernel adds is refused. What is missing on purpose: new processes and
programs (fork, clone without CLONE_THREAD, clone3, execve), signals to anyone (kill, tgkill, ...; fcntl's F_SETOWN with
F_SETSIG is one too), sockets but for a socketpair, debugging (ptrace, process_vm_*, pidfd_*), memory that no limit counts
(memfd_create, shmget, mq_open), other processes' limits and priorities, namespaces, mounts, keys, bpf, io_uring, and what
Landlock does not cover (chmod, chown, utimensat, setxattr, truncate, link).
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache

ALLOWED = """
read write pread64 pwrite64 readv writev preadv pwritev lseek close close_range dup dup2 dup3 pipe pipe2 poll ppoll select
pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 timerfd_create timerfd_settime timerfd_gettime
open openat creat stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getdents
getdents64 getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 symlink symlinkat ftruncate
fallocate fsync fdatasync flock copy_file_range sendfile umask fadvise64
mmap munmap mremap mprotect madvise brk msync mincore membarrier
futex set_robust_list set_tid_address rseq gettid getpid getppid getuid geteuid getgid getegid getgroups getresuid getresgid
getpgrp getpgid getsid clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage getrlimit
setrlimit sysinfo uname getcpu getrandom arch_prctl alarm setitimer getitimer rt_sigaction rt_sigprocmask rt_sigreturn
rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack pause restart_syscall sched_yield sched_getaffinity sched_getparam
sched_getscheduler sched_get_priority_max sched_get_priority_min exit exit_group wait4 waitid
recvfrom shutdown getsockopt setsockopt getsockname getpeername
"""
# Allowed with some values of one argument only: call -> (argument's position, values).
CHOSEN: dict[str, tuple[int, tuple[int, ...]]] = {
    "fcntl": (1, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),  # F_DUPFD .. F_SETLKW, F_DUPFD_CLOEXEC: no F_SETOWN, F_SETSIG
    "ioctl": (1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # isatty, window size, FIONREAD, FIONBIO, FIO(N)CLEX
    "prctl": (0, (15, 16, 0x53564D41)),  # names of threads and of memory: a program must not undo PR_SET_PDEATHSIG
    "prlimit64": (0, (0,)),  # its own limits, which it can only lower
    "socketpair": (0, (1,)),  # AF_UNIX: asyncio's own wake-up channel
    "sendto": (4, (0,)),  # no address: only what is connected, and nothing can be
}
CLONE_THREAD = 0x10000
ALLOW, REFUSE, NO_SUCH_CALL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
EQUAL, MASKED_EQUAL = 4, 7


class Comparison(ctypes.Structure):
    """libseccomp's `struct scmp_arg_cmp`."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


@cache
def seccomp_filter() -> bytes:
    """The filter, as the `struct sock_filter` array that prctl(PR_SET_SECCOMP) takes. A refused call gives EPERM; clone3 gives
    ENOSYS, on which the C library turns to clone. Raises OSError when libseccomp is not installed or fails."""
    lib = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    lib.seccomp_init.restype = ctypes.c_void_p
    lib.seccomp_init.argtypes = [ctypes.c_uint32]
    lib.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    lib.seccomp_rule_add_array.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
    lib.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    lib.seccomp_release.argtypes = [ctypes.c_void_p]
    context = lib.seccomp_init(REFUSE)

    def rule(action: int, name: str, *comparisons: Comparison) -> None:
        number = lib.seccomp_syscall_resolve_name(name.encode())
        array = (Comparison * len(comparisons))(*comparisons)
        # A negative number: this architecture, or this libseccomp, has no such call.
        if number >= 0 and (status := lib.seccomp_rule_add_array(context, action, number, len(comparisons), array)):
            raise OSError(-status, f"libseccomp refuses a rule for {name}")

    try:
        for name in ALLOWED.split():
            rule(ALLOW, name)
        for name, (position, values) in CHOSEN.items():
            for value in values:
                rule(ALLOW, name, Comparison(position, EQUAL, value, 0))
        rule(ALLOW, "clone", Comparison(0, MASKED_EQUAL, CLONE_THREAD, CLONE_THREAD))
        rule(NO_SUCH_CALL, "clone3")
        with os.fdopen(os.memfd_create("seccomp"), "w+b") as file:
            if status := lib.seccomp_export_bpf(context, file.fileno()):
                raise OSError(-status, "libseccomp cannot export its filter")
            file.seek(0)
            return file.read()
    finally:
        lib.seccomp_release(context)
