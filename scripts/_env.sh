# Sourced by the scripts beside it: the repository's .venv, and what is installed in it.
# Leaves the shell in the repository root.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=.venv/bin

# Prints the comment that the script opens with.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "scripts/$(basename "$0")"; }
say() { printf '\n==> %s\n' "$*"; }
fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# Prints a Python of at least 3.10: $PYTHON where it is set, else the first one on PATH that will do.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    candidate=${PYTHON:-python3}
    fail "No Python that can be used: $candidate is $("$candidate" --version 2>/dev/null || echo missing)." \
        "epcomm needs Python 3.10 or later. Install one, or name it: PYTHON=/path/to/python3.12 $0"
}

# Makes .venv unless it is there.
ensure_venv() {
    local python
    if [ -e .venv ]; then
        is_new_enough $bin/python && [ -x $bin/pip ] ||
            fail "The .venv here cannot be used: it needs Python 3.10 or later, and pip." \
                "Remove it, and $0 will make another: rm -r .venv"
        return
    fi
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        fail "$python cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"
    fi
}

# install NAME REQUIREMENT...: pip installs the requirements into .venv. A stamp under NAME makes the
# next run skip it, until the package's own requirements change. epcomm itself is installed editable,
# so edits need no installation.
install() {
    local name=$1 want
    shift
    ensure_venv
    want="$(cat setup.cfg pyproject.toml | cksum) $*"
    if [ "$(cat ".venv/installed-$name" 2>/dev/null)" = "$want" ]; then
        return
    fi
    say "installing into .venv: $*"
    $bin/pip install --quiet --disable-pip-version-check "$@"
    printf '%s\n' "$want" >".venv/installed-$name"
}
