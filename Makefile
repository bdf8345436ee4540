# make train: from nothing to a trained model, its loss curve and a sample; again: what is missing.
# make test:  every test.   make lint, make venv, make clean.
# PYTHON=python3.12 chooses the interpreter, ARGS='--max_iters=50' adds settings to the training.

PYTHON ?= python3
CONFIG = config/train_stdlib_modern.py
RUN = out/stdlib_modern
PY = .venv/bin/python

.PHONY: train test lint venv clean

train: .venv/installed data/stdlib/meta.json
	$(PY) train.py $(CONFIG) $(ARGS) \
	    --init_from=$$([ -f $(RUN)/latest ] && echo resume || echo scratch)
	@echo "loss curve: $(RUN)/loss.png; a sample:"
	$(PY) sample.py --out_dir=$(RUN) --num_samples=1 --start="def "

data/stdlib/meta.json: | .venv/installed
	$(PY) prepare.py

test: .venv/installed-test
	$(PY) -m pytest -n 2

lint: .venv/installed-test
	.venv/bin/ruff check .

venv: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

# the environment and what ran in it; your data/ and out/ stay
clean:
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ tests/__pycache__ bench_trace.json
