# make train  installs what is needed, prepares the default text, trains a small model, draws its
#             loss curve and prints a sample. Run it again to resume a training that was stopped.
# make test   runs every test.
# make lint   checks the style of the code; make venv only installs; make clean removes the
#             environment.
#
# PYTHON=python3.12 chooses the Python that the environment is made with.
# ARGS='--max_iters=50' adds settings to the training; RUN=out/other is the folder it writes to.

PYTHON ?= python3
PY = .venv/bin/python
RUN = out/stdlib_modern
CONFIG = config/train_stdlib.py config/modern.py --max_iters=600 --lr_decay_iters=600

.PHONY: train test lint venv clean

train: .venv/installed data/stdlib/meta.json
	$(PY) train.py $(CONFIG) --out_dir=$(RUN) $(ARGS) --init_from=auto
	@echo "the loss curve is $(RUN)/loss.png; a sample:"
	$(PY) sample.py --out_dir=$(RUN) --num_samples=1 --start="def "

data/stdlib/meta.json: | .venv/installed
	$(PY) prepare.py

test: .venv/installed-test
	$(PY) -m pytest -n 2 --dist worksteal

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

# your data/ and out/ stay
clean:
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ */__pycache__ bench_trace*.json
