PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo-acc-SpQR-Int3

.PHONY: demo test lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "acc needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0" -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/.installed
	@mkdir -p build
	$(BIN)/acc quantize demo $(DEMO) --bits 3 --overwrite
	$(BIN)/acc eval $(DEMO) --base demo --data self --window 512 --windows 16

test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/pytest tests -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf build $(VENV)
