# make demo: quantize the smallest reference model, generate images and compare.   make test, make lint: for development.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := out/demo

.PHONY: install demo test lint study study-papers study-qat reports trust-interruption trust-damage trust-memory fuzz audit package lowest

install: $(VENV)/installed

# torch is installed first, so that the other packages are resolved around the build that is already there.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/stepquant quantize zoo:fashion-ddpm --recipe q-diffusion --bits w4a8 --out $(DEMO)/fashion-ddpm-w4a8 \
		--samples 128 --steps 50 --set iterations=60 --overwrite
	$(BIN)/stepquant evaluate $(DEMO)/fashion-ddpm-w4a8 --against zoo:fashion-ddpm --json $(DEMO)/figures.json --grid $(DEMO)/grid.png

# Models under test run on one thread each, so that two processes use two cores.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Takes hours on two cores and can be stopped and continued. Each job is a process with one thread.
STUDIES := papers ablations
study: $(VENV)/installed-dev
	set -e; for study in $(STUDIES); do $(BIN)/stepquant study benchmarks/studies/$$study.toml --jobs $$(nproc); done
	set -e; for study in $(STUDIES); do $(BIN)/stepquant study benchmarks/studies/$$study.toml --table \
		--figure out/$$study.png; done

# Both presets of every recipe as their budget grows: nights on two cores; can be stopped and continued.
study-papers: $(VENV)/installed-dev
	$(BIN)/stepquant study benchmarks/studies/public_code.toml --jobs $$(nproc)
	$(BIN)/stepquant study benchmarks/studies/published.toml --jobs $$(nproc)
	$(BIN)/python -m benchmarks.published

# Takes about an hour. DATA is the folder that training/README.md describes; without it nothing learns from images.
study-qat: $(VENV)/installed
	$(BIN)/python -m benchmarks.qat $(if $(DATA),--data $(DATA))
	$(BIN)/python -m benchmarks.qat --table

# The reports in docs/reports: minutes per model on two idle cores.
REPORTS := out/reports
reports: $(VENV)/installed
	set -e; for entry in fashion-ddpm:q-diffusion fashion-class:tdq emoji-ldm:q-diffusion; do \
		model=$${entry%%:*}; recipe=$${entry##*:}; \
		$(BIN)/stepquant quantize zoo:$$model --recipe $$recipe --bits w4a8 --samples 128 --steps 20 --set iterations=50 \
			--out $(REPORTS)/$$model-w4a8 --overwrite --times $(REPORTS)/$$model-times.json; \
		$(BIN)/stepquant sensitivity zoo:$$model --bits w4a8 --samples 16 --steps 20 --out $(REPORTS)/$$model-sensitivity; \
		$(BIN)/stepquant report $(REPORTS)/$$model-w4a8 --steps 20 \
			--sensitivity $(REPORTS)/$$model-sensitivity/sensitivity.json --times $(REPORTS)/$$model-times.json --out docs/reports/$$model.html; \
	done

lint: $(VENV)/installed-dev
	$(BIN)/ruff check src tests training benchmarks examples
	$(BIN)/ruff format --check src tests training benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports

# Measurements behind docs/reliability.md: minutes each.
trust-interruption: $(VENV)/installed-dev
	PYTHONPATH=. $(BIN)/python benchmarks/trust/interruption.py --trials 100 --json benchmarks/results/trust-interruption.json

trust-damage: $(VENV)/installed-dev
	PYTHONPATH=. $(BIN)/python benchmarks/trust/damage.py --trials 1000 --json benchmarks/results/trust-damage.json

trust-memory: $(VENV)/installed-dev
	PYTHONPATH=. $(BIN)/python benchmarks/trust/memory.py --json benchmarks/results/trust-memory.json

SECONDS ?= 60
fuzz: $(VENV)/installed-dev
	$(BIN)/python -m pip install -c constraints.txt '.[trust]'
	PYTHONPATH=.:src $(BIN)/python benchmarks/trust/fuzz_reader.py -max_total_time=$(SECONDS)

# --strict: a package that is not in the database is a failure.
audit: $(VENV)/installed-dev
	$(BIN)/python -m pip install -c constraints.txt '.[trust]'
	$(BIN)/pip-audit --strict --disable-pip --no-deps -r constraints.txt

# Wheel and sdist, each installed in an empty environment, where they quantize a model and generate images.
package: $(VENV)/installed-dev
	$(BIN)/python -m pip install -c constraints.txt '.[trust]'
	rm -rf dist && $(BIN)/python -m build
	sh benchmarks/trust/package.sh $(PYTHON) dist/*.whl
	sh benchmarks/trust/package.sh $(PYTHON) dist/*.tar.gz

# The tests with the lowest versions that pyproject.toml allows; torch stays that of constraints.txt.
lowest:
	rm -rf out/lowest && $(PYTHON) -m venv out/lowest
	out/lowest/bin/python -m pip install -c constraints.txt torch
	$(PYTHON) benchmarks/trust/lowest.py > out/lowest/constraints.txt
	out/lowest/bin/python -m pip install -c out/lowest/constraints.txt -e '.[dev]'
	out/lowest/bin/python -m pytest
