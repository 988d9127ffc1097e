#!/bin/sh
# Build the wheel and let pip resolve it with each extra, installing nothing: extras.sh PYTHON.
set -eu
python=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Building leaves files beside its sources, so it is done in a copy.
mkdir "$scratch/source"
cp -R pyproject.toml README.md LICENSE src "$scratch/source"
rm -rf "$scratch"/source/src/*.egg-info
pip() {
    "$python" -m pip --disable-pip-version-check --quiet "$@"
}
pip wheel --no-deps --wheel-dir "$scratch" "$scratch/source"
wheel=$(echo "$scratch"/*.whl)
for extra in $("$python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"])'); do
    echo "firefly-llm[$extra]"
    # DeepSpeed's setup asks the installed torch how to build.
    DS_BUILD_OPS=0 pip install --dry-run --no-build-isolation --constraint constraints.txt "$wheel[$extra]"
done
