# Targets make .venv themselves unless an environment is active (a virtual one or conda's).
PYTHON ?= python3
ifneq ($(VIRTUAL_ENV)$(CONDA_PREFIX),)
BIN :=
READY := build/.installed
else
BIN := .venv/bin/
READY := .venv/.installed
endif

.PHONY: demo test test-fast test-browser lint lab notebooks bench clean

# Notebooks 1 to 5, one after the other, at their default parameters: about 7 minutes on two CPU cores. The sixth takes
# longer, and trains what the others have shown.
demo: $(READY)
	$(BIN)python -m tests.demo

# Everything: llmcore, the notebooks by nbval and papermill, the pairing.
test: $(READY)
	$(BIN)python -m pytest -m "not slow"
	$(BIN)python -m pytest -m slow
	$(BIN)python -m tests.run_nbval

# Only what takes seconds.
test-fast: $(READY)
	$(BIN)python -m pytest -m "not slow"

# A real JupyterLab in headless Chromium: the widgets are used, screenshots go to outputs/screenshots/.
test-browser: $(READY)
	$(BIN)python -m pytest tests/browser.py

lint: $(READY)
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy

# .jupyter/ keeps JupyterLab from asking about news and looking for updates.
lab: $(READY)
	JUPYTER_CONFIG_PATH=$(CURDIR)/.jupyter $(BIN)jupyter lab --LabApp.default_url=/lab/tree/notebooks

# Execute the notebooks and store their outputs, after an edit of their .py halves.
notebooks: $(READY)
	$(BIN)python -m tests.render

# Speed beside transformers and a plain GPT-2; quiet machines give better numbers.
bench: $(READY)
	$(BIN)python -W ignore -m tests.benchmarks

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and alone: whatever else asks for it then finds it there, and takes no other build.
.venv/.installed: requirements.lock pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

build/.installed: requirements.lock pyproject.toml
	mkdir -p build
	python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@
