# The commands that people type. `just` lists them; https://just.systems

python := ".venv/bin/python"

default:
    @just --list

# Make the virtual environment that everything below uses.
setup:
    python3 -m venv .venv
    .venv/bin/pip install -c constraints.txt -e ".[dev]"

# Run the tests, or those named: just test tests/nn
test *paths:
    {{python}} -m pytest -n auto {{paths}}

# Check style and types.
lint:
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy

# Put the code into the project's format.
format:
    .venv/bin/ruff check --fix .
    .venv/bin/ruff format .

# Make the tables of the documents from the records.
tables:
    {{python}} -m unimatrix.reports

# Train the model of `unimatrix ask` and put its weights into the package: just reader --data FOLDER
reader *settings:
    {{python}} -m unimatrix train reader --out runs/reader {{settings}}
    {{python}} -m unimatrix.train.export runs/reader

# Everything that a change must pass.
ci:
    bash .ci/run
