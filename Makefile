# Two commands do everything:  make train [ARGS="--model smallresnet"]   and   make test
# make faults [FAULTS=200]: every fault that a run is to survive (docs/faults.md)
# make gpu: the tests that need a GPU, and how fast a step is there; skips where there is none
# make mutants: the program broken on purpose, to see that the tests notice (docs/testing.md)
PYTHON ?= python3
RANKS  ?= 4
ARGS   ?=
FAULTS ?= 60
BIN    := .venv/bin

# more ranks than cores are welcome (Open MPI would refuse), and root may run mpirun in a container
export OMPI_MCA_rmaps_base_oversubscribe := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

.PHONY: train test test-process test-ranks faults gpu mutants lint clean

train: .venv/train.done
	$(BIN)/mpirun -n $(RANKS) $(BIN)/python -m cnnmpi.train $(ARGS)

# in one process, and meanwhile on several ranks: both wait much, for processes that start, hang and end
test: .venv/test.done
	$(MAKE) --no-print-directory --jobs 2 --output-sync test-process test-ranks

test-process: .venv/test.done
	$(BIN)/python -m pytest

test-ranks: .venv/test.done
	$(BIN)/mpirun -n 2 $(BIN)/python -m pytest --with-mpi
	$(BIN)/mpirun -n 3 $(BIN)/python -m pytest --with-mpi -m mpi
	$(BIN)/mpirun -n 4 $(BIN)/python -m pytest --with-mpi -m mpi

faults: .venv/test.done
	$(BIN)/python -m pytest -m fault
	$(BIN)/mpirun -n 3 $(BIN)/python -m pytest --with-mpi -m "fault and mpi"
	$(BIN)/python -m cnnmpi.chaos --faults $(FAULTS) --mpirun $(BIN)/mpirun

gpu: .venv/test.done
	$(BIN)/python -m pytest -m gpu
	$(BIN)/mpirun -n 2 $(BIN)/python -m pytest --with-mpi -m "gpu and mpi"
	$(BIN)/python -m benchmarks.gpu

mutants: .venv/test.done
	$(BIN)/python tests/mutants.py

lint: .venv/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/train.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mpich]'
	touch $@

.venv/test.done: .venv/train.done
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mpich,torch,export,tensorboard,dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
