"""The page and the record speak of the tests that are there."""

import json

from tests.clients.conftest import RECORD


def test_the_record_holds_what_the_tests_show(uses) -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["results"]["uses"]
    found = {use["test"]: use for use in recorded}
    for test, use in uses.items():
        assert test in found, f"{test} is not recorded; see tests/clients/conftest.py"
        assert use.items() <= found[test].items()
    files = {test.partition("::")[0] for test in uses}
    gone = {test for test in found if test.partition("::")[0] in files} - uses.keys()
    assert not gone, f"recorded, and no test any more: {gone}"


def test_everything_recorded_works_or_is_refused_with_a_sentence() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for use in record["results"]["uses"]:
        assert use["outcome"] in ("works", "refused"), use
        assert (use["outcome"] == "refused") == bool(use["sentence"])
