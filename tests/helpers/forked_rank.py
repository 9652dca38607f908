"""Stands for `python` where torchrun starts a rank: the fork server makes it instead.

    PYTHON_EXEC=forked_rank.py torchrun ...       FORK_SERVER in the environment names its socket

torchrun starts, signals and waits for this process, which imports no torch. It passes signals on to
the rank, and ends as the rank ends; where it is killed itself, the server kills the rank.
"""

import json
import os
import signal
import socket
import sys


def main() -> int:
    """Start the rank and wait; returns its exit code."""
    asker = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asker.connect(os.environ["FORK_SERVER"])
    program = {"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}
    socket.send_fds(asker, [json.dumps(program).encode()], [0, 1, 2])
    rank = json.loads(asker.recv(1000))["pid"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _: os.kill(rank, got))
    code = json.loads(asker.recv(1000))["code"]
    if code < 0:
        if -code in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main())
