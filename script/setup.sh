#!/bin/sh
# Make the virtual environment: setup.sh PYTHON VENV. Versions are those that CI tests (constraints.txt).
# 3.11 is what transformers 5.23 asks for. Where python3 is older, a newer one beside it is taken.
set -eu
wanted=$1
venv=$2

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if ! [ -x "$venv/bin/python" ] || ! new_enough "$venv/bin/python"; then
    python=
    for candidate in "$wanted" python3.12 python3.11 python3.13; do
        if new_enough "$candidate"; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "Firefly needs Python 3.11 or newer, and \"$wanted\" is not. Name one: make setup PYTHON=/path/to/python3.11" >&2
        exit 2
    fi
    rm -rf "$venv"
    "$python" -m venv "$venv" || {
        echo "No virtual environment could be made. On Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 2
    }
fi
"$venv/bin/python" -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
# DeepSpeed asks the installed torch how to build; of its kernels none is needed here. It is for Linux.
if [ "$(uname)" = Linux ]; then
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet -c constraints.txt setuptools wheel
    DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --disable-pip-version-check --quiet -c constraints.txt \
        --no-build-isolation deepspeed
fi
