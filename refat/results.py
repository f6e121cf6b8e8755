"""The one results file: counted outcomes with intervals, written once, read by table, report, tracking and card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmic.errors import InputError
from cosmic.judging import wilson
from cosmic.storage import read_json

SCHEMA = 1


@dataclass(frozen=True)
class ResultRow:
    """Outcomes of one attack on one system, for prompts of one kind, by one judge. The counts add up to `n`."""

    system: str
    attack: str
    kind: str
    judge: str
    n: int
    refused: int
    complied: int
    unclear: int

    @property
    def asr(self) -> float:
        """Attack success rate: the share that complied."""
        return self.complied / self.n

    @property
    def refusal(self) -> float:
        """The share that refused."""
        return self.refused / self.n

    def as_dict(self) -> dict[str, Any]:
        """The row as the results file has it."""
        low, high = wilson(self.complied, self.n)
        counts = {"n": self.n, "refused": self.refused, "complied": self.complied, "unclear": self.unclear}
        place = {"system": self.system, "attack": self.attack, "kind": self.kind, "judge": self.judge}
        return {**place, **counts, "asr": self.asr, "low": low, "high": high}


def summarise(rows: Sequence[ResultRow], judge: str, not_tested: Sequence[str]) -> dict[str, Any]:
    """Worst case over attacks, with over-refusal and utility beside it, per system."""
    systems: dict[str, Any] = {}
    for system in dict.fromkeys(row.system for row in rows):
        own = [row for row in rows if row.system == system and row.judge == judge]
        summary: dict[str, Any] = {}
        harmful = [row for row in own if row.kind == "harmful"]
        if harmful:
            worst = max(harmful, key=lambda row: row.asr)
            low, high = wilson(worst.complied, worst.n)
            summary["worst_case"] = {"attack": worst.attack, "asr": worst.asr, "low": low, "high": high, "n": worst.n}
        for name, kind, share in (
            ("direct_refusal", "harmful", "refusal"),
            ("harmless_refusal", "harmless", "refusal"),
            ("harmless_compliance", "harmless", "asr"),
            ("borderline_refusal", "borderline", "refusal"),
        ):
            direct = [row for row in own if row.attack == "direct" and row.kind == kind]
            if direct:
                summary[name] = getattr(direct[0], share)
        systems[system] = summary
    return {"judge": judge, "systems": systems, "not_tested": list(not_tested)}


def make_results(model: str, rows: Sequence[ResultRow], judge: str, not_tested: Sequence[str]) -> dict[str, Any]:
    """The content of `results.json`."""
    return {
        "schema": SCHEMA,
        "model": model,
        "rows": [row.as_dict() for row in rows],
        "summary": summarise(rows, judge, not_tested),
    }


def read_results(path: Path) -> dict[str, Any]:
    """Read `results.json`.

    Raises:
        InputError: it is missing, malformed or of another schema.
    """
    results = read_json(path)
    if not isinstance(results, dict) or not isinstance(results.get("rows"), list) or "summary" not in results:
        raise InputError(f"`{path}` is not a results file: it needs `schema`, `rows` and `summary`.")
    if results.get("schema") != SCHEMA:
        raise InputError(
            f"`{path}` has schema {results.get('schema')!r}; this version reads {SCHEMA}. Update the package."
        )
    return results
