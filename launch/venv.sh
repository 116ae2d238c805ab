# Source this from a bash script: makes or reuses the project's own .venv, and sets ROOT and PYTHON.
# EXTRAS=deepspeed,eval before it: with these extras of pyproject.toml too (an argument would take the caller's away).
# Installs only when pyproject.toml, constraints.txt or the checkout's place changed; two scripts may run it at once.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
PYTHON=$ROOT/.venv/bin/python

# The first interpreter of Python 3.11 or newer. A name may be a stub that does not run, so each is tried.
_find_python() {
    local name
    for name in ${DISTCKPT_PYTHON:-} python3.11 python3 python python3.12 python3.13; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    echo "distckpt needs Python 3.11 or newer, and found $(python3 --version 2>/dev/null || echo no Python)." >&2
    echo "Install one, or name one: DISTCKPT_PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

_stamp() {
    echo "$ROOT"
    cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt"
}

_stamps() { # a file for what is always installed, and one with each extra's name
    local extra extras=${EXTRAS:-}
    echo "$ROOT/.venv/.installed"
    for extra in ${extras//,/ }; do echo "$ROOT/.venv/.installed-$extra"; done
}

_venv_is_current() {
    local stamp
    for stamp in $(_stamps); do
        _stamp | cmp -s - "$stamp" || return 1
    done
    "$PYTHON" -I -c 'import distckpt' 2>/dev/null
}

_venv_is_usable() {
    [[ ! -e $ROOT/.venv/.installed || $(head -n 1 "$ROOT/.venv/.installed") == "$ROOT" ]] || return 1 # it was moved
    "$PYTHON" -m pip --version >/dev/null 2>&1
}

_make_venv() {
    local base stamp
    _venv_is_current && return # another script made it while this one waited
    if ! _venv_is_usable; then
        base=$(_find_python) || return
        echo "== making .venv with $("$base" --version)"
        find "$ROOT/.venv" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
        if ! "$base" -m venv "$ROOT/.venv"; then
            echo "$base could not make a virtual environment; Debian and Ubuntu have a package python3-venv for it." >&2
            return 1
        fi
    fi
    echo "== installing distckpt and its pinned dependencies into .venv (torch is the large one)"
    rm -f "$ROOT/.venv"/.installed*
    (cd "$ROOT" && "$PYTHON" -m pip install --disable-pip-version-check -c constraints.txt \
        -e ".[test${EXTRAS:+,$EXTRAS}]") || return
    for stamp in $(_stamps); do _stamp >"$stamp"; done
}

if ! _venv_is_current; then
    mkdir -p "$ROOT/.venv"
    (
        if command -v flock >/dev/null && ! flock -n 9; then
            echo "== waiting for another script that installs into .venv"
            flock 9
        fi
        _make_venv 9>&-
    ) 9>"$ROOT/.venv/.lock" || exit 1
fi
