"""What runs inside the sandbox: give every right away, run the program from standard input, report

Started by engine/verify/sandbox.py as `python -s -S sandbox_child.py TOKEN_FD REPORT_FD SECONDS
MEMORY_BYTES
FILE_BYTES` in an empty directory. The last right is gone before the program is even compiled.

It writes two lines into the report's pipe: PROTECTED (or what could not be protected) before the
program begins, so that no program can say this in its place, and at the end the token and one
word. The token, which tells an honest report apart, stays in a pipe until the program has come to
its end. Whatever is needed after the program is bound before it, since a program may replace what
it can import (`json.dumps`, `os.write`, `print`, `sys.stdout`).
"""

import sys

del sys.path[0]  # this directory: nothing here is to be imported by a bare name

import ctypes  # noqa: E402
import errno  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import struct  # noqa: E402
import traceback  # noqa: E402
from types import ModuleType  # noqa: E402

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CAPSET, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 126, 444, 445, 446  # x86-64 numbers

# Landlock's rights on files, by their bit; version 1 knows the first 13, 2 and 3 one more each.
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, TRUNCATE = (
    1 << bit for bit in (1, 2, 3, 4, 5, 7, 8, 14)
)
# What Python's own modules and their C libraries are read from. Nothing of /proc, /etc, /home.
READABLE = (sys.base_prefix + "/lib", "/usr/lib", "/usr/lib64", "/lib", "/lib64")
READABLE_FILES = ("/etc/ld.so.cache", "/dev/null", "/dev/urandom")

# System calls that stay (x86-64): memory, time, own files and own signals. Not among them: new
# processes, execve, sockets, kill, chmod and chown, chdir, ptrace, io_uring.
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
# What the C library starts a thread with: memory, files, signals shared, the same thread group.
THREAD_FLAGS = 0x3D0F00
# System calls that stay with these arguments only: (call, ((argument, half, mask, value), ...)),
# half 0 being an argument's low 32 bits. A pointer that must be null is two halves.
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
        ("CORE", 1),  # none; 0 would still start a core handler behind a pipe
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
    own = READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG | REMOVE_FILE | TRUNCATE
    own |= MAKE_DIR | REMOVE_DIR
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
    """Seccomp: a system call that is neither ALLOWED nor meets CONDITIONAL fails with EPERM.

    openat may not truncate what it opens for reading, which Landlock sees from version 3 only.
    clone3, whose flags a filter cannot see, "does not exist": the C library then asks clone.
    """
    load, equal, mask, answer = 0x20, 0x15, 0x54, 0x06  # BPF: ld, jeq, and, ret
    allow, kill = 0x7FFF0000, 0x80000000
    refuse, missing = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS

    def step(code, value, yes=0, no=0):
        return struct.pack("HBBI", code, yes, no, value)

    def argument(number, half):
        return step(load, 16 + 8 * number + 4 * half)

    truncating = os.O_TRUNC | os.O_ACCMODE
    program = [step(load, 4), step(equal, AUDIT_ARCH_X86_64, 1, 0), step(answer, kill)]
    program += [step(load, 0), step(equal, OPENAT, 0, 5), argument(2, 0)]
    program += [step(mask, truncating), step(equal, os.O_TRUNC, 0, 1), step(answer, refuse)]
    program += [step(answer, allow)]
    for number, conditions in CONDITIONAL:
        checks, left = [], 3 * len(conditions)  # steps to the end of this call's part
        for which, half, bits, value in conditions:
            left -= 3
            checks += [argument(which, half), step(mask, bits), step(equal, value, 0, left + 1)]
        program += [step(load, 0), step(equal, number, 0, len(checks) + 1)]
        program += [*checks, step(answer, allow)]
    program += [step(load, 0), step(equal, CLONE3, 0, 1), step(answer, missing)]
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
    """Protect, run, report."""
    token_fd, report_fd, seconds, memory, file_bytes = map(float, sys.argv[1:])
    token_fd, report_fd = int(token_fd), int(report_fd)
    source = sys.stdin.buffer.read()
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    sys.stdin = open(0, closefd=False)
    try:
        protect(seconds, int(memory), int(file_bytes))
    except OSError as error:
        os.write(report_fd, f"cannot have {error}\n".encode())
        os._exit(1)
    os.write(report_fd, b"PROTECTED\n")
    sys.argv[:] = ["program"]
    # Not named "__main__", so that main guards do not run; found under both names, as by pickle.
    program = ModuleType("program")
    sys.modules["program"] = sys.modules["__main__"] = program
    attempts = []
    sys.addaudithook(lambda event, _: attempts.append(KINDS[event]) if event in KINDS else None)
    read, write, leave = os.read, os.write, os._exit
    describe, streams = traceback.format_exception, (sys.stdout, sys.stderr)
    reason = b"ok"
    try:
        exec(compile(source, "<program>", "exec"), program.__dict__)
    except BaseException as error:  # whatever it is, it is the program's
        said = b""
        try:
            reason = reason_of(error, attempts).encode()
            said = "".join(describe(error)).encode("utf-8", "backslashreplace")
        except BaseException:  # the program has replaced what these use
            reason = b"error"
    else:
        said = b""
    for stream in streams:
        try:
            stream.flush()
        except BaseException:  # closed, or what lies below is
            continue
    try:
        write(2, said)
    except OSError:  # closed
        pass
    write(report_fd, read(token_fd, 64) + reason)
    leave(0)


main()
