# One word a chore; CI calls the same words.
PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
JOBS ?= 2
# The newest release that is served, in requirements/vllm.lock.
NEWEST := 0.33.0
VLLM ?= $(NEWEST)
LMMS_VENV ?= .venv-lmms
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SERVING := $(VENV)/.serving
# Locks of images: less than cpu.lock, and the same releases.
IMAGE_LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header --constraints requirements/cpu.lock

.DEFAULT_GOAL := help
.PHONY: help venv serve test coverage test-long test-unit test-gpu fidelity eval eval-quick fuzz soak bench bench-gpu \
	doctor load load-ui lmms-env demo-model vllm test-vllm bench-vllm vllm-diff contract lint lock check-deploy docs-check reference gpu-check \
	release-check sbom sbom-image wheel clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(STAMP) ## set up the virtual environment (CPU engine) and nothing else

define empty-venv
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 15) or sys.exit("needs Python 3.11 to 3.14, found %d.%d; set PYTHON=" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/installer.lock
endef

# Byte code is compiled once here: otherwise every engine process compiles it again at start-up
# wherever Python is told not to write it.
$(STAMP): requirements/cpu.lock requirements/installer.lock pyproject.toml
	$(empty-venv)
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes --compile-bytecode requirements/cpu.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

# What serving needs and nothing else: the images' lock. It is not used where all is installed.
$(SERVING): requirements/image.lock requirements/installer.lock pyproject.toml
	$(empty-venv)
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes --compile-bytecode requirements/image.lock requirements/build.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $(SERVING)

serve: $(if $(wildcard $(STAMP)),$(STAMP),$(SERVING)) ## serve the demo model on the CPU engine (HOST, PORT, ARGS)
	$(BIN)/hiprune-serve --demo --host $(HOST) --port $(PORT) $(ARGS)

test: venv ## all tests, the real engine included (JOBS at a time; ARGS goes to pytest)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

PURE := tests/unit/test_budget.py tests/unit/test_clock.py tests/unit/test_details.py tests/unit/test_facade.py \
	tests/unit/test_kernel.py tests/unit/test_places.py tests/unit/test_plan.py tests/unit/test_positions.py \
	tests/unit/test_record.py tests/unit/test_scores.py tests/unit/test_select.py tests/unit/test_wishes.py

coverage: venv ## lines and branches of the pure code: all of them, or it fails
	mkdir -p build
	$(BIN)/python -m coverage run -m pytest -q $(PURE) $(ARGS)
	$(BIN)/python -m coverage report --fail-under 100

test-long: venv ## every flag, family, sweep and the newer model runner, where `make test` has a sample (hours)
	SWEEPS=whole $(BIN)/python -m pytest -m "long or sweep" --timeout 3600 --numprocesses $(JOBS) --dist loadfile $(ARGS)

test-unit: venv ## the tests that need no engine (seconds)
	$(BIN)/python -m pytest tests/unit $(ARGS)

test-gpu: ## the checks that need a CUDA device, in the environment of PYTHON
	$(PYTHON) -m pytest -m gpu -rs $(ARGS)

fidelity: venv ## measure how close the engine is to the oracles (docs/results.md)
	$(BIN)/python -m tools.fidelity

eval: venv ## measure accuracy against budget through the server (build/eval/report.html)
	$(BIN)/python -m loadtests.quality $(ARGS)

eval-quick: venv ## the same in two minutes, with thresholds: exit code 1 where pruning is wrong
	$(BIN)/python -m loadtests.quality --quick $(ARGS)

fuzz: venv ## thousands of odd requests beside well-behaved clients (minutes)
	$(BIN)/python -m pytest -m fuzz tests/e2e/test_fuzz.py $(ARGS)

soak: venv ## 10 minutes of load at concurrency 16: memory has to stay flat (build/soak/soak.json)
	$(BIN)/python -m loadtests.soak $(ARGS)

bench: venv ## benchmarks of the engine side (build/bench/bench.md; ARGS="--only a,b", ARGS=--long)
	$(BIN)/python -m loadtests.bench $(ARGS)

bench-gpu: ## the same on a GPU host, at larger sizes, in the environment of PYTHON
	$(PYTHON) -m loadtests.bench --device cuda $(ARGS)

# A setting that is left empty is the program's own default; `make load ARGS=--help` tells them all.
BUDGETS ?=
CONCURRENCY ?=
RATES ?=
STAGES ?=
DURATION ?=
WARM_UP ?=
REPEATS ?=
IMAGES ?=
SIZES ?=
QUESTION_WORDS ?=
ANSWER_TOKENS ?=
MODEL ?=
PROCESSES ?=
OUT ?=
COMPARE ?=
NOTE ?=
URL = $(if $(findstring ://,$(HOST)),$(HOST),http://$(HOST):$(PORT))
given = $(if $($(1)),$(2) $($(1)))
quoted = $(if $($(1)),$(2) '$($(1))')

load: venv ## latency and throughput against budget of the server at HOST, PORT (docs/load-testing.md)
	$(BIN)/python -m loadtests.load --url $(URL) $(call given,BUDGETS,--budgets) \
		$(call given,CONCURRENCY,--concurrency) $(call given,RATES,--rates) $(call quoted,STAGES,--stages) \
		$(call given,DURATION,--duration) $(call given,WARM_UP,--warm-up) $(call given,REPEATS,--repeats) \
		$(call quoted,IMAGES,--images) $(call given,SIZES,--sizes) $(call given,PROCESSES,--processes) \
		$(call given,QUESTION_WORDS,--question-words) $(call given,ANSWER_TOKENS,--answer-tokens) \
		$(call quoted,MODEL,--model) $(call quoted,OUT,--out) $(call quoted,COMPARE,--compare) \
		$(call quoted,NOTE,--note) $(ARGS)

load-ui: venv ## the same users in Locust's own page, on http://localhost:8089
	$(BIN)/locust --locustfile loadtests/load/locustfile.py --web-host 127.0.0.1 --host $(URL) \
		$(call quoted,BUDGETS,--budgets) $(call quoted,MODEL,--model) $(call quoted,IMAGES,--images) \
		$(call given,SIZES,--sizes) $(call given,QUESTION_WORDS,--question-words) \
		$(call given,ANSWER_TOKENS,--answer-tokens) $(call given,PROCESSES,--processes) $(ARGS)

# PyTorch and all: the same releases as the engine's where both need one, so that little is fetched.
lmms-env: venv ## set up lmms-eval's own environment (LMMS_VENV; see loadtests/quality/README.md)
	test -x $(LMMS_VENV)/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python $(LMMS_VENV)
	$(BIN)/uv pip sync --quiet --python $(LMMS_VENV)/bin/python --require-hashes requirements/lmms.lock

demo-model: venv ## train the demo model again (under an hour on 2 cores; goes on if interrupted)
	$(BIN)/python -m tools.demo_training $(ARGS)

# Of another release than the locked one; where its CPU extensions lack what it calls, it says so.
VLLM_VENV = .venv-vllm-$(VLLM)
$(VLLM_VENV)/.installed: $(STAMP) requirements/vllm.lock
	$(BIN)/python -m tools.vllm_release.environment $(VLLM) $(VLLM_VENV)
	@touch $@

vllm: $(VLLM_VENV)/.installed ## set up an environment with another release of vLLM (VLLM=0.33.0) on the CPU engine

test-vllm: vllm ## all tests under that release (ARGS="tests/contract" for some)
	$(VLLM_VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

contract: vllm ## the vLLM hooks alone, under that release (minutes)
	$(VLLM_VENV)/bin/python -m pytest tests/contract $(ARGS)

bench-vllm: vllm ## benchmarks a, b and f under that release and the locked one, as ratios
	$(BIN)/python -m loadtests.bench.releases $(BIN)/python $(VLLM_VENV)/bin/python $(ARGS)

vllm-diff: venv ## what that release changes of every hook that we rely on
	$(BIN)/python -m tools.vllm_release.differences $(VLLM)

lint: venv ## ruff and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: venv ## compile requirements/*.lock again
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --extra cpu --extra analysis --group dev --override requirements/overrides.txt \
		--output-file requirements/cpu.lock pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --constraints requirements/overrides.txt --excludes requirements/lmms-excluded.txt \
		--output-file requirements/lmms.lock requirements/lmms.in
	echo 'vllm==$(NEWEST)' | $(BIN)/uv pip compile --quiet --no-deps --generate-hashes --no-emit-index-url \
		--no-header --output-file requirements/vllm.lock -
	$(IMAGE_LOCK) --extra cpu --override requirements/overrides.txt \
		--output-file requirements/image.lock pyproject.toml
	$(IMAGE_LOCK) --output-file requirements/build.lock requirements/build.in
	$(IMAGE_LOCK) --output-file requirements/load.lock requirements/load.in
	$(IMAGE_LOCK) --output-file requirements/router.lock requirements/router.in
	grep -A99 '^uv==' requirements/cpu.lock | awk 'NR > 1 && !/^ +--hash/ { exit } { print }' \
		| sed '$$ s/ *\\$$//' > requirements/installer.lock

doctor: ## whether `docker compose up` can succeed on this host, or what to do first
	$(PYTHON) deploy/doctor.py

check-deploy: venv ## images, Compose, Prometheus, Kubernetes: everything that can be read without starting it
	$(BIN)/python -m pytest tests/unit/test_deploy.py tests/unit/test_doctor.py tests/unit/test_tls.py tests/unit/test_kubernetes.py tests/unit/test_router.py $(ARGS)

docs-check: venv ## dead links, and the commands in the documents that are marked as runnable
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tools.docs $(ARGS)

reference: venv ## write the tables of docs/reference.md that come from the code
	$(BIN)/python -m tools.reference

gpu-check: ## everything that needs a GPU (docs/gpu-checklist.md), in the environment of PYTHON
	$(PYTHON) -m tools.gpu_check $(ARGS)

release-check: venv ## what is missing for a release
	$(BIN)/python -m tools.release

sbom: venv ## bills of materials (CycloneDX) of the images that are made from locks: build/sbom
	mkdir -p build/sbom
	for name in image load router; do \
		$(BIN)/cyclonedx-py requirements requirements/$$name.lock --of JSON -o build/sbom/$$name.cdx.json || exit 1; \
	done

ENGINE ?= docker
sbom-image: ## the same of a built image, system packages too: IMAGE=hiprune-gpu:0.1.0 (ENGINE=podman)
	mkdir -p build/sbom
	$(ENGINE) run --rm --interactive --entrypoint python3 $(IMAGE) - $(IMAGE) \
		< tools/bom.py > build/sbom/$(subst /,-,$(subst :,-,$(IMAGE))).cdx.json

wheel: venv ## build dist/*.whl and the source distribution, and check what a registry will show
	$(BIN)/python -m hatchling build
	$(BIN)/python -m twine check --strict dist/*

clean: ## remove what make made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
