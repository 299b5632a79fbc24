# Commands a newcomer needs. Each prints the plain commands that it runs.
PYTHON ?= python3
BIN := .venv/bin
FAST ?= # overrides for a shortened quick start, such as trainer.max_steps=20

.PHONY: quickstart test test-slurm lint environment clean

quickstart: .venv/.installed
	$(BIN)/python train.py conf=quickstart/world $(WORLD)
	$(BIN)/python train.py conf=quickstart/prefinetune $(FAST)
	$(BIN)/python train.py conf=quickstart/finetune data.seed=1 trainer.default_root_dir=runs/quickstart/finetune-1 $(FAST)
	$(BIN)/python train.py conf=quickstart/finetune data.seed=2 trainer.default_root_dir=runs/quickstart/finetune-2 $(FAST)
	$(BIN)/python train.py conf=quickstart/soup
	$(BIN)/python train.py conf=quickstart/evaluate

test: .venv/.installed-dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-slurm: .venv/.installed-dev # real jobs on a slurm of one node: apt-get install slurm-wlm munge
	$(BIN)/python -m pytest -m slurm tests/test_slurm.py

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

environment: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf runs shards
