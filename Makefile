# Two commands on an empty machine that has python3 (3.11 or newer) and make:
#   make quickstart   a real teacher, pruned, distilled, measured; the report is in runs/quickstart
#   make test         all tests, then the small recipes against their baselines
# Each installs what it needs into .venv first; a second call installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test coverage bench soak picture lint clean

quickstart: $(INSTALLED)
	$(BIN)/shearling run quickstart

PACKAGES := pipelines reports teachers students compress

# The tests must run through nine tenths of the lines of each package. Each keeps to one thread, so
# two processes take them, a file at a time.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PACKAGES:%=--cov=%) --cov-report=
	@for package in $(PACKAGES); do \
	  printf 'coverage of %s: ' $$package; \
	  $(BIN)/coverage report --include="$$package/*" --format=total --precision=1 --fail-under=90 || exit 1; \
	done
	$(BIN)/shearling regress

bench: $(INSTALLED)
	$(BIN)/python -m pytest tests/bench -o python_files='bench_*.py' -s

# The lines that the last `make test` did not run.
coverage: $(INSTALLED)
	$(BIN)/coverage report --show-missing --skip-covered

# Kills and other faults on whole runs, hundreds of them; docs/RELIABILITY.md has the numbers.
soak: $(INSTALLED)
	$(BIN)/python tests/pipelines/killing.py --kills 300
	$(BIN)/python tests/pipelines/faults.py --tries 20

# The README's pictures of the quickstart's report; needs chromium.
picture: runs/quickstart/report.html
	$(PYTHON) docs/pictures.py runs/quickstart

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Made anew when the lists of packages change, and finished by the stamp alone: an installation
# that was broken off is begun again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "shearling needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "Python can't make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV), once"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@
