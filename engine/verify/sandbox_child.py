"""The process in the sandbox: give up every right, run the program from standard input, report

engine/verify/sandbox.py starts it in an empty directory, as

    python -s -S -B sandbox_child.py TOKEN_FD REPORT_FD SECONDS MEMORY_BYTES FILE_BYTES

All rights are given up before the program is even compiled. It writes two lines into the pipe of
the report: PROTECTED (or the protection that is missing) before the program begins, so that no
program can write this line in its place; and at its end the token and one word, the reason. The
token, which proves that this file wrote the report, stays in its pipe until the program has ended.
Functions needed after the program are bound to local names before it, since a program may replace
all that it can import (`json.dumps`, `os.write`, `print`, `sys.stdout`).
"""

import sys

del sys.path[0]  # this directory, so that none of its modules is imported in place of Python's

import ctypes  # noqa: E402
import errno  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import struct  # noqa: E402
import traceback  # noqa: E402
from types import ModuleType  # noqa: E402

# Numbers of <linux/prctl.h>, and of system calls on x86-64
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CAPSET, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 126, 444, 445, 446

# Landlock's rights on files, by their bit; version 1 knows the first 13, 2 and 3 one more each.
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
TRUNCATE = 1 << 14
# Python's own modules and their C libraries lie here. Nothing of /proc, /etc, /home.
READABLE = (sys.base_prefix + "/lib", "/usr/lib", "/usr/lib64", "/lib", "/lib64")
READABLE_FILES = ("/etc/ld.so.cache", "/dev/null", "/dev/urandom")

# System calls that stay allowed (x86-64): memory, time, own files and own signals. Not among them:
# new processes, execve, sockets, kill, chmod and chown, chdir, ptrace, io_uring.
# fmt: off
ALLOWED = (
    0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,  # read .. rt_sigreturn, without open
    17, 18, 19, 20, 21, 22, 23, 24, 25, 28,  # pread64 .. access, pipe, select, mremap, madvise
    32, 33, 34, 35, 36, 37, 38, 39,  # dup, dup2, pause, nanosleep, timers, getpid
    45, 60, 63, 74, 77, 78, 79, 82,  # recvfrom, exit, uname, fsync .. getcwd, rename
    83, 84, 87, 89,  # mkdir, rmdir, unlink, readlink
    96, 97, 98, 99, 100, 102, 104, 107, 108, 110,  # gettimeofday, getrlimit .. getppid
    131, 158, 186, 201, 202, 204, 217, 218, 219,  # sigaltstack, arch_prctl, futex, getdents64
    228, 229, 230, 231, 232, 233, 262, 263, 264, 267, 269, 273,  # clocks, epoll .. faccessat
    281, 291, 292, 293, 316, 318, 324, 332, 334, 439,  # epoll, dup3, pipe2, renameat2 .. rseq
)
# fmt: on
ALL_BITS = 0xFFFFFFFF
AT_FDCWD, AF_UNIX, SOCK_STREAM = -100 & ALL_BITS, 1, 1
FIONBIO, FIOCLEX, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC = 0x5421, 0x5451, 2, 3, 1030
# The C library starts a thread with these: memory, files, signals shared, the same thread group.
THREAD_FLAGS = 0x3D0F00
# System calls that stay allowed with these arguments only:
#     (call, ((argument, half, mask, value), ...))    every  argument & mask == value
# Half 0 is the low 32 bits of an argument, half 1 the high ones. A null pointer is two halves.
CONDITIONAL = (
    (16, ((1, 0, ALL_BITS, FIONBIO),)),  # ioctl: does not block, for asyncio
    (16, ((1, 0, ALL_BITS, FIOCLEX),)),  # and is closed by exec, for tempfile
    (72, ((1, 0, ALL_BITS, F_DUPFD_CLOEXEC),)),  # fcntl: list a directory that is open
    (72, ((1, 0, ALL_BITS, F_GETFL),)),
    (72, ((1, 0, ALL_BITS, F_SETFD),)),
    (44, ((4, 0, ALL_BITS, 0), (4, 1, ALL_BITS, 0))),  # sendto: to the other end, no address
    (53, ((0, 0, ALL_BITS, AF_UNIX), (1, 0, 0xF, SOCK_STREAM))),  # socketpair: with itself
    (56, ((0, 0, ALL_BITS, THREAD_FLAGS), (0, 1, ALL_BITS, 0))),  # clone: a thread
    (258, ((0, 0, ALL_BITS, AT_FDCWD),)),  # mkdirat: so that no path is longer than PATH_MAX
)
OPENAT, CLONE3 = 257, 435
AUDIT_ARCH_X86_64 = 0xC000003E

