#!/bin/sh
# Installs this repository, editable, into a virtual environment, which it makes first where there is none; with the
# extra `test` also a compiler for GPUs, VENV/gpu_compiler.
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
    "$venv/bin/python" -m uv pip install --quiet --python "$venv/bin/python" "$@" </dev/null
}
install() {
    if "$venv/bin/python" -c 'import uv' >/dev/null 2>&1 </dev/null; then
        with_uv "$@" && return
        # Behind a proxy with a certificate of its own: uv trusts only the ones it brings until it is told otherwise.
        echo "uv failed (see above); once more, with the system's certificates" >&2
        with_uv --system-certs "$@" && return
    fi
    echo "uv cannot install into $venv (see above); trying pip, which takes some minutes longer" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" </dev/null
}
install "$@" -e "$target"

# For tests: what compiles kernels for an NVIDIA GPU that is not there. In a folder of its own, since a CUDA plugin in
# the environment prints a traceback into every program that starts JAX on a machine without a GPU. Where there is one,
# and EXTRAS brought a plugin for it, that one compiles.
case ",$extras," in
    *,cuda*) exit ;;
    *,test,*) [ "$(uname -s)" = Linux ] || exit 0 ;;
    *) exit ;;
esac
compiler=$venv/gpu_compiler
release=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("jaxlib"))')
rm -rf "$compiler"
install "$@" --no-deps --target "$compiler" \
    "jax-cuda13-plugin==$release" "jax-cuda13-pjrt==$release" nvidia-cuda-nvcc nvidia-nvvm
# torch's triton brings the disassembler.
disassembler=$("$venv/bin/python" -c 'from importlib.util import find_spec
print(find_spec("triton").submodule_search_locations[0])')/backends/nvidia/bin/nvdisasm
ln -s "$disassembler" "$compiler/nvidia/cu13/bin/nvdisasm"
