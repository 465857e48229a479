# make demo and make test are all the set-up there is: each makes .venv first if it is missing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow lint bench bench-check docs clean

demo: $(READY)
	$(BIN)/fastdpo demo

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadgroup

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Under a quarter of an hour; BENCH_SECONDS=5400 for every case, with more tokens. Results: .benchmarks/
BENCH_SECONDS ?= 720
BENCH_LIMIT ?= 30
bench: $(READY)
	mkdir -p .benchmarks && rm -f .benchmarks/bench.json
	$(BIN)/python -m pytest benchmarks/bench_heads.py -s --bench-seconds $(BENCH_SECONDS) --bench-limit $(BENCH_LIMIT) \
		--benchmark-json .benchmarks/bench.json --benchmark-columns median,iqr,rounds --benchmark-sort min; \
	status=$$?; $(BIN)/python -m benchmarks.report .benchmarks/bench.json --output .benchmarks && exit $$status

# Has fastdpo lost against the others since docs/benchmarks.json? Under five minutes, unless a case is measured twice
bench-check: $(READY)
	$(BIN)/python -m benchmarks.check

docs: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv build site *.egg-info

$(READY): requirements-dev.txt setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