# Python's audit events -> the reason that is reported when the kernel has refused such a call
REASON_OF_EVENT = {
    "os.fork": "process",
    "os.forkpty": "process",
    "os.exec": "process",
    "os.posix_spawn": "process",
    "subprocess.Popen": "process",
    "socket.__new__": "network",
    "os.kill": "signal",
    "os.killpg": "signal",
    "signal.pthread_kill": "signal",
}
libc = ctypes.CDLL(None, use_errno=True)


def checked(what, result):
    """The result of a C call; OSError naming the protection `what` where it failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def limit(seconds, memory, file_bytes):
    """Set the resource limits, soft and hard alike; `memory` and `file_bytes` in bytes."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: int(seconds) + 2,  # for the case that the parent is gone
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_CORE: 1,  # no core file; 0 would still start a core handler behind a pipe
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


def drop_capabilities():
    """Give up all capabilities: no override of permissions, no mounts, no raised limits."""
    header = struct.pack("II", 0x20080522, 0)  # version 3, this process
    no_capabilities = bytes(24)
    checked("capset", libc.syscall(CAPSET, header, no_capabilities))


def confine_files():
    """Landlock: read Python's libraries, keep plain files in the working directory, no more."""
    version = checked("landlock", libc.syscall(LANDLOCK_CREATE, None, 0, 1))
    known = (1 << min(12 + version, 15)) - 1  # the rights of this version: all are forbidden
    rules = checked("landlock", libc.syscall(LANDLOCK_CREATE, struct.pack("Q", known), 8, 0))
    grants = dict.fromkeys(READABLE, READ_FILE | READ_DIR)
    grants |= dict.fromkeys(READABLE_FILES, READ_FILE)
    grants["."] = READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG | REMOVE_FILE | TRUNCATE
    grants["."] |= MAKE_DIR | REMOVE_DIR
    for path, rights in grants.items():
        if os.path.exists(path):
            opened = os.open(path, os.O_PATH)
            rule = struct.pack("=Qi", rights & known, opened)
            checked("landlock", libc.syscall(LANDLOCK_ADD, rules, 1, rule, 0))
            os.close(opened)
    checked("landlock", libc.syscall(LANDLOCK_RESTRICT, rules, 0))
    os.close(rules)


def confine_calls():
    """Seccomp: a system call that is neither ALLOWED nor meets CONDITIONAL fails with EPERM.

    openat may not truncate a file that it opens for reading, which Landlock checks from version 3
    on only. clone3, whose flags a filter cannot read, fails with ENOSYS: the C library then calls
    clone.
    """
    steps = filter_program()
    code = ctypes.create_string_buffer(b"".join(steps))
    table = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    checked("seccomp", libc.prctl(PR_SET_SECCOMP, 2, table, 0, 0))


# Instructions of the filter (BPF): load a 32-bit word, compare, mask, return
LOAD, EQUAL, MASK, ANSWER = 0x20, 0x15, 0x54, 0x06
ALLOW, KILL = 0x7FFF0000, 0x80000000
REFUSE, MISSING = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
LOAD_CALL_NUMBER, LOAD_ARCHITECTURE = (LOAD, 0), (LOAD, 4)  # offsets in struct seccomp_data


def step(code, value, if_equal=0, if_not=0):
    """One instruction; EQUAL then skips `if_equal` or `if_not` instructions."""
    return struct.pack("HBBI", code, if_equal, if_not, value)


