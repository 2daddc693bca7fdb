"""What checks find: a line each for people, figures for machines. Knows nothing of what is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: what, whether it holds, and the figures or the reason."""

    name: str
    passed: bool
    detail: str
    figures: dict[str, float]


@dataclass(frozen=True)
class CheckResult:
    """Every finding of a check."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """True where everything holds."""
        return all(f.passed for f in self.findings)

    def and_also(self, findings: Sequence[Finding]) -> CheckResult:
        """This result and further findings."""
        return CheckResult((*self.findings, *findings))

    def to_json(self) -> dict[str, Any]:
        """The verdict and the findings as JSON data."""
        return {"passed": self.passed, "findings": [asdict(f) for f in self.findings]}

    def lines(self) -> list[str]:
        """One line a finding."""
        return [f"{'pass' if f.passed else 'FAIL'}  {f.name}: {f.detail}" for f in self.findings]
