#!/bin/sh
# Prints the path of a Python that can run falcon_jax, or says what to install and exits with 1.
#
# Every candidate is run, never judged by its name: pyenv leaves a `python3.13` on PATH that only prints an error,
# and Debian's `python3` may lack the modules that make a virtual environment. $PYTHON, where set, is the one
# candidate. The order is that of the tested versions; jax publishes wheels for 3.12 to 3.14.
set -u

check='
import sys
if not (3, 12) <= sys.version_info[:2] < (3, 15):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("has no venv module (Debian and Ubuntu: install the package python%d.%d-venv)" % sys.version_info[:2])
print(getattr(sys, "_base_executable", sys.executable))
'
rejected=""

try() {
    case "$1" in
        */*) [ -x "$1" ] || return 0 ;;
        *) command -v "$1" >/dev/null 2>&1 || return 0 ;;
    esac
    if answer=$("$1" -c "$check" 2>&1 </dev/null); then
        printf '%s\n' "$answer"
        exit 0
    fi
    # The first line that says something is enough: a shim's error is a paragraph.
    answer=$(printf '%s\n' "$answer" | sed -n '/[^[:space:]]/{p;q;}')
    rejected="$rejected
  $1: ${answer:-does not run}"
}

if [ -n "${PYTHON:-}" ]; then
    try "$PYTHON"
    printf 'PYTHON=%s cannot be used; it must be Python 3.12, 3.13 or 3.14.%s\n' "$PYTHON" "${rejected:-
  $PYTHON: not found}" >&2
    exit 1
fi

for name in python3.12 python3.13 python3.14 python3 python; do
    try "$name"
done

pyenv_root=${PYENV_ROOT:-}
if [ -z "$pyenv_root" ] && command -v pyenv >/dev/null 2>&1; then
    pyenv_root=$(pyenv root 2>/dev/null </dev/null)
fi
for version in 3.12 3.13 3.14; do
    for python in "${pyenv_root:-${HOME:-}/.pyenv}/versions/$version".*/bin/python; do
        try "$python"
    done
done

if command -v uv >/dev/null 2>&1; then
    python=$(uv python find --system '>=3.12,<3.15' 2>/dev/null </dev/null) && try "$python"
fi

cat >&2 <<MESSAGE
falcon_jax needs Python 3.12, 3.13 or 3.14, and this machine has none that works.${rejected:+
Looked at:$rejected}
Install one, in any of these ways, and run the same command again:
  Debian, Ubuntu:  apt install python3.12 python3.12-venv   (or python3 python3-venv where that is 3.12 or newer)
  Fedora:          dnf install python3.12
  macOS:           brew install python@3.12
  anywhere:        pyenv install 3.12    or    uv python install 3.12
or name one that is not on PATH: make demo PYTHON=/path/to/python3.12
MESSAGE
exit 1
