#!/usr/bin/env bash
# The test suite from nothing: .venv, what the tests need, pytest. Arguments go on to pytest.
#
#     bash scripts/test.sh
#     bash scripts/test.sh -m "not peers" tests/test_layout.py

source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

make_venv test "$TEST_EXTRAS"

say "pytest $*"
"$PYTHON" -m pytest "$@"
