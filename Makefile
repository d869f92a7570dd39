# make report: environment, training, notebook, figures, report.pdf.  make test: the checks.  make bench: speed beside peers.
PYTHON ?= python3
PROFILE ?= full
BIN := .venv/bin

.PHONY: report test bench check-report clean

report: .venv/report
	PROFILE=$(PROFILE) $(BIN)/python report.py

test: .venv/test
	$(BIN)/python -m pytest -q tests

bench: .venv/test
	$(BIN)/python report.py --bench

check-report: .venv/report
	$(BIN)/python report.py --check

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv

.venv/report: .venv/bin/python requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: .venv/report tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv .build quick smoke
