# make demo: install into .venv, then the whole recipe on a tiny model. make test: install, then the tests.
# make check: the quick tests, for each commit; those marked slow (tests/conftest.py lists them) are left out.
#
# torch comes from PyPI, whose Linux build is the CUDA one: about 3 GB to download. Without an NVIDIA GPU, name
# PyTorch's index of CPU builds in PIP_EXTRA_INDEX_URL, or put a CPU wheel of the pinned version in PIP_FIND_LINKS.

PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: demo test check lint docs clean

# Threads that wait asleep: those that spin make a step five times slower as soon as something else runs as well.
demo: $(INSTALLED)
	OMP_WAIT_POLICY=PASSIVE $(RUN) tools/demo.py

# Prints the 15 slowest tests. One thread per worker: workers that each start a thread per core only slow each other down.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(JOBS) --dist worksteal --durations=15

# About two minutes on two idle cores.
check: $(INSTALLED)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(JOBS) --dist worksteal -m "not slow" --durations=15

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The pages of docs/ as a site in build/docs.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build -q --strict

# taming-transformers asks for torchvision, which the one class used of it does not need: hence --no-deps.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (torch is large: this can take a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps taming-transformers-rom1504
	@touch $@

# logs/, models/ and outputs/ are the user's work and stay.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis outputs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
