# Everything a newcomer needs: `make demo`, `make test`; `make bench` compares with everyone else. Each creates .venv and installs into it.
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test bench lint

$(VENV)/installed: pyproject.toml
	python3 -m venv $(VENV)
	$(PY) -m pip install --quiet torch==2.13.0
	$(PY) -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(PY) examples/demo.py

test: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist loadfile

bench: $(VENV)/installed
	$(PY) -m pip install --quiet --editable ".[peers]"
	printf '%s\n' text video image | OMP_NUM_THREADS=1 xargs -P 2 -I {} $(PY) benchmarks/compare.py --model {}

lint: $(VENV)/installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) -m mypy
