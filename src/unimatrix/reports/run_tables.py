"""Tables of trainings, of the recall lab and of clients, from their records below ``results/``."""

import re
import statistics

from unimatrix.reports.recall_results import find_copy_rules
from unimatrix.reports.text import Table, format_percent, tabulate
from unimatrix.studies.records import Record, Records, select_records
from unimatrix.studies.reproduce.claims import Claim, load_claims

_SLOTS_OF_TEST = re.compile(r"(\d+) in (\d+) slots$")
_PILOT_TOLERANCE = 0.05


def tabulate_default(records: Records) -> Table:
    """Return what ``unimatrix train`` without arguments reached."""
    return tabulate(
        {
            "run": name,
            "bits per byte": f"{results['bits_per_byte']:.3f}",
            "`xz -9e`": f"{results['xz_bits_per_byte']:.3f}",
            "bytes judged": f"{results['valid_bytes']:,}",
            "steps": f"{record['num_optim_steps']:,}",
            "training s": f"{record['train_s']:.0f}",
            "state bytes": f"{results['state_bytes']:,}",
            "parameters": f"{results['parameters']:,}",
            "seed": str(record["seed"]),
            "verdict": "beats xz"
            if results["bits_per_byte"] < results["xz_bits_per_byte"]
            else "does not",
        }
        for name, record in select_records(records, "train/").items()
        for results in [record["results"]]
    )


def tabulate_reader(records: Records) -> Table:
    """Return how many questions readers answered right to the byte, by kind, in per cent."""
    return tabulate(
        {
            "run": name,
            "sentences": "of training" if wordings == "grammar" else "unseen",
            **{kind: f"{100 * share:.0f}" for kind, share in shares.items()},
            "bits per byte": f"{record['results']['bits_per_byte']:.3f}",
            "steps": f"{record['num_optim_steps']:,}",
            "training s": f"{record['train_s']:,.0f}",
            "state bytes": f"{record['results']['state_bytes']:,}",
        }
        for name, record in select_records(records, "reader/").items()
        for wordings, shares in record["results"]["answers"].items()
    )


def tabulate_pilot(records: Records) -> Table:
    """Return the byte-level pilot over seeds beside what was published."""
    rows = []
    for preset, seeds in _group_seeds(records, "pilot/").items():
        claim = _find_claim(f"pilot/{preset}")
        assert claim is not None, preset
        # The published models leak the future: what counts is their code made causal.
        causal = claim.published if claim.causal_code is None else claim.causal_code
        bits = [seed["results"]["bits_per_byte"] for seed in seeds]
        difference = statistics.mean(bits) - causal
        rows.append(
            {
                "preset": preset,
                "published": f"{claim.published:.3f}",
                "published code, causal": "" if claim.causal_code is None else f"{causal:.4f}",
                "ours, each seed": ", ".join(f"{value:.4f}" for value in bits),
                "mean": f"{statistics.mean(bits):.4f}",
                "difference": f"{difference:+.4f}",
                f"verdict (within {_PILOT_TOLERANCE})": "reproduced"
                if abs(difference) <= _PILOT_TOLERANCE
                else "not reproduced",
            }
        )
    return tabulate(rows)


def tabulate_recall(records: Records) -> Table:
    """Return associative recall over seeds."""
    rows = []
    for group, seeds in _group_seeds(records, "recall/").items():
        recipe = seeds[0]["results"]["recipe"]
        claim = _find_claim(f"recall/{group}")
        four, six, eight = (
            [seed["results"]["accuracy"][pairs] for seed in seeds] for pairs in ("4", "6", "8")
        )
        rows.append(
            {
                "preset": recipe["preset"],
                "dropout": f"{recipe['dropout']:g}",
                "steps": str(recipe["steps"]),
                "published, 4 pairs": "" if claim is None else f"{100 * claim.published:.1f}",
                "ours, 4 pairs, each seed": ", ".join(f"{100 * value:.1f}" for value in four),
                "median": f"{100 * statistics.median(four):.1f}",
                "worst": f"{100 * min(four):.1f}",
                "median, 6 pairs": f"{100 * statistics.median(six):.1f}",
                "median, 8 pairs": f"{100 * statistics.median(eight):.1f}",
            }
        )
    return tabulate(rows)


def tabulate_lab(records: Records, prefix: str) -> Table:
    """Return the recall lab below a folder, a row a test: mean and worst over seeds."""
    rows = []
    for group, members in _group_seeds(records, prefix).items():
        seeds = [member["results"] for member in members]
        recipe = seeds[0]["recipe"]
        for test in seeds[0]["accuracy"]:
            shares = [seed["accuracy"][test] for seed in seeds]
            copied = find_copy_rules(seeds[0], test)
            rows.append(
                {
                    "run": group,
                    "test": test,
                    "mean": format_percent(statistics.mean(shares), 2),
                    "worst seed": format_percent(min(shares), 2),
                    "best copy rule": f"{100 * max(copied.values()):.1f}" if copied else "",
                    "seeds x examples": f"{len(shares)} x {recipe['test_examples']:,}",
                    "steps x batch, learning rate": f"{recipe['steps']:,} x "
                    f"{recipe['batch_size']}, {recipe['learning_rate']:g}",
                    "state bytes": f"{seeds[0]['state_bytes']:,}",
                    "parameters": f"{seeds[0]['parameters']:,}",
                }
            )
    return tabulate(rows)


