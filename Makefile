# make quickstart   a trained captioner, its scores and three captions, on scenes that the repo draws itself
# make test         the tests (CAPTION_TEST_DATA=folder adds those on real data)
# make lint         formatting and lint
PYTHON ?= python3
BIN = .venv/bin
OUT ?= runs/quickstart

.PHONY: quickstart test lint format clean

.venv/installed: requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ". Try make PYTHON=python3.11" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@

quickstart: .venv/installed
	$(BIN)/python train.py recipes/quickstart/scenes.yaml --output_dir $(OUT)
	$(BIN)/python evaluate.py --model_name_or_path $(OUT) --dataset_name scenes --split test --output_dir $(OUT)/evaluation
	$(BIN)/python -m data.scenes $(OUT)/photos 3
	$(BIN)/python infer.py $(OUT)/photos --model_name_or_path $(OUT)
	@echo
	@echo "The model, its card (README.md), training curves and scores are in $(OUT),"
	@echo "what evaluate.py scored again in $(OUT)/evaluation, the three captioned pictures in $(OUT)/photos."

test: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs
