# Each target does its own set-up: system packages through apt, a virtual environment, images.
# `make demo` and `make test` are all a newcomer needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := guest-images/system-packages.txt
LINT := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && \
	$(BIN)/mypy benchmarks/*.py examples/*.py
# Tests without a guest, on all processors; those of guests keep them busy by themselves.
UNITS := tests/unit tests/spec -n auto --maxprocesses=8 --dist=worksteal
# Three tests at most get a second chance, and what failed first is shown: docs/decisions/0580.
CHANCE := --reruns 1 --max-suite-reruns 3 --rerun-show-tracebacks

# Only as `make demo ARCH=arm64`: in the environment the name is other programs'.
FOR_ARCH := $(if $(filter command line,$(origin ARCH)),--arch=$(ARCH))

.PHONY: help demo shell test lint unit fuzz mutants guest ray cloud bench doctor images clean

help: ## Show what can be made
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .stamps/venv .stamps/system ## Boot Debian from its virtio-blk root disk, twice, and power off; ARCH=arm64
	@$(BIN)/python guest-images/demo.py $(FOR_ARCH)

shell: .stamps/venv .stamps/system ## An interactive root shell in a Debian guest
	@$(BIN)/python guest-images/demo.py --shell $(FOR_ARCH)

test: .stamps/dev .stamps/system ## Run every test: types, style, units, specification, KVM, Linux guests
	@$(BIN)/pyvmm image build --all
	@$(LINT)
	@$(BIN)/pytest $(UNITS) $(CHANCE); units=$$?; $(BIN)/pytest tests/kvm tests/guest $(CHANCE) && exit $$units

unit: .stamps/dev ## Only the tests that need neither KVM nor a guest
	@$(BIN)/pytest $(UNITS)

fuzz: .stamps/dev ## Random drivers against every device, damaged snapshots, for SECONDS=60, from a SEED; CASE=N repeats one
	@$(BIN)/python tests/fuzz/run.py $(if $(SEED),--seed=$(SEED)) $(if $(SECONDS),--seconds=$(SECONDS)) \
		$(if $(CASE),--case=$(CASE)) $(if $(DEVICE),--device=$(DEVICE)) \
		$(if $(STATE),--state=$(STATE)) $(if $(CASES),--cases=$(CASES)) $(if $(JOBS),--jobs=$(JOBS))

mutants: .stamps/dev ## Small faults in the core for SECONDS=600: which does no test notice? ONLY= SAMPLE= SEED=
	@$(BIN)/python tests/mutation/run.py --seconds=$(or $(SECONDS),600) $(if $(SEED),--seed=$(SEED)) \
		$(if $(SAMPLE),--sample=$(SAMPLE)) $(foreach part,$(ONLY),--only=$(part)) $(if $(JOBS),--jobs=$(JOBS))

lint: .stamps/dev ## Style and types
	@$(LINT)

bench: .stamps/bench .stamps/system ## Measure against QEMU and C, or ONLY="vhost_user boot"; charts in docs/charts
	@$(BIN)/python benchmarks/run.py $(ONLY)

ray: .stamps/ray .stamps/system ## VMs on a Ray cluster, three nodes on this machine (installs Ray, 300 MB)
	@$(BIN)/pytest tests/kvm/test_ray.py tests/guest/test_ray_sandbox.py

cloud: .stamps/dev .stamps/system ## A disk as Debian's cloud images are, made and booted whole; IMAGE=FILE boots yours
	@test -z "$(IMAGE)" || test -f "$(IMAGE)" || { echo "there is no $(IMAGE); without IMAGE one is made"; exit 2; }
	@mkdir -p build
	@PYVMM_CLOUD_IMAGE="$(or $(IMAGE),build/cloud.qcow2)" $(BIN)/pytest tests/guest/test_cloud_image.py

doctor: .stamps/venv ## Say what this machine can do
	@$(BIN)/pyvmm doctor

clean: ## Remove the virtual environment and the stamps (images stay in the cache)
	rm -rf $(VENV) .stamps build *.egg-info

.stamps/system: $(PACKAGES)
	@sh guest-images/install-packages.sh $(PACKAGES)
	@mkdir -p .stamps && touch $@

.stamps/python: | .stamps/system
	@mkdir -p .stamps
	@$(PYTHON) -c 'import sys; sys.exit("pyvmm needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null || \
		{ echo "Making a virtual environment in $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@touch $@

.stamps/venv: pyproject.toml | .stamps/python
	@echo "Installing pyvmm into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@$(BIN)/python -m compileall -q pyvmm # in the emulated host nothing that Python compiles is kept
	@touch $@

.stamps/dev: pyproject.toml | .stamps/python
	@echo "Installing pyvmm and its test tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@$(BIN)/python -m compileall -q pyvmm # in the emulated host nothing that Python compiles is kept
	@touch $@ .stamps/venv

.stamps/ray: .stamps/dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,ray]'
	@touch $@

.stamps/bench: .stamps/dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,bench]' && touch $@ || \
		echo "No charts: matplotlib could not be installed"
