# The commands of this project; each sets up its own virtual environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

TYPED := --jaxtyping-packages=rezero_jax,tests.typechecker.check

.PHONY: train test test-typed test-slow campaign lint docs notebooks rehearse rehearse-gpu size setup setup-dev clean

train: setup  ## train the default network on embedded data, in seconds
	$(BIN)/python train.py --config=configs/mlp.py --workdir=runs/digits

test: setup-dev  ## run the fast tests, each guarantee among them, in about three minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-typed: setup-dev  ## run the fast tests and check the annotations of every call
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TYPED) $(ARGS)

test-slow: setup-dev  ## run the exhaustive tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not campaign" $(ARGS)

campaign: setup-dev  ## run the longest tests, and kill and damage runs at random moments: an hour
	$(BIN)/python -m pytest -n 2 --dist worksteal -m campaign
	$(BIN)/python -m tests.faults.campaign --out=runs/faults $(ARGS)

lint: setup-dev  ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup-dev  ## build the documentation in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: setup-dev  ## execute the notebooks and write the gallery's pictures, in some minutes
	$(BIN)/python notebooks/execute.py
	$(BIN)/python notebooks/execute.py --pictures

size: setup-dev  ## print how much there is to read
	$(BIN)/python -m benchmarks.size

rehearse: $(VENV)-rehearsal/installed  ## compile for absent TPUs, with baselines; ARGS=--set=ci: small networks
	$(VENV)-rehearsal/bin/python -m rehearsal.table $(ARGS)

rehearse-gpu: $(VENV)-rehearsal-gpu/installed  ## compile for an absent H200 and predict its times, with baselines
	$(VENV)-rehearsal-gpu/bin/python -m rehearsal.table --set=gpu $(ARGS)

setup: $(VENV)/installed

setup-dev: $(VENV)/installed-dev

$(VENV)/installed: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and \"Python 3.11 or newer is needed; set PYTHON=\")"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

# Environments of their own, which see the packages of $(VENV): where an accelerator's compiler is
# installed, JAX would look for the accelerator first.
$(VENV)-rehearsal/installed: rehearsal/requirements.txt
$(VENV)-rehearsal-gpu/installed: rehearsal/requirements-gpu.txt
$(VENV)-rehearsal/installed $(VENV)-rehearsal-gpu/installed: $(VENV)/installed
	$(PYTHON) -m venv $(@D)
	packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(BIN)/python -c "$$packages" > "$$($(@D)/bin/python -c "$$packages")/project.pth"
	$(@D)/bin/pip install --quiet -r $(filter rehearsal/%,$^)
	touch $@

clean:  ## remove the environment, caches and the built documentation; runs/ stays
	rm -rf $(VENV) $(VENV)-rehearsal $(VENV)-rehearsal-gpu .pytest_cache .ruff_cache .mypy_cache build site *.egg-info
