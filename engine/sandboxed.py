"""What runs inside the sandbox: give every right away, run the program from standard input, report

Started by engine/sandbox.py as `python -s -S sandboxed.py TOKEN_FD REPORT_FD SECONDS MEMORY_BYTES
FILE_BYTES` in an empty directory. The last right is gone before the program is even compiled. The
word that tells an honest report apart stays in a pipe until the program has come to its end.
"""

import sys

del sys.path[0]  # this directory: nothing here is to be imported by a bare name

import ctypes  # noqa: E402
import errno  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import struct  # noqa: E402
import traceback  # noqa: E402
from types import ModuleType  # noqa: E402

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_DUMPABLE = 1, 22, 38, 4
CAPSET, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 126, 444, 445, 446  # x86-64 numbers

# Landlock's rights on files, by their bit; version 1 knows the first 13, 2 and 3 one more each.
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (
    1 << bit for bit in (1, 2, 3, 5, 8, 14)
)
# What Python's own modules and their C libraries are read from. Nothing of /proc, /etc, /home.
READABLE = (sys.base_prefix + "/lib", "/usr/lib", "/usr/lib64", "/lib", "/lib64")
READABLE_FILES = ("/etc/ld.so.cache", "/dev/null", "/dev/urandom")

# System calls that stay (x86-64): memory, time, own files and own signals. Not among them: new
# processes and threads, execve, sockets, kill, ioctl, fcntl, chmod and chown, ptrace, io_uring.
# fmt: off
ALLOWED = (
    0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,  # read .. rt_sigreturn, without open
    17, 18, 19, 20, 21, 22, 23, 24, 25, 28,  # pread64 .. access, pipe, select, mremap, madvise
    32, 33, 34, 35, 36, 37, 38, 39,  # dup, dup2, pause, nanosleep, timers, getpid
    60, 63, 74, 77, 78, 79, 82, 87, 89,  # exit, uname, fsync .. getcwd, rename, unlink, readlink
    96, 97, 98, 99, 100, 102, 104, 107, 108, 110,  # gettimeofday, getrlimit .. getppid
    131, 158, 186, 201, 202, 204, 217, 218, 219,  # sigaltstack, arch_prctl, futex, getdents64
    228, 229, 230, 231, 257, 262, 263, 264, 267, 269, 273,  # clocks, openat .. faccessat
    292, 293, 316, 318, 324, 332, 334, 439,  # dup3, pipe2, renameat2, getrandom, statx, rseq
)
# fmt: on
OPENAT, OPENAT_FLAGS_AT = 257, 16 + 2 * 8  # its third argument's place in struct seccomp_data
AUDIT_ARCH_X86_64 = 0xC000003E

# Python's audit events, so that a refusal can be told by its kind; what refuses is the kernel.
KINDS = {
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
    """The result of a C call; OSError naming the protection that cannot be had."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def limit(seconds, memory, file_bytes):
    """Resource limits, the same ones soft and hard. A CPU limit too, should the parent be gone."""
    for name, value in (
        ("AS", memory),
        ("CPU", int(seconds) + 2),
        ("FSIZE", file_bytes),
        ("NOFILE", 32),
        ("NPROC", 0),
        ("CORE", 0),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def drop_capabilities():
    """Root without capabilities: no override of permissions, no mounts, no raised limits."""
    header, nothing = struct.pack("II", 0x20080522, 0), bytes(24)
    checked("capset", libc.syscall(CAPSET, header, nothing))


def confine_files():
    """Landlock: read Python's libraries, keep plain files in the working directory, no more."""
    version = checked("landlock", libc.syscall(LANDLOCK_CREATE, None, 0, 1))
    known = (1 << min(12 + version, 15)) - 1
    rules = checked("landlock", libc.syscall(LANDLOCK_CREATE, struct.pack("Q", known), 8, 0))
    own = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE
    grants = [(".", own), *((path, READ_FILE | READ_DIR) for path in READABLE)]
    grants += [(path, READ_FILE) for path in READABLE_FILES]
    for path, rights in grants:
        if os.path.exists(path):
            opened = os.open(path, os.O_PATH)
            rule = struct.pack("=Qi", rights & known, opened)
            checked("landlock", libc.syscall(LANDLOCK_ADD, rules, 1, rule, 0))
            os.close(opened)
    checked("landlock", libc.syscall(LANDLOCK_RESTRICT, rules, 0))
    os.close(rules)


def confine_calls():
    """Seccomp: every system call that is not ALLOWED fails with EPERM.

    openat may not truncate what it opens for reading, which Landlock sees from version 3 only.
    """
    load, equal, mask, answer = 0x20, 0x15, 0x54, 0x06  # BPF: ld, jeq, and, ret
    allow, kill = 0x7FFF0000, 0x80000000
    refuse = 0x00050000 | errno.EPERM

    def step(code, value, yes=0, no=0):
        return struct.pack("HBBI", code, yes, no, value)

    truncating = os.O_TRUNC | os.O_ACCMODE
    program = [step(load, 4), step(equal, AUDIT_ARCH_X86_64, 1, 0), step(answer, kill)]
    program += [step(load, 0), step(equal, OPENAT, 0, 5), step(load, OPENAT_FLAGS_AT)]
    program += [step(mask, truncating), step(equal, os.O_TRUNC, 0, 1), step(answer, refuse)]
    program += [step(answer, allow)]
    for number in ALLOWED:
        program += [step(equal, number, 0, 1), step(answer, allow)]
    program.append(step(answer, refuse))
    code = ctypes.create_string_buffer(b"".join(program))
    table = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    checked("seccomp", libc.prctl(PR_SET_SECCOMP, 2, table, 0, 0))


def protect(seconds, memory, file_bytes):
    """All of the above; OSError where one cannot be had."""
    os.environ.clear()
    checked("parent-death signal", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    checked("dumpable", libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
    checked("no new privileges", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    limit(seconds, memory, file_bytes)
    drop_capabilities()
    confine_files()
    confine_calls()


def reason_of(error, attempts):
    """One word for what ended the program."""
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
    """Protect, run, report as TOKEN and a line of JSON."""
    token_fd, report_fd, seconds, memory, file_bytes = map(float, sys.argv[1:])
    read, write, leave = os.read, os.write, os._exit  # the program may replace them in os
    source = sys.stdin.buffer.read()
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    sys.stdin = open(0, closefd=False)
    try:
        protect(seconds, int(memory), int(file_bytes))
    except OSError as error:
        reason = json.dumps({"unprotected": str(error)}).encode()
        write(int(report_fd), read(int(token_fd), 64) + reason)
        leave(1)
    sys.argv[:] = ["program"]
    program = ModuleType("__main__")
    sys.modules["__main__"] = program
    attempts = []
    sys.addaudithook(lambda event, _: attempts.append(KINDS[event]) if event in KINDS else None)
    reason = "ok"
    try:
        exec(compile(source, "<program>", "exec"), program.__dict__)
    except BaseException as error:  # whatever it is, it is the program's
        reason = reason_of(error, attempts)
        print("".join(traceback.format_exception(error)), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    write(int(report_fd), read(int(token_fd), 64) + json.dumps({"reason": reason}).encode())
    leave(0)


main()
