# Two commands: `make reproduce` makes everything, `make test` proves that it works. `make` alone lists the rest.
# Needs Python 3.11 to 3.14, make and git; everything else is installed into .venv from requirements.lock.

PROFILE ?= laptop
PAIRS   ?=
# With PAIRS: names of columns where they are not the usual ones, the image folder, and skip for bad rows.
IMAGE_COLUMN ?=
TEXT_COLUMN  ?=
CLASS_COLUMN ?=
IMAGE_ROOT   ?=
ON_BAD_ROW   ?=
# More seeds than the profile's, e.g. SEEDS="0 1 2": those that are there are not trained again.
SEEDS        ?=
CORES   ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# NVIDIA GPUs of this machine, or those of CUDA_VISIBLE_DEVICES: as many trainings and evaluations at a time, one on each.
# Without any, CORES says how many.
comma := ,
GPUS    ?= $(if $(filter undefined,$(origin CUDA_VISIBLE_DEVICES)),$(shell nvidia-smi -L 2>/dev/null | grep -c "^GPU"),$(words $(filter-out -%,$(subst $(comma), ,$(CUDA_VISIBLE_DEVICES)))))
PYTHON  ?=
SNAKEFLAGS ?=
LABFLAGS   ?=
MINUTES    ?= 6
ROUNDS     ?= 10

# Paths below the root stay relative and what is absolute is quoted, so that a root with spaces works.
PY    := .venv/bin/python
STAMP := .venv/.installed
# The kernel `python3` is .venv's own, whatever the user has installed elsewhere.
ENV   = PATH="$(CURDIR)/.venv/bin:$$PATH" JUPYTER_PREFER_ENV_PATH=1 TOKENIZERS_PARALLELISM=false
# Tests: no network, no display, no GPU (outputs and figures are those of a CPU), and one thread a worker.
TESTENV = $(ENV) HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 MPLBACKEND=Agg OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
quote = '$(subst ','\'',$(1))'

.DEFAULT_GOAL := help
.PHONY: help install reproduce backbone site test nightly test-browser bench soak soak-graph mutate verify audit environments lint lab clean distclean check-arguments force
.DELETE_ON_ERROR:

help: ## this list
	@echo "make TARGET [PROFILE=smoke|laptop|long|many|pairs|gpu] [PAIRS=pairs.jsonl] [CORES=n] [PYTHON=python3.x]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

reproduce: check-arguments $(STAMP) ## the whole road from the committed backbone: benchmark, three stages, evaluation, figures -> runs/PROFILE
	@$(ENV) $(PY) -m snakemake --cores $(CORES) --rerun-incomplete --keep-incomplete --keep-going --nolock $(SNAKEFLAGS) \
		$(if $(filter-out 0,$(GPUS)),--resources gpu=$(GPUS)) \
		--config profile=$(call quote,$(PROFILE)) $(if $(filter-out 0,$(GPUS)),gpus=$(GPUS)) $(if $(PAIRS),pairs=$(call quote,$(PAIRS))) \
		$(if $(IMAGE_COLUMN),image_column=$(call quote,$(IMAGE_COLUMN))) $(if $(TEXT_COLUMN),text_column=$(call quote,$(TEXT_COLUMN))) \
		$(if $(CLASS_COLUMN),class_column=$(call quote,$(CLASS_COLUMN))) $(if $(IMAGE_ROOT),image_root=$(call quote,$(IMAGE_ROOT))) \
		$(if $(ON_BAD_ROW),on_bad_row=$(call quote,$(ON_BAD_ROW))) $(if $(SEEDS),seeds=$(call quote,$(SEEDS)))

backbone: check-arguments $(STAMP) ## retrain the small causal backbone under data/
	@$(ENV) $(PY) -m snakemake backbone --cores $(CORES) --rerun-incomplete --keep-incomplete --nolock $(SNAKEFLAGS) \
		--config profile=$(call quote,$(PROFILE))

site: check-arguments $(STAMP) ## figures and tables of runs/PROFILE -> reports/PROFILE, its pages -> reports/site
	@test -n "$$(find runs/$(call quote,$(PROFILE)) -name '*.ipynb' 2>/dev/null)" || \
		{ echo "No executed notebooks in runs/$(PROFILE): run \`make reproduce PROFILE=$(PROFILE)\` first." >&2; exit 1; }
	@$(ENV) $(PY) scripts/publish.py runs/$(call quote,$(PROFILE)) reports/$(call quote,$(PROFILE))

test: $(STAMP) lint ## ruff, the unit tests, and every notebook with its committed outputs
	@$(TESTENV) $(PY) -m pytest -q -n $(CORES) --maxprocesses 4 tests --ignore tests/nightly --ignore tests/browser
	@$(TESTENV) $(PY) -m pytest -q -n 0 \
		--nbval --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-kernel-name python3 notebooks

nightly: $(STAMP) ## what proves rare things, an hour: scale, faults, fuzzing, benchmarks' own tests, mutations, kills
	@$(TESTENV) $(PY) -m pytest -q -n $(CORES) --maxprocesses 4 tests/nightly
	@$(MAKE) --no-print-directory mutate soak soak-graph

