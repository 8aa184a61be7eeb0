"""What the functions of the library that look at images answer: plain data, with the JSON of the command line."""

from __future__ import annotations

from imagekit.formats.base import JSON, ImageInfo, Problem
from imagekit.policy import Finding
from imagekit.records import dataclass
from imagekit.report import SCHEMA


@dataclass(frozen=True, slots=True)
class Inspection:
    """What ``info`` found: the headers' facts and the policy's findings. Sizes in bytes."""

    filename: str
    info: ImageInfo
    file_size: int
    actual_size: int
    findings: tuple[Finding, ...]
    chain: tuple[tuple[str, ImageInfo], ...] = ()
    """With ``follow_references``: file name and headers of all that lies below, the nearest first."""

    confinement: tuple[str, ...] = ()
    """With ``confined``: what held the process that read the image."""

    def to_json(self) -> dict[str, JSON]:
        info = self.info
        out: dict[str, JSON] = {
            "schema": SCHEMA,
            "filename": self.filename,
            "format": info.format,
            "subformat": info.subformat,
            "virtual-size": info.virtual_size,
            "file-size": self.file_size,
            "actual-size": self.actual_size,
            "block-size": info.block_size,
            "features": dict(info.features),
            "findings": [finding.to_json() for finding in self.findings],
            "confinement": list(self.confinement),
        }
        for reference in info.references:
            key = "backing-filename" if reference.kind != "data-file" else "data-filename"
            out[key] = reference.name
        if self.chain:
            out["chain"] = [
                {"filename": name, "format": info.format, "virtual-size": info.virtual_size}
                for name, info in self.chain
            ]
        return out


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether two images hold the same; ``offset`` is the guest offset of the first difference."""

    same: bool
    offset: int | None
    reason: str

    def to_json(self) -> dict[str, JSON]:
        return {"schema": SCHEMA, "same": self.same, "offset": self.offset, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check of the structure found, and what was mended."""

    filename: str
    format: str
    problems: tuple[Problem, ...]
    repaired: bool = False

    @property
    def sound(self) -> bool:
        """Nothing but leaks, which only waste room."""
        return all(problem.leak for problem in self.problems)

    def to_json(self) -> dict[str, JSON]:
        return {
            "schema": SCHEMA,
            "filename": self.filename,
            "format": self.format,
            "sound": self.sound,
            "repaired": self.repaired,
            "problems": [
                {"code": one.code, "message": one.message, "offset": one.offset, "leak": one.leak}
                for one in self.problems
            ],
        }
