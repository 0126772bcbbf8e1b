#!/bin/sh
# Installs this repository, editable, into a virtual environment, which it makes first where there is none.
#
#   tools/install.sh VENV EXTRAS [OPTION...]     EXTRAS: comma-separated or ""; OPTIONs go to the installer
#
# uv installs in seconds what takes pip minutes, so uv comes first; pip takes the same options.
set -eu

venv=$1
extras=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
target=.
[ -z "$extras" ] || target=".[$extras]"

# Also where the interpreter behind it is gone.
if ! "$venv/bin/python" -c '' >/dev/null 2>&1 </dev/null; then
    python=$(sh tools/find_python.sh)
    echo "Making $venv with $python"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
# One that uv made, or that was left half-made, has no pip.
"$venv/bin/python" -c 'import pip' >/dev/null 2>&1 </dev/null || "$venv/bin/python" -m ensurepip >/dev/null </dev/null

if ! "$venv/bin/python" -c 'import uv' >/dev/null 2>&1 </dev/null; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt uv </dev/null || true
fi
with_uv() {
    "$venv/bin/python" -m uv pip install --quiet --python "$venv/bin/python" "$@" -e "$target" </dev/null
}
if "$venv/bin/python" -c 'import uv' >/dev/null 2>&1 </dev/null; then
    with_uv "$@" && exit
    # Behind a proxy with a certificate of its own: uv trusts only the ones it brings until it is told otherwise.
    echo "uv failed (see above); once more, with the system's certificates" >&2
    with_uv --system-certs "$@" && exit
fi
echo "uv cannot install into $venv (see above); trying pip, which takes some minutes longer" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" -e "$target" </dev/null
