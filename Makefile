# Two commands: `make demo` and `make test`. `make VENV=DIR ...` uses another environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test bench lint install
.DEFAULT_GOAL := demo

demo: install
	"$(BIN)/python" -m panda_lightning fit --config conf/digits.yaml --trainer.max_epochs 30 \
		--model.grad_clip 0.3 --model.ewc_weight 100
	@echo
	@echo "Nines against all other digits. AUROC at 0 epochs is DN2, the bundled network as it is; adaptation raises it, while"
	@echo "compactness falls and EWC pulls the weights back. Steps (grad_clip, 300 times the published) and lambda were chosen"
	@echo "with labels, to show the effect on 90 images with a small network. Real networks: experiments/RESULTS.md."

test: install lint
	"$(BIN)/python" -m pytest

bench: install
	"$(BIN)/python" experiments/bench

lint: install
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"

install: $(VENV)/.installed

# Again only when the dependencies change; the package itself is installed editable.
$(VENV)/.installed: setup.cfg pyproject.toml
	test -x "$(BIN)/python" || "$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --quiet --upgrade pip
	"$(BIN)/python" -m pip install --progress-bar off -e ".[test]"
	touch "$@"
