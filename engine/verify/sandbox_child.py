"""The process in the sandbox: give up every right, run the program from standard input, report

engine/verify/sandbox.py starts it in an empty directory, as

    python -s -S -B sandbox_child.py TOKEN_FD REPORT_FD SECONDS MEMORY_BYTES FILE_BYTES

All rights are given up before the program is even compiled. This process writes two lines into the
pipe of the report. The first, before the program begins, is PROTECTED, or the protection that is
missing; so no program can write this line in its place. The second, after the program has ended, is
the token and one word, the reason. The token proves that this file wrote the report: it stays in
its pipe until the program has ended. Functions that are needed after the program are bound to local
names before it, since a program may replace all that it can import (`json.dumps`, `os.write`,
`print`, `sys.stdout`).
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

# Numbers of <linux/prctl.h>
PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
# System calls of x86-64 with which this file gives up rights
CAPSET = 126
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446

# Landlock's rights on files (<linux/landlock.h>)
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
TRUNCATE = 1 << 14
LANDLOCK_VERSION = 1  # the flag that asks for the version
LANDLOCK_PATH_BENEATH = 1  # the kind of rule: rights below a path
# Python's own modules and their C libraries lie here. Nothing of /proc, /etc, /home.
READABLE = (sys.base_prefix + "/lib", "/usr/lib", "/usr/lib64", "/lib", "/lib64")
READABLE_FILES = ("/etc/ld.so.cache", "/dev/null", "/dev/urandom")

# System calls of x86-64 by number (<asm/unistd_64.h>). These stay allowed: memory, time, files and
# pipes that are open or in the working directory, the process's own signals. Not among them: new
# processes, execve, sockets, kill, chmod and chown, chdir, ptrace, io_uring.
# fmt: off
ALLOWED = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21,
    "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32,
    "dup2": 33, "pause": 34, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38,
    "getpid": 39, "recvfrom": 45, "exit": 60, "uname": 63, "fsync": 74, "ftruncate": 77,
    "getdents": 78, "getcwd": 79, "rename": 82, "mkdir": 83, "rmdir": 84, "unlink": 87,
    "readlink": 89, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99,
    "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
    "sigaltstack": 131, "arch_prctl": 158, "gettid": 186, "time": 201, "futex": 202,
    "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231,
    "epoll_wait": 232, "epoll_ctl": 233, "newfstatat": 262, "unlinkat": 263, "renameat": 264,
    "readlinkat": 267, "faccessat": 269, "set_robust_list": 273, "epoll_pwait": 281,
    "epoll_create1": 291, "dup3": 292, "pipe2": 293, "renameat2": 316, "getrandom": 318,
    "membarrier": 324, "statx": 332, "rseq": 334, "faccessat2": 439,
}
# fmt: on
# These stay allowed with some arguments only: see CONDITIONAL.
IOCTL = 16
SENDTO = 44
SOCKETPAIR = 53
CLONE = 56
FCNTL = 72
MKDIRAT = 258
# These have rules of their own: see confine_calls.
OPENAT = 257
CLONE3 = 435

ALL_BITS = 0xFFFFFFFF
# Arguments of these calls
FIONBIO = 0x5421
FIOCLEX = 0x5451
F_SETFD = 2
F_GETFL = 3
F_DUPFD_CLOEXEC = 1030
AF_UNIX = 1
SOCK_STREAM = 1
AT_FDCWD = -100 & ALL_BITS
# The C library starts a thread with these: memory, files, signals shared, the same thread group.
THREAD_FLAGS = 0x3D0F00


def low(argument, value, mask=ALL_BITS):
    """A condition on the low 32 bits of an argument (from 0): argument & mask == value."""
    return (argument, 0, mask, value)


def high(argument, value, mask=ALL_BITS):
    """A condition on the high 32 bits of an argument (from 0): argument & mask == value."""
    return (argument, 1, mask, value)


# (system call, conditions that must all hold). A null pointer is two halves.
CONDITIONAL = (
    (IOCTL, [low(1, FIONBIO)]),  # does not block: for asyncio
    (IOCTL, [low(1, FIOCLEX)]),  # is closed by exec: for tempfile
    (FCNTL, [low(1, F_DUPFD_CLOEXEC)]),  # list a directory that is open
    (FCNTL, [low(1, F_GETFL)]),
    (FCNTL, [low(1, F_SETFD)]),
    (SENDTO, [low(4, 0), high(4, 0)]),  # without an address: to the other end of a pair
    (SOCKETPAIR, [low(0, AF_UNIX), low(1, SOCK_STREAM, mask=0xF)]),  # with itself
    (CLONE, [low(0, THREAD_FLAGS), high(0, 0)]),  # a thread
    (MKDIRAT, [low(0, AT_FDCWD)]),  # so that no path is longer than PATH_MAX
)

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


def checked(protection, result):
    """The result of a C call; OSError naming the protection where it failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{protection}: {os.strerror(code)}")
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
    version = landlock(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)
    known_count = min(12 + version, 15)  # version 1 knows 13 rights, 2 and 3 one more each
    known = (1 << known_count) - 1
    ruleset = struct.pack("Q", known)  # all rights that this version knows are forbidden ...
    rules = landlock(LANDLOCK_CREATE_RULESET, ruleset, len(ruleset), 0)
    grants = dict.fromkeys(READABLE, READ_FILE | READ_DIR)  # ... except these
    grants |= dict.fromkeys(READABLE_FILES, READ_FILE)
    grants["."] = READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG | REMOVE_FILE | TRUNCATE
    grants["."] |= MAKE_DIR | REMOVE_DIR
    for path, rights in grants.items():
        if os.path.exists(path):
            opened = os.open(path, os.O_PATH)
            rule = struct.pack("=Qi", rights & known, opened)
            landlock(LANDLOCK_ADD_RULE, rules, LANDLOCK_PATH_BENEATH, rule, 0)
            os.close(opened)
    landlock(LANDLOCK_RESTRICT_SELF, rules, 0)
    os.close(rules)