def summarize_lab(records: Records) -> Table:
    """Return the mean of all tests of each run of the lab, a row a run."""
    rows = []
    for group, members in _group_seeds(records, "lab/").items():
        seeds = [member["results"] for member in members]
        if group.startswith(("hindsight/", "options/")) or "/short-" in group:
            continue
        shares = [
            share for seed in seeds for test, share in seed["accuracy"].items() if _has_room(test)
        ]
        copied = [max(rules.values()) for seed in seeds for rules in seed["copy_rules"].values()]
        rows.append(
            {
                "task": group.partition("/")[2],
                "mean": format_percent(statistics.mean(shares), 2),
                "worst test and seed": format_percent(min(shares), 2),
                "best copy rule": f"{100 * statistics.mean(copied):.1f}" if copied else "",
                "state bytes": f"{seeds[0]['state_bytes']:,}",
                "parameters": f"{seeds[0]['parameters']:,}",
                "training s": f"{statistics.mean(seed['train_s'] for seed in seeds):.0f}",
            }
        )
    return tabulate(rows)


def tabulate_language(records: Records) -> Table:
    """Return bits per byte of models that differ in one part, at equal steps: mean over seeds."""
    rows = []
    for group, seeds in _group_seeds(records, "language/").items():
        corpus, _, variant = group.partition("/")
        results = [seed["results"] for seed in seeds]
        bits = [result["bits_per_byte"] for result in results]
        rows.append(
            {
                "corpus": corpus,
                "model": variant,
                "bits per byte": f"{statistics.mean(bits):.3f}",
                "each seed": ", ".join(f"{value:.3f}" for value in bits),
                "`xz -9e`": f"{results[0]['xz_bits_per_byte']:.3f}",
                "parameters": f"{results[0]['parameters']:,}",
                "steps": f"{seeds[0]['num_optim_steps']:,}",
                "training s": f"{statistics.mean(seed['train_s'] for seed in seeds):.0f}",
            }
        )
    return tabulate(rows)


def tabulate_books(records: Records) -> Table:
    """Return what the model of the recipe `books` makes of whole books, beside compressors."""
    books = {
        name: record["results"]
        for name, record in select_records(records, "books/").items()
        if "bytes" in record.get("results", {})  # The training run has results of its own.
    }
    compressors = dict.fromkeys(c for each in books.values() for c in each.get("compressors", ()))
    rows = []
    for name, results in books.items():
        row = {
            "text": name,
            "bytes": f"{results['bytes']:,}",
            "context": results["context"],
            "state bytes": f"{results['state_bytes']:,}",
            "ours": f"{results['bits_per_byte']:.3f}",
        }
        for compressor in compressors:
            scores = results.get("compressors", {}).get(compressor, {}).values()
            row[f"{compressor}, plain / primed"] = " / ".join(f"{score:.3f}" for score in scores)
        rows.append(row | {"parameters": f"{results['parameters']:,}"})
    return tabulate(rows)


def tabulate_clients(record: Record) -> Table:
    """Return a row for every use that a test shows, each library and version named once."""
    versions = {name.replace("_", "-"): version for name, version in record["versions"].items()}
    rows = []
    named: set[str] = set()
    for use in sorted(
        record["results"]["uses"], key=lambda use: (use["library"].lower(), use["use"])
    ):
        library = {"library": use["library"], "version": versions[use["library"].lower()]}
        row = library if use["library"] not in named else {}
        named.add(use["library"])
        reason = "" if use["sentence"] is None else f": {use['sentence']}"
        rows.append({**row, "use": use["use"], "result": f"{use['outcome']}{reason}"})
    return tabulate(rows)


def _group_seeds(records: Records, prefix: str) -> dict[str, list[Record]]:
    """Return the records of ``PREFIX/GROUP/seed-N`` by group, seeds in order."""
    groups: dict[str, list[Record]] = {}
    for name, record in sorted(select_records(records, prefix).items()):
        groups.setdefault(name.rpartition("/")[0], []).append(record)
    return groups


def _find_claim(cell: str) -> Claim | None:
    """Return the first claim about a cell, if there is one."""
    _, claims = load_claims()
    return next((claim for claim in claims if claim.cell == cell), None)


def _has_room(test: str) -> bool:
    """Return whether a test gives every pair a slot, as far as its name says."""
    numbers = _SLOTS_OF_TEST.search(test)
    return numbers is None or int(numbers[2]) >= int(numbers[1])