test-browser: $(STAMP) ## the pages and a live JupyterLab in headless Chromium, where both it and playwright are installed
	@if ! command -v chromium >/dev/null; then echo "Browser tests skipped: no chromium (Debian: apt install chromium)."; \
	elif ! $(PY) -c 'import playwright' 2>/dev/null; then \
		echo "Browser tests skipped: no playwright ($(PY) -m pip install -e '.[browser]')."; \
	else $(TESTENV) BROWSER_TESTS=1 $(PY) -m pytest -q -n 0 tests/browser; fi

bench: $(STAMP) ## what is fast and by how much: ratios -> benchmarks/results
	@OMP_NUM_THREADS=1 $(ENV) HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= $(PY) benchmarks/bench.py

soak: $(STAMP) ## kill runs at random moments for MINUTES (6) and compare what they leave with undisturbed ones
	@$(TESTENV) $(PY) scripts/soak.py --minutes $(MINUTES)

soak-graph: $(STAMP) ## kill the whole graph at random moments, ROUNDS (10) times, and compare
	@$(TESTENV) $(PY) scripts/soak_graph.py --rounds $(ROUNDS)

mutate: $(STAMP) ## break the method in one place at a time: does a test notice
	@$(TESTENV) $(PY) scripts/nightly/mutate.py

verify: $(STAMP) ## are reports/ and data/ as committed, do figures match tables, does a smoke run repeat
	@$(TESTENV) $(PY) scripts/verify.py

# --strict: a package that the advisory service could not be asked about is a failure, not a footnote.
audit: $(STAMP) ## known vulnerabilities in requirements.lock, by pip-audit in an environment of its own (needs pypi.org)
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && $(PY) -m venv "$$dir" && \
		"$$dir/bin/python" -m pip install -q --disable-pip-version-check pip-audit && \
		"$$dir/bin/pip-audit" --strict --no-deps --disable-pip --progress-spinner off -r requirements.lock

environments: $(STAMP) ## the tests on the lowest and on the newest versions that pyproject.toml admits, in new environments
	@for which in lowest newest; do $(ENV) $(PY) scripts/nightly/environments.py $$which || exit 1; done

lint: $(STAMP) ## ruff and the notebook check alone
	@$(PY) -m ruff check .
	@$(PY) scripts/check_notebooks.py notebooks

lab: $(STAMP) ## JupyterLab on the notebooks, on this machine only
	@$(ENV) $(PY) -m jupyterlab --ip=127.0.0.1 --ServerApp.root_dir="$(CURDIR)" \
		--LabApp.default_url=/lab/tree/notebooks $$([ "$$(id -u)" != 0 ] || echo --allow-root) $(LABFLAGS)

install: $(STAMP) ## .venv alone; a second call installs nothing

# The stamp holds the checkout's path: a .venv that was copied along with its checkout is made anew.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): force
endif
$(STAMP): requirements.lock pyproject.toml
	@set -e; \
	if [ -n "$(PYTHON)" ]; then candidates="$(PYTHON)"; \
	else candidates="python3 python3.14 python3.13 python3.12 python3.11 python"; fi; \
	python=; \
	for p in $$candidates; do \
		if "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; \
		then python="$$p"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "Python 3.11 to 3.14 is needed, and none was found (tried: $$candidates)." >&2; \
		for p in $$candidates; do "$$p" -c 'import sys; print("  %s is %s" % (sys.executable, sys.version.split()[0]))' \
			>&2 2>/dev/null || true; done; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; \
	fi; \
	clear=; \
	if [ -f $(STAMP) ] && [ "$$(cat $(STAMP))" != "$(CURDIR)" ]; then clear=--clear; fi; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then clear=--clear; fi; \
	if [ -L .venv ]; then rm .venv; clear=--clear; fi; \
	rm -f $(STAMP); \
	if [ -n "$$clear" ]; then "$$python" -m venv --clear .venv; fi; \
	quiet=-q; if [ -t 1 ]; then quiet=; fi; \
	echo "Installing requirements.lock into .venv (once, about a minute and up to several GB with CUDA) ..."; \
	$(PY) -m pip install --disable-pip-version-check $$quiet -r requirements.lock; \
	$(PY) -m pip install --disable-pip-version-check $$quiet --no-deps --no-build-isolation -e .; \
	printf '%s\n' "$(CURDIR)" > $(STAMP)

check-arguments:
	@test -f notebooks/profiles/$(call quote,$(PROFILE)).yaml || { \
		echo "Unknown PROFILE $(PROFILE). There are: $$(cd notebooks/profiles && ls *.yaml | sed 's/\.yaml$$//' | tr '\n' ' ')" >&2; \
		exit 2; }
	@! test $(call quote,$(PROFILE)) = paper || { \
		echo "PROFILE paper is for real checkpoints and real data: run its stages by python -m cocoa_lib.run (README)." >&2; exit 2; }
	@test -z $(call quote,$(PAIRS)) || test -e $(call quote,$(PAIRS)) || { \
		echo "PAIRS: no such file or folder: $(PAIRS)" >&2; exit 2; }

clean: ## remove runs/, caches and build products (keeps .venv, data/ and reports/)
	rm -rf runs .snakemake .pytest_cache .ruff_cache .hypothesis .coverage build dist *.egg-info
	find . -path ./.venv -prune -o -path ./.git -prune -o \
		-type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf .venv
