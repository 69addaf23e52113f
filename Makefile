# The two commands of the README are `make demo` and `make test`; `make` alone lists all of them.
# Each builds .venv first when it is missing or when what it is installed from has changed.

PYTHON ?= python3
# Every package at one version, with the checksums of its files; `make LOCK= …` takes the newest that settings.ini allows.
LOCK ?= requirements.lock
BIN := .venv/bin
# The stamp carries a checksum of the files that name the requirements, and is written last: a changed requirement or
# an interrupted installation is installed again, a new clone or a mere `touch` is not.
SUM := $(shell cat settings.ini setup.py pyproject.toml tools/lock.py $(LOCK) | cksum | cut -d ' ' -f 1)
STAMP := .venv/installed-$(SUM)
# Environments beside it, kept in the same way: the lowest versions that are permitted, and what the extras bring.
LOWEST := .venv-lowest/installed-$(SUM)
EXTRAS := .venv-extras/installed-$(SUM)
UV := .venv-uv/bin/uv

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MPLBACKEND := Agg
# torch and its friends warn about each other; a notebook would store such a line with the path of one machine in it
export PYTHONWARNINGS := ignore::FutureWarning,ignore::SyntaxWarning,ignore::DeprecationWarning
# idle threads sleep instead of spinning: on cores shared with others, spinning makes training ten times slower
export OMP_WAIT_POLICY := PASSIVE
# two notebooks, or two files of tests, run at a time: one thread each
LIMITS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: help venv lock demo test test-notebooks test-pytest test-sync test-lowest test-extras docs lib store bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    draw a small screen, learn it, name its unseen wells: demo/report.html, demo/explore.html"
	@echo "make test    run every notebook and every test, check that generated files are in step (20 to 40 minutes on 2 cores)"
	@echo "make test-lowest   run the tests with the lowest permitted versions, in .venv-lowest (as long; the first run installs it, about 6 GB)"
	@echo "make test-extras   run what needs packages of the extras, in .venv-extras (about 3 minutes; the first run installs it, about 6 GB)"
	@echo "make docs    write docs/ and README.md from the notebooks"
	@echo "make lib     write rcic_fastai/ from the notebooks"
	@echo "make store   run every notebook and store its outputs"
	@echo "make bench   measure, and store the figures in bench/results/"
	@echo "make lock    resolve requirements.lock anew, with checksums"
	@echo "make clean   remove .venv, .venv-*, demo/ and caches"
	@echo "PYTHON=...   which Python (3.11 or newer) makes .venv; now $(PYTHON)"

venv: $(STAMP)

# Says what to do where $(PYTHON) cannot make environments.
define python_works
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON): install Python 3.11 or newer, or name one with make PYTHON=/path/to/python."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: install a newer one, or name one with make PYTHON=/path/to/python."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make environments: install its venv module (on Debian and Ubuntu, the package python3-venv)."; exit 1; }
endef

$(STAMP):
	$(python_works)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Making .venv (some minutes, about 6 GB)."; $(PYTHON) -m venv --clear .venv; }
	@rm -f .venv/installed-*
ifeq ($(LOCK),)
	$(BIN)/python -m pip install -q -e '.[dev]'
else
	$(BIN)/python -m pip install -q --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
endif
	@touch $@

demo: $(STAMP)
	$(BIN)/rcic_demo demo --force

# uv resolves for all systems and Pythons that are supported.
lock: $(UV)
	$(PYTHON) tools/lock.py > .venv-uv/requirements.in
	$(UV) pip compile .venv-uv/requirements.in --universal --generate-hashes --python-version 3.11.7 \
		--no-header --no-annotate -q -o requirements.lock

$(UV):
	$(python_works)
	$(PYTHON) -m venv --clear .venv-uv && .venv-uv/bin/python -m pip install -q uv

# What the library and its extras name at its lowest version, the rest at its newest; a bound that cannot be reached fails.
$(LOWEST): $(UV)
	$(PYTHON) -m venv --clear .venv-lowest
	$(PYTHON) tools/lock.py lowest > .venv-lowest/lowest.in
	$(UV) pip compile .venv-lowest/lowest.in --python .venv-lowest/bin/python --resolution lowest-direct \
		--no-header --no-annotate -q -o .venv-lowest/lowest.txt
	$(PYTHON) tools/lock.py check .venv-lowest/lowest.txt
	$(UV) pip install -q --python .venv-lowest/bin/python -r .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

# The versions of requirements.lock, but for those that an extra does not permit (AnnData: pandas below 3).
$(EXTRAS): $(UV)
	$(PYTHON) -m venv --clear .venv-extras
	$(PYTHON) tools/lock.py extras > .venv-extras/extras.in
	cp requirements.lock .venv-extras/extras.txt
	$(UV) pip compile .venv-extras/extras.in --python .venv-extras/bin/python --generate-hashes \
		--no-header --no-annotate -q -o .venv-extras/extras.txt
	$(UV) pip install -q --python .venv-extras/bin/python --require-hashes -r .venv-extras/extras.txt
	.venv-extras/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

# All three parts run, whatever the first ones say.
test: $(STAMP)
	@failed=""; for part in notebooks pytest sync; do \
		$(MAKE) --no-print-directory test-$$part || failed="$$failed $$part"; done; \
	if [ -n "$$failed" ]; then echo "make test: failed:$$failed"; exit 1; fi; echo "make test: everything passed"

test-notebooks: $(STAMP)
	$(LIMITS) $(BIN)/python tools/notebooks.py

# The long ones first, so that the two workers end together. Each file is named: older versions of pytest pass over a
# folder some of whose files were named before it.
LONG := $(patsubst %,tests/test_%.py,steps cli systems checkpoints simulate refit soak distributed network stream)
TESTS := $(LONG) $(filter-out $(LONG),$(sort $(wildcard tests/test_*.py)))
PYTEST := -m pytest -q -ra --durations=10 -n 2 --dist loadfile --no-loadscope-reorder
test-pytest: $(STAMP)
	$(LIMITS) $(BIN)/python $(PYTEST) $(TESTS)

test-lowest: $(LOWEST)
	$(LIMITS) .venv-lowest/bin/python $(PYTEST) $(TESTS)

# The tests marked `extra`, where a missing package fails; then the notebooks that do more where one is installed.
test-extras: $(EXTRAS)
	$(LIMITS) .venv-extras/bin/python $(PYTEST) --extras tests
	$(LIMITS) .venv-extras/bin/python tools/notebooks.py $(shell grep -l find_spec nbs/*.ipynb)

test-sync: $(STAMP)
	$(LIMITS) $(BIN)/python tools/sync.py check

docs: $(STAMP)
	$(LIMITS) $(BIN)/python tools/sync.py docs

lib: $(STAMP)
	$(BIN)/python tools/sync.py lib

store: $(STAMP)
	$(LIMITS) $(BIN)/python tools/notebooks.py --save

bench: $(STAMP)
	@failed=""; for b in bench/*.py; do case $$b in */machine.py|*/free_threaded.py) continue;; esac; echo "== $$b"; \
		$(BIN)/python $$b || failed="$$failed $$b"; done; \
	if [ -n "$$failed" ]; then echo "make bench: failed:$$failed"; exit 1; fi

clean:
	rm -rf .venv .venv-* demo build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
