# make demo and make test are all the set-up there is: each makes .venv first if it is missing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow coverage lint bench bench-check docs wheel clean

demo: $(READY)
	$(BIN)/fastdpo demo

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadgroup

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# By lines, of fastdpo/, child processes included; longer than `make test`. htmlcov/index.html
coverage: $(READY)
	rm -rf .coverage .coverage.* htmlcov
	$(BIN)/python -m pytest -n auto --dist loadgroup --cov=fastdpo --cov-report=html --cov-report=term:skip-covered \
		--cov-fail-under=95

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

# dist/*.whl and *.tar.gz; the wheel, in an environment of its own with torch alone, passes the smoke test
wheel: $(READY)
	rm -rf build dist
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv --clear build/clean
	build/clean/bin/pip install --quiet --disable-pip-version-check "$$(grep ^torch== requirements-dev.txt)"
	build/clean/bin/pip install --quiet --disable-pip-version-check dist/*.whl
	cd build/clean && bin/python ../../tests/smoke.py ../.. && bin/fastdpo --version

clean:
	rm -rf .venv build dist site htmlcov .coverage .coverage.* *.egg-info

$(READY): requirements-dev.txt setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
