# Two commands: `make demo` and `make test`. `make VENV=DIR ...` uses another environment; `make JOBS=1 test` runs one test
# at a time, with as many threads as OMP_NUM_THREADS says. `make docs` builds the site in docs/site.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
REUSE ?= --reuse
BIN = $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
SPACE = $(subst ,, )
STAMP = $(subst $(SPACE),\ ,$(VENV))/.installed

.PHONY: demo test docs bench lint install release-check
.DEFAULT_GOAL := demo

demo: install
	"$(BIN)/python" -m panda_lightning fit --config conf/digits.yaml --trainer.max_epochs 30 \
		--model.grad_clip 0.3 --model.ewc_weight 100
	@echo
	@echo "Nines against all other digits. AUROC at 0 epochs is DN2, the bundled network as it is; adaptation raises it, while"
	@echo "compactness falls and EWC pulls the weights back. Steps (grad_clip, 300 times the published) and lambda were chosen"
	@echo "with labels, to show the effect on 90 images with a small network. Real networks: experiments/RESULTS.md."

test: install lint
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} "$(BIN)/python" -m pytest -n $(JOBS) --dist loadfile

docs: install
	"$(BIN)/python" docs/build.py

bench: install
	"$(BIN)/python" experiments/bench

release-check: install  # make REUSE= release-check installs all dependencies anew (8 GB)
	"$(BIN)/python" experiments/release_check.py $(REUSE)

lint: install
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"

install: $(STAMP)

# Again only when the dependencies change; the package itself is installed editable.
$(STAMP): setup.cfg pyproject.toml
	test -x "$(BIN)/python" || "$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --quiet --upgrade pip
	"$(BIN)/python" -m pip install --progress-bar off -e ".[test,docs]"
	touch "$@"
