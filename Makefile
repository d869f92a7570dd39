# make report: environment, replay, notebook, figures, report.pdf (TRAIN=1 trains everything anew, SEEDS=n fewer seeds).  make test: the checks.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: report test test-all replay bench check-report clean

report: .venv/report
	$(BIN)/python -m lab.report

test: .venv/test
	$(BIN)/python -m pytest -q -m "not long" tests

test-all: .venv/test
	$(BIN)/python -m pytest -q tests

replay: .venv/report
	$(BIN)/python -m lab.report --replay

bench: .venv/test
	$(BIN)/python -m lab.bench

check-report: .venv/report
	$(BIN)/python -m lab.report --check

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
	rm -rf .venv .build trial
