"""The accounts of a run: what became of every tensor and every file of the source."""

from __future__ import annotations

from collections.abc import Iterable


class Ledger:
    """What became of every tensor and file of the source: nothing may be lost, nothing counted twice."""

    FATES = ("copied", "packed", "pruned", "merged", "left_out")

    def __init__(self, names: Iterable[str], files: Iterable[str] = ()):
        self.names = {*names, *files}
        self.fates: dict[str, list[tuple[str, str]]] = {}

    def fate(self, name: str, fate: str, detail: str = "") -> None:
        """Notes what became of a tensor or file; `detail` says why or into what."""
        assert fate in self.FATES, f"{fate} is no fate; there is {', '.join(self.FATES)}"
        self.fates.setdefault(name, []).append((fate, detail))

    def settle(self) -> dict[str, tuple[str, str]]:
        """`{name: (fate, detail)}`. Raises ValueError listing names without a fate, with two, or never heard of."""
        wrong = {
            "have no fate": sorted(self.names - self.fates.keys()),
            "have more than one": sorted(name for name, fates in self.fates.items() if len(fates) > 1),
            "are not in the source": sorted(self.fates.keys() - self.names),
        }
        problems = [f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in wrong.items() if names]
        if problems:
            raise ValueError(f"the ledger does not balance: {'; '.join(problems)}")
        return {name: fates[0] for name, fates in sorted(self.fates.items())}