def load_argument(number, half):
    """Load 32 bits of an argument of the system call."""
    return step(LOAD, 16 + 8 * number + 4 * half)


def filter_program():
    """The filter's instructions."""
    steps = [step(*LOAD_ARCHITECTURE), step(EQUAL, AUDIT_ARCH_X86_64, 1, 0), step(ANSWER, KILL)]

    truncating = os.O_TRUNC | os.O_ACCMODE
    steps += [step(*LOAD_CALL_NUMBER), step(EQUAL, OPENAT, 0, 5), load_argument(2, 0)]
    steps += [step(MASK, truncating), step(EQUAL, os.O_TRUNC, 0, 1), step(ANSWER, REFUSE)]
    steps += [step(ANSWER, ALLOW)]

    for number, conditions in CONDITIONAL:
        checks = []
        left = 3 * len(conditions)  # instructions to the ANSWER of this call
        for which, half, bits, value in conditions:
            left -= 3
            checks += [load_argument(which, half), step(MASK, bits)]
            checks += [step(EQUAL, value, 0, left + 1)]
        steps += [step(*LOAD_CALL_NUMBER), step(EQUAL, number, 0, len(checks) + 1)]
        steps += checks
        steps += [step(ANSWER, ALLOW)]

    steps += [step(*LOAD_CALL_NUMBER), step(EQUAL, CLONE3, 0, 1), step(ANSWER, MISSING)]
    for number in ALLOWED:
        steps += [step(EQUAL, number, 0, 1), step(ANSWER, ALLOW)]
    steps += [step(ANSWER, REFUSE)]
    return steps


def protect(seconds, memory, file_bytes):
    """All of the above; OSError naming the first that this system lacks."""
    os.environ.clear()
    checked("parent-death signal", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    checked("no new privileges", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    limit(seconds, memory, file_bytes)
    drop_capabilities()
    confine_files()
    confine_calls()


def reason_of(error, attempts):
    """The reason that is reported for the exception that ended the program."""
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return "exit"
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, SyntaxError):
        return "syntax"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "process"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return "files"
    if isinstance(error, PermissionError) and error.filename is not None:
        return "files"
    if isinstance(error, PermissionError) and attempts:
        return attempts[-1]
    return "error"


def main():
    """Protect, run, report."""
    token_fd, report_fd = int(sys.argv[1]), int(sys.argv[2])
    seconds, memory, file_bytes = float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    source = sys.stdin.buffer.read()
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    sys.stdin = open(0, closefd=False)
    try:
        protect(seconds, memory, file_bytes)
    except OSError as error:
        os.write(report_fd, f"cannot have {error}\n".encode())
        os._exit(1)
    os.write(report_fd, b"PROTECTED\n")
    sys.argv[:] = ["program"]
    # Not named "__main__", so that main guards do not run; pickle finds it under both names.
    program = ModuleType("program")
    sys.modules["program"] = sys.modules["__main__"] = program
    attempts = []  # reasons of what the program tried, in order

    def note_attempt(event, _):
        if event in REASON_OF_EVENT:
            attempts.append(REASON_OF_EVENT[event])

    sys.addaudithook(note_attempt)
    # The program may replace these where they stand.
    read, write, leave = os.read, os.write, os._exit
    format_exception, streams = traceback.format_exception, (sys.stdout, sys.stderr)
    reason = b"ok"
    text = b""
    try:
        exec(compile(source, "<program>", "exec"), program.__dict__)
    except BaseException as error:  # of any kind: it is the program's
        try:
            reason = reason_of(error, attempts).encode()
            text = "".join(format_exception(error)).encode("utf-8", "backslashreplace")
        except BaseException:  # the program has replaced functions that these call
            reason = b"error"
    for stream in streams:
        try:
            stream.flush()
        except BaseException:  # the stream or its descriptor is closed
            continue
    try:
        write(2, text)
    except OSError:  # closed
        pass
    write(report_fd, read(token_fd, 64) + reason)
    leave(0)


main()
