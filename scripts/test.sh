#!/usr/bin/env bash
# The test suite from nothing: .venv, the packages that the tests need, pytest in two processes.
# Arguments are passed to pytest.
#
#     bash scripts/test.sh
#     bash scripts/test.sh -m "not peers" tests/layout/test_layout.py
#     bash scripts/test.sh -n 0 -x tests/data/test_rows.py      one process

source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

make_venv test "$TEST_EXTRAS"

# Two processes: most tests keep one core busy, and a few need 3 GB. The tests of a file run in the
# same process, and the files in the order of tests/conftest.py, the longest first. Waiting threads
# sleep: on two cores spinning ones would hold up the other process.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
say "pytest -n 2 --dist loadfile $*"
"$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