def landlock(call, *arguments):
    """The result of a system call of Landlock; OSError where it failed."""
    return checked("landlock", libc.syscall(call, *arguments))


def confine_calls():
    """Seccomp: a system call that is neither ALLOWED nor meets CONDITIONAL fails with EPERM.

    openat may not truncate a file that it opens for reading, which Landlock checks from version 3
    on only. clone3, whose flags a filter cannot read, fails with ENOSYS: the C library then calls
    clone.
    """
    steps = filter_program()
    code = ctypes.create_string_buffer(b"".join(steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))  # struct sock_fprog
    checked("seccomp", libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0))


# The filter is a program of BPF instructions (<linux/filter.h>) over struct seccomp_data, which
# holds the system call's number, the architecture and the arguments.
SECCOMP_MODE_FILTER = 2
LOAD = 0x20  # a 32-bit word of seccomp_data
EQUAL = 0x15  # compare the loaded word, skip instructions
MASK = 0x54  # loaded word & value
ANSWER = 0x06  # end with this answer
# Answers
ALLOW = 0x7FFF0000
KILL = 0x80000000
FAIL_WITH = 0x00050000  # with an error number in the low bits
REFUSE = FAIL_WITH | errno.EPERM
MISSING = FAIL_WITH | errno.ENOSYS
# Offsets in struct seccomp_data, in bytes
CALL_NUMBER = 0
ARCHITECTURE = 4
ARGUMENTS = 16  # 8 bytes each
AUDIT_ARCH_X86_64 = 0xC000003E


def step(code, value, if_equal=0, if_not=0):
    """One instruction; EQUAL then skips `if_equal` or `if_not` instructions."""
    return struct.pack("HBBI", code, if_equal, if_not, value)


def load_argument(argument, half):
    """Load 32 bits of an argument of the system call: half 0 is the low ones, 1 the high ones."""
    return step(LOAD, ARGUMENTS + 8 * argument + 4 * half)


def filter_program():
    """The filter's instructions; the first rule that fits a call answers it."""
    # 1. another architecture has other numbers: kill
    steps = [
        step(LOAD, ARCHITECTURE),
        step(EQUAL, AUDIT_ARCH_X86_64, if_equal=1),
        step(ANSWER, KILL),
    ]
    # 2. openat, but not with O_TRUNC for reading only
    steps += [
        step(LOAD, CALL_NUMBER),
        step(EQUAL, OPENAT, if_not=5),
        load_argument(2, half=0),  # flags
        step(MASK, os.O_TRUNC | os.O_ACCMODE),
        step(EQUAL, os.O_TRUNC, if_not=1),
        step(ANSWER, REFUSE),
        step(ANSWER, ALLOW),
    ]
    # 3. calls with some arguments only
    for number, conditions in CONDITIONAL:
        steps += conditional_call(number, conditions)
    # 4. clone3 as if the system had none
    steps += [
        step(LOAD, CALL_NUMBER),
        step(EQUAL, CLONE3, if_not=1),
        step(ANSWER, MISSING),
    ]
    # 5. calls with any arguments; no other call
    for number in ALLOWED.values():
        steps += [step(EQUAL, number, if_not=1), step(ANSWER, ALLOW)]
    steps.append(step(ANSWER, REFUSE))
    return steps


def conditional_call(number, conditions):
    """The instructions that allow a call where all conditions hold, else go on behind them."""
    checks = []
    left = 3 * len(conditions)  # instructions to the answer
    for argument, half, mask, value in conditions:
        left -= 3
        checks += [
            load_argument(argument, half),
            step(MASK, mask),
            step(EQUAL, value, if_not=left + 1),
        ]
    return [
        step(LOAD, CALL_NUMBER),
        step(EQUAL, number, if_not=len(checks) + 1),
        *checks,
        step(ANSWER, ALLOW),
    ]


def protect(seconds, memory, file_bytes):
    """Give up all rights; OSError naming the first protection that this system lacks."""
    os.environ.clear()
    checked("parent-death signal", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    checked("no new privileges", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    limit(seconds, memory, file_bytes)
    drop_capabilities()
    confine_files()
    confine_calls()


def reason_of(error, attempts):
    """The reason that is reported for the exception that ended the program.

    attempts: the reasons of calls in REASON_OF_EVENT that the program tried, in order.
    """
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
    """Give up all rights, run the program, report how it ended."""
    token_fd = int(sys.argv[1])
    report_fd = int(sys.argv[2])
    seconds = float(sys.argv[3])
    memory = int(sys.argv[4])
    file_bytes = int(sys.argv[5])
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
    attempts = []

    def note_attempt(event, _):
        if event in REASON_OF_EVENT:
            attempts.append(REASON_OF_EVENT[event])

    sys.addaudithook(note_attempt)
    # The program may replace these in their modules.
    read = os.read
    write = os.write
    leave = os._exit
    format_exception = traceback.format_exception
    streams = (sys.stdout, sys.stderr)
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
