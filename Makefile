# Everything rests on `setup`: a virtual environment in .venv with the firefly command in it.
# It is made again only when what it is made from changes, so a second run needs no network.

PYTHON ?= python3
VENV := .venv
# Paths stay relative, so a folder name with spaces is no matter.
PY := $(VENV)/bin/python
STAMP := $(VENV)/.firefly-setup

.PHONY: setup demo test test-slow test-browser test-gpu check extras ci clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt script/setup.sh
	sh script/setup.sh "$(PYTHON)" "$(VENV)"
	touch "$(STAMP)"

demo: setup
	"$(PY)" examples/demo.py

# Two processes of one thread: the models are tiny, and threads that wait for each other on a busy machine take ten
# times as long.
test: setup
	OMP_NUM_THREADS=1 "$(PY)" -m pytest -n 2 -m "not slow and not gpu and not browser"

test-slow: setup
	"$(PY)" -m pytest -m "slow and not gpu"

# The page in Debian's chromium (apt-get install chromium fonts-noto-cjk), one process: it trains on both cores.
test-browser: setup
	"$(PY)" -m pytest -m browser

test-gpu: setup
	"$(PY)" -m pytest -m gpu || test $$? -eq 5

check: setup
	"$(PY)" -m ruff format --check .
	"$(PY)" -m ruff check .
	"$(PY)" -m pyright

# The wheel with each of its extras: whether the index has versions that go together and with constraints.txt.
extras: setup
	sh script/extras.sh "$(PY)"

# All that a change has to pass, anywhere. FIREFLY_CI=1 makes what is skipped for want of a file or a package a failure.
ci: check test test-slow extras

clean:
	rm -rf "$(VENV)" output checkpoint
