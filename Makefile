# Targets make .venv themselves unless an environment is active (a virtual one or conda's): that one is used then.
# demo and lab install what the notebooks need, the test targets add theirs to the same environment.
# The folder's own name stands nowhere but in "$$PWD", so that it may hold spaces; for the same reason all programs of
# the environment are called as modules: a script of a virtual environment names its python in a line that may break.
PYTHON ?= python3
ifneq ($(VIRTUAL_ENV)$(CONDA_PREFIX),)
PY := python
READY := build/.installed
NEW_ENVIRONMENT = mkdir -p build
else
PY := .venv/bin/python
READY := .venv/.installed
NEW_ENVIRONMENT = test -x .venv/bin/python || "$(PYTHON)" -m venv .venv
endif
TEST_READY := $(READY)-test
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check

# Options of JupyterLab: make lab LAB="--ip=0.0.0.0 --port=9000". It refuses to run as root, the only user of many
# containers, unless told to.
LAB ?= --ip=localhost
AS_ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: demo test test-fast test-oldest test-browser lint lab notebooks bench lock clean

# Notebooks 1 to 5, one after the other, at their default parameters: about 7 minutes on two CPU cores. The sixth takes
# longer, and trains what the others have shown.
demo: $(READY)
	$(PY) -m tests.tools.demo

# A process for each core. Each takes about 1.5 GB, so more than four would not fit on every machine.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist worksteal

# Everything: llmcore, the notebooks by nbval and papermill, the pairing.
test: $(TEST_READY)
	$(PY) -m pytest $(SIDE_BY_SIDE)
	$(PY) -m tests.tools.run_nbval

# Only what takes seconds, with a fifth of hypothesis's examples.
test-fast: $(TEST_READY)
	FEW_EXAMPLES=1 $(PY) -m pytest $(SIDE_BY_SIDE) -m "not slow"

# The fast tests with the lowest version of each package that pyproject.toml allows: torch 2.11, as the images and hosted
# notebooks with a GPU have it. In an environment of its own, about 7 GB with torch's build for CUDA.
OLDEST := build/oldest/bin/python
OLDEST_INSTALL := $(OLDEST) -m pip install --quiet --disable-pip-version-check
test-oldest:
	test -x $(OLDEST) || "$(PYTHON)" -m venv build/oldest
	$(OLDEST_INSTALL) packaging
	$(OLDEST) -m tests.tools.lock lowest > build/oldest/requirements.txt
	$(OLDEST_INSTALL) $$(grep '^torch==' build/oldest/requirements.txt)
	$(OLDEST_INSTALL) -r build/oldest/requirements.txt
	$(OLDEST_INSTALL) --no-deps -e .
	FEW_EXAMPLES=1 $(OLDEST) -m pytest $(SIDE_BY_SIDE) -m "not slow"

# A real JupyterLab in headless Chromium: the widgets are used, screenshots go to outputs/screenshots/.
test-browser: $(TEST_READY)
	$(PY) -m pytest tests/browser.py

lint: $(TEST_READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# .jupyter/ keeps JupyterLab from asking about news and looking for updates.
lab: $(READY)
	JUPYTER_CONFIG_PATH="$$PWD/.jupyter" $(PY) -m jupyterlab $(LAB) $(AS_ROOT) --LabApp.default_url=/lab/tree/notebooks

# Execute the notebooks and store their outputs, after an edit of their .py halves.
notebooks: $(READY)
	$(PY) -m tests.tools.render

# Speed beside transformers and a plain GPT-2; quiet machines give better numbers.
bench: $(READY)
	$(PY) -W ignore -m tests.benchmarks

# Both lock files anew from pyproject.toml, after an edit of its dependencies.
lock: $(READY)
	$(PY) -m tests.tools.lock

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and alone: whatever else asks for it then finds it there, and takes no other build.
$(READY): requirements.lock pyproject.toml
	$(NEW_ENVIRONMENT)
	$(PIP_INSTALL) $$(grep '^torch==' requirements.lock)
	$(PIP_INSTALL) -r requirements.lock
	$(PIP_INSTALL) --no-deps -e .
	touch $@

$(TEST_READY): $(READY) requirements-test.lock
	$(PIP_INSTALL) -r requirements-test.lock
	touch $@
