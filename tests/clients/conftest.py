"""Other libraries that train, run or measure our models, each for real.

A test says with the mark ``client`` which use of which library it shows, and with the property
``refusal`` what we refuse. ``pytest tests/clients -n 0 -m "not network" --record-clients`` writes
what came out to ``results/clients/record.json``, from which ``docs/clients.md`` is made.
"""

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from unimatrix.train.run_folder import describe_run, write_json

RECORD = Path(__file__).parents[2] / "results/clients/record.json"
OUTCOMES: dict[str, dict[str, Any]] = {}
USES = pytest.StashKey[dict[str, dict[str, Any]]]()
RUN = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-clients", action="store_true", help=f"write {RECORD}")


@pytest.hookimpl(tryfirst=True)  # before any mark takes tests out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[USES] = {
        item.nodeid: describe_use(item) for item in items if item.get_closest_marker("client")
    }
    if config.getoption("--record-clients", default=False):
        config.stash[RUN] = describe_run("cpu")


def describe_use(item: pytest.Item) -> dict[str, Any]:
    """Return which use of which library a test shows."""
    library, use = item.get_closest_marker("client").args
    callspec = getattr(item, "callspec", None)
    values = {} if callspec is None else callspec.params
    return {"library": library, "use": use.format(**values)}


@pytest.fixture
def uses(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Return what the collected tests show, by test."""
    return request.config.stash[USES]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.failed:
        refused = dict(report.user_properties).get("refusal")
        outcome = "refused" if refused else "works"
        OUTCOMES[report.nodeid] = {
            "outcome": outcome if report.passed else "fails",
            "sentence": refused,
        }


def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash.get(RUN, None)
    if run is None:
        return
    known = session.config.stash[USES]
    uses = [known[test] | OUTCOMES[test] | {"test": test} for test in known if test in OUTCOMES]
    libraries = ("datasets", "lm_eval", "peft", "trl")
    record = {"format_version": 1, "status": "done", **run}
    record["versions"] |= {library: metadata.version(library) for library in libraries}
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    write_json(RECORD, record | {"results": {"uses": sorted(uses, key=lambda use: use["test"])}})
