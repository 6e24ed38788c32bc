#!/usr/bin/env bash
# Makes .venv hold what requirements.lock pins, and this package. Run by make, once, and again when either file changes.
set -euo pipefail
cd "$(dirname "$0")/.."

log=.venv/install.log
pip=(.venv/bin/python -m pip --quiet --disable-pip-version-check)

fail() {
    echo "error: $1" >&2
    exit 1
}

step() {
    echo "[$1/4] $2"
}

find_python() {
    for candidate in python3 python3.11 python3.12 python3.13 python; do
        if command -v "$candidate" >/dev/null \
            && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

started=$SECONDS
if .venv/bin/python -m pip --version >/dev/null 2>&1; then
    step 1 "use the .venv that is there"
else
    python=$(find_python) || fail "Python 3.11 or later with venv is needed and was not found"
    step 1 "create .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
: >"$log"

step 2 "install $(grep -c '==' requirements.lock) pinned packages (a few minutes the first time)"
"${pip[@]}" install --requirement requirements.lock >>"$log" 2>&1 || fail "pip failed: $(tail -n 1 "$log") (all of it: $log)"

step 3 "install this package"
"${pip[@]}" install --no-deps --no-build-isolation --editable . >>"$log" 2>&1 \
    || fail "pip failed: $(tail -n 1 "$log") (all of it: $log)"

# Programs that a model writes run in bubblewrap; all else does without it.
if ! command -v bwrap >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "      install bubblewrap, the sandbox of rewards that run programs"
    { apt-get update && apt-get install --yes --no-install-recommends bubblewrap; } >>"$log" 2>&1 || true
fi
command -v bwrap >/dev/null || echo "      without bubblewrap, rewards that run programs refuse to: sudo apt-get install bubblewrap"

step 4 "check"
.venv/bin/qwq-jax --version >>"$log" 2>&1 || fail "qwq-jax does not start (see $log)"
echo "installed in $((SECONDS - started)) s"
