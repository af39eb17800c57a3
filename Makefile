# make quickstart   a trained captioner, its scores and three captions, on scenes that the repo draws itself
# make test         the tests (CAPTION_TEST_DATA=folder adds those on real data)
# make sagemaker-envs  three environments for the tests of sagemaker/, which skip without them (3 GB, some minutes)
# make lint         formatting and lint
PYTHON ?= python3
BIN = .venv/bin
OUT ?= runs/quickstart

.PHONY: quickstart test sagemaker-envs lint format clean

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

# SDK v2 and v3 exclude each other, and the toolkits want numpy < 2 (and so pyarrow < 26): each has its own.
SAGEMAKER = .venv-sagemaker
sagemaker-envs: $(SAGEMAKER)/v2/installed $(SAGEMAKER)/v3/installed $(SAGEMAKER)/platform/installed
$(SAGEMAKER)/v2/installed: PACKAGES = "sagemaker==2.257.7"
$(SAGEMAKER)/v3/installed: PACKAGES = "sagemaker==3.27.0" "moto[server]==5.2.5"
$(SAGEMAKER)/platform/installed: PACKAGES = -r requirements.txt "pyarrow<26" "setuptools<81" "sagemaker-training==5.1.4" \
  "sagemaker-inference==1.10.1" "sagemaker-huggingface-inference-toolkit==2.6.0" "multi-model-server==1.1.11"
$(SAGEMAKER)/%/installed: Makefile requirements.txt
	$(PYTHON) -m venv $(SAGEMAKER)/$*
	$(SAGEMAKER)/$*/bin/pip install --quiet --disable-pip-version-check $(PACKAGES)
	@touch $@

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-sagemaker runs
