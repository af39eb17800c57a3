# make install      the environment of all scripts, in .venv
# make quickstart   a trained captioner, its scores and three captions, on scenes that the repo draws itself
# make test         the tests (CAPTION_TEST_DATA=folder adds those on real data)
# make test-slow    those that show a law in one more way, or start a cluster, a second Java, ...
# make test-fast    the fast ones, for while editing: no script is started, under 2 minutes
# make test-gpu     those on a CUDA GPU (make test runs on the CPU)
# make test-torchvision  those that torchvision can affect, in an environment that has it (2 GB more)
# make test-oldest  those that libraries can affect, with the lowest versions that requirements.txt allows (2 GB more)
# make test-sagemaker  those of sagemaker/, in the environments of make sagemaker-envs
# make sagemaker-envs  three environments for the tests of sagemaker/, which skip without them (3 GB, some minutes)
# make lint         formatting and lint
PYTHON ?= python3
BIN = .venv/bin
OUT ?= runs/quickstart
# One thread for each worker: OpenMP's threads spin, and with more of them than cores all wait for each other.
# And compiled modules are kept, though the machine may say not to: a hundred processes would all compile them again.
QUIET = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
# A third, since many tests wait for a server, a signal or a child.
WORKERS ?= 3
PYTEST = -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

.PHONY: install quickstart test test-slow test-fast test-gpu torchvision-env test-torchvision test-oldest sagemaker-envs test-sagemaker lint format clean

.venv/installed: requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@

install: .venv/installed

quickstart: .venv/installed
	$(BIN)/python train.py recipes/quickstart/scenes.yaml --output_dir $(OUT)
	$(BIN)/python evaluate.py --model_name_or_path $(OUT) --dataset_name scenes --split test --output_dir $(OUT)/evaluation
	$(BIN)/python -m drawn_scenes.drawing $(OUT)/photos 3
	$(BIN)/python infer.py $(OUT)/photos --model_name_or_path $(OUT)
	@echo
	@echo "The model, its card (README.md), training curves and scores are in $(OUT),"
	@echo "what evaluate.py scored again in $(OUT)/evaluation, the three captioned pictures in $(OUT)/photos."

# The families that differ most; make test-torchvision runs all others, and those whose images torchvision prepares otherwise.
FAMILIES ?= blip git blip2-opt blip2-t5 llava vit-gpt2
test: .venv/installed
	$(QUIET) CAPTION_TEST_FAMILIES="$(FAMILIES)" $(BIN)/python $(PYTEST) -m "not slow"
test-slow: .venv/installed
	$(QUIET) CAPTION_TEST_FAMILIES="$(FAMILIES)" $(BIN)/python $(PYTEST) -m slow

# Tests that neither start a script nor train: text, scores, data, rewards, the structure.
FAST_TESTS = tests/repo $(wildcard $(addsuffix *.py,$(addprefix tests/*/test_,collator data_aug data_rec data_text \
  metrics recipes rewards uploads)))
test-fast: .venv/installed
	$(QUIET) $(BIN)/python $(PYTEST) $(FAST_TESTS)

# GPU: which one, as CUDA_VISIBLE_DEVICES counts
GPU ?= 0
test-gpu: .venv/installed
	CUDA_VISIBLE_DEVICES=$(GPU) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -rs tests/scripts/test_gpu.py tests/models/test_decoding_step.py

# torch and torchvision of the same build: torch 2.13.0, which .venv has, has no torchvision for the CPU.
TORCHVISION = .venv-torchvision
torchvision-env: $(TORCHVISION)/installed
$(TORCHVISION)/installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(TORCHVISION)
	grep -v '^torch==' constraints.txt > $(TORCHVISION)/constraints.txt
	$(TORCHVISION)/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 num2words \
	  sentencepiece -r requirements-dev.txt -c $(TORCHVISION)/constraints.txt
	@touch $@

# The tests of models and processors, by the start of their names.
LIBRARY_TESTS = $(foreach name,adapters attention_maps blip_attention clip_scores collator decoding famil features pixels, \
  $(wildcard tests/*/test_$(name)*.py))
# Left out are families whose image processor is that of another one here: those of make test with BLIP's or CLIP's, and second
# language models of one family.
OTHER_FAMILIES = blip llava vit-gpt2 instructblip-t5 paligemma idefics2 idefics3 smolvlm qwen2_vl qwen2_5_vl qwen3_vl gemma3 \
  llava_onevision internvl mllama janus pix2struct florence2 kosmos-2
test-torchvision: $(TORCHVISION)/installed
	$(QUIET) CAPTION_TEST_FAMILIES="$(OTHER_FAMILIES)" $(TORCHVISION)/bin/python $(PYTEST) -m "not slow" $(LIBRARY_TESTS)

# The lowest versions that requirements.txt allows, but for torch, whose old builds for Linux all bring CUDA.
OLDEST = .venv-oldest
$(OLDEST)/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep '^torch==' constraints.txt > $(OLDEST)/requirements.txt
	sed -n '/^torch/! s/^\([A-Za-z0-9_]*\)>=\([0-9.]*\).*/\1==\2/p' requirements.txt >> $(OLDEST)/requirements.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -r $(OLDEST)/requirements.txt -r requirements.txt pytest pytest-xdist
	@touch $@
test-oldest: $(OLDEST)/installed
	$(QUIET) CAPTION_TEST_FAMILIES="$(FAMILIES)" $(OLDEST)/bin/python $(PYTEST) -m "not slow" tests/data tests/reports/test_attention_maps.py \
	  $(addprefix tests/training/test_,checkpoints.py sharding.py) $(addprefix tests/scripts/test_,adapters.py arguments.py recipes.py) \
	  $(addprefix tests/models/test_,blip_attention.py decoding.py decoding_step.py library_changes.py weights.py)

# SDK v2 and v3 exclude each other, and the toolkits want numpy < 2 (and so pyarrow < 26): each has its own environment.
SAGEMAKER = .venv-sagemaker
sagemaker-envs: $(SAGEMAKER)/v2/installed $(SAGEMAKER)/v3/installed $(SAGEMAKER)/platform/installed
$(SAGEMAKER)/v2/installed: PACKAGES = "sagemaker==2.257.7"
$(SAGEMAKER)/v3/installed: PACKAGES = "sagemaker==3.27.0" "moto[server]==5.2.5"
# The torch of .venv: an open range would install a CUDA build of several GB.
$(SAGEMAKER)/platform/installed: PACKAGES = $(shell grep '^torch==' constraints.txt) -r $(SAGEMAKER)/platform/requirements.txt "setuptools<81" "sagemaker-training==5.1.4" \
  "sagemaker-inference==1.10.1" "sagemaker-huggingface-inference-toolkit==2.6.0" "multi-model-server==1.1.11"
$(SAGEMAKER)/%/installed: Makefile requirements.txt constraints.txt sagemaker/bundle.py
	$(PYTHON) -m venv $(SAGEMAKER)/$*
	cd sagemaker && $(PYTHON) -c 'import bundle; print(bundle.requirements("requirements.txt"))' > ../$(SAGEMAKER)/$*/requirements.txt
	$(SAGEMAKER)/$*/bin/pip install --quiet --disable-pip-version-check $(PACKAGES)
	@touch $@
test-sagemaker: .venv/installed sagemaker-envs
	$(QUIET) $(BIN)/python $(PYTEST) tests/sagemaker

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-* runs
