"""The bridge: frozen projections of student and teacher states into one small space per layer (Eq. 12–14)."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from oprd.foundation.errors import UserError, reason, whatever_fails_is, writing
from oprd.objective.selection import LayerMap

BRIDGE_FILE = "bridge.safetensors"
FORMAT = "oprd-bridge-1"
MAPPINGS = ("reading", "student", "teacher", "layers")  # of the metadata; the last, of mappings


@dataclass(frozen=True)
class Projector:
    """One pair of layers: P_S h_S + b on the student's side, P_T(h_T − μ_T) on the teacher's."""

    teacher_layer: int
    student: Float[Tensor, "R S"]
    offset: Float[Tensor, " R"]
    teacher: Float[Tensor, "R T"]
    mean: Float[Tensor, " T"]

    @property
    def rank(self) -> int:
        """Number of shared coordinates r."""
        return len(self.student)

    def first(self, rank: int) -> "Projector":
        """The projector of a lower rank: bases nest, so it is a slice."""
        return Projector(
            self.teacher_layer, self.student[:rank], self.offset[:rank], self.teacher[:rank], self.mean
        )


TENSORS = [f.name for f in fields(Projector) if f.name != "teacher_layer"]


@dataclass(frozen=True)
class Bridge:
    """A projector per student layer, and where it comes from.

    `metadata` is plain JSON: the held-out report, and from `oprd bridge` both models' identities and the
    settings of the fit.
    """

    projectors: Mapping[int, Projector]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def layer_map(self) -> LayerMap:
        """The pairs of layers that it joins."""
        return LayerMap(tuple((s, p.teacher_layer) for s, p in sorted(self.projectors.items())))

    @property
    def ranks(self) -> dict[int, int]:
        """Rank by student layer."""
        return {layer: projector.rank for layer, projector in sorted(self.projectors.items())}

    def student(self, h: Float[Tensor, "N S"], layer: int) -> Float[Tensor, "N R"]:
        """P_S h_S + b of the pair with student layer `layer`, in float32 or wider; gradients reach h."""
        projector = self._projector(layer)
        with torch.autocast(h.device.type, enabled=False):
            wide = _wide(h)
            return torch.addmm(projector.offset.to(wide), wide, projector.student.to(wide).T)

    def teacher(self, h: Float[Tensor, "N T"], layer: int) -> Float[Tensor, "N R"]:
        """P_T(h_T − μ_T) of the pair with *student* layer `layer`, in float32 or wider."""
        projector = self._projector(layer)
        with torch.autocast(h.device.type, enabled=False):
            wide = _wide(h)
            return (wide - projector.mean.to(wide)) @ projector.teacher.to(wide).T

    def first(self, rank: int) -> "Bridge":
        """The bridge of a lower rank; raises `UserError` where a layer stores fewer directions."""
        if rank < 1:
            raise UserError(f"a bridge has rank 1 or more, not {rank}")
        for layer, stored in self.ranks.items():
            if rank > stored:
                raise UserError(
                    f"rank {rank} is too high: the bridge stores {stored} directions for student "
                    f"layer {layer}: lower bridge_rank, or fit the bridge again with a higher rank"
                )
        cut = {s: p.first(rank) for s, p in self.projectors.items()}
        reports = dict(self.metadata.get("layers", {}))
        for layer, stored in self.ranks.items():
            if str(layer) in reports and rank < stored:
                reports[str(layer)] = _at_rank(reports[str(layer)], rank)
        return Bridge(cut, self.metadata | ({"layers": reports} if reports else {}))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Bridge":
        """The same bridge with its tensors on `device`."""
        moved = {
            layer: Projector(p.teacher_layer, *(getattr(p, name).to(device, dtype) for name in TENSORS))
            for layer, p in self.projectors.items()
        }
        return Bridge(moved, self.metadata)

    def select(self, spec: str, num_student: int, num_teacher: int) -> LayerMap:
        """The pairs that a `layers` spec asks of this bridge; `all` is every layer it has.

        Raises `UserError` for a layer without a projector and for a pair that is not the stored one.
        """
        stored = dict(self.layer_map.pairs)
        if str(spec).strip() == "all":
            return self.layer_map
        asked = LayerMap.parse(spec, num_student, num_teacher)
        for student, teacher in asked.pairs:
            if student not in stored:
                raise UserError(
                    f"layers={spec!r}: the bridge has no projector for student layer {student}; it has "
                    f"{', '.join(map(str, stored))}"
                )
            if student in asked.explicit and teacher != stored[student]:
                raise UserError(
                    f"layers={spec!r} pairs student layer {student} with teacher layer {teacher}, but the "
                    f"bridge was fitted with {student}={stored[student]}: write that, or fit another bridge"
                )
        return LayerMap(tuple((student, stored[student]) for student in asked.student_layers))

    def save(self, path: str | Path) -> Path:
        """Write `path`, or bridge.safetensors in the folder `path`, whole or not at all; returns the file."""
        file = bridge_file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = _tensors(self.projectors)
        pairs = {str(student): teacher for student, teacher in self.layer_map.pairs}
        header = {"format": FORMAT, "layer_map": json.dumps(pairs), "oprd": json.dumps(self.metadata)}
        header["checksum"] = _checksum(header, tensors)
        partial = file.with_name(f"{file.name}.partial")
        try:
            with writing(file):
                partial.write_bytes(save(tensors, metadata=header))
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
        return file

    @classmethod
    def load(cls, path: str | Path, rank: int | None = None) -> "Bridge":
        """Read a bridge, cut to `rank` if given.

        Raises `UserError` for a missing, truncated or foreign file, for values that are not finite and for
        a rank above the stored one. Nothing is ever filled in.
        """
        file = bridge_file(path)
        if not os.path.isfile(file):  # nor is there one of a name that no file can have
            raise UserError(f"there is no bridge at {path}: fit one with oprd bridge")
        with whatever_fails_is(lambda error: f"{file} is damaged ({reason(error)}): fit the bridge again"):
            bridge = cls._read(file)
        return bridge if rank is None else bridge.first(rank)

    @classmethod
    def _read(cls, file: Path) -> "Bridge":
        with safe_open(file, framework="pt") as stored:
            header = stored.metadata() or {}
            if header.get("format") != FORMAT:
                raise UserError(f"{file} is not a bridge of oprd: fit one with oprd bridge")
            pairs, metadata = json.loads(header["layer_map"]), json.loads(header["oprd"])
            if not isinstance(pairs, dict) or not pairs:
                raise ValueError("its layer map names no layers")
            _check_metadata(metadata)
            projectors = {
                int(s): Projector(int(t), *(stored.get_tensor(f"{name}.{s}") for name in TENSORS))
                for s, t in pairs.items()
            }
            if header.get("checksum") not in (None, _checksum(header, _tensors(projectors))):
                raise ValueError("it was changed after it was written")
        for layer, projector in projectors.items():
            _check(file, layer, projector)
        return cls(projectors, metadata)

    def _projector(self, layer: int) -> Projector:
        if layer not in self.projectors:
            raise UserError(
                f"the bridge has no projector for student layer {layer}; it has "
                f"{', '.join(map(str, sorted(self.projectors)))}"
            )
        return self.projectors[layer]


def _tensors(projectors: Mapping[int, Projector]) -> dict[str, Tensor]:
    """The tensors of a bridge's file by their names there."""
    return {
        f"{name}.{layer}": getattr(projector, name).contiguous().cpu()
        for layer, projector in projectors.items()
        for name in TENSORS
    }


def _checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """The checksum of a bridge's metadata and tensors; files of oprd 0.1.0 have none."""
    digest = xxhash.xxh3_128((header["layer_map"] + header["oprd"]).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _at_rank(report: dict[str, Any], rank: int) -> dict[str, Any]:
    """A layer's report with the cosine of its first directions, where these are the leading ones."""
    leading = list(range(rank))
    directions, curve = report.get("directions", leading)[:rank], report.get("cosine") or []
    cosine = curve[rank - 1] if directions == leading and rank <= len(curve) else None
    return report | {"rank": rank, "directions": directions, "cosine_at_rank": cosine}


def _check_metadata(metadata: Any) -> None:
    """Raise `ValueError` unless what a bridge says of its origin is made as `oprd bridge` makes it."""
    parts = [metadata]
    if isinstance(metadata, dict):
        parts += [metadata.get(part, {}) for part in MAPPINGS]
    if isinstance(parts[-1], dict):
        parts += parts[-1].values() if len(parts) > 1 else ()
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("its metadata is not a mapping")


def _check(file: Path, layer: int, projector: Projector) -> None:
    shapes = [tuple(getattr(projector, name).shape) for name in TENSORS]
    (rank, student), (*_, teacher) = (*shapes[0], 0, 0)[:2], (0, *shapes[2])
    if not rank or shapes != [(rank, student), (rank,), (rank, teacher), (teacher,)]:
        raise UserError(f"{file} is damaged (shapes {shapes} at layer {layer}): fit the bridge again")
    if not all(getattr(projector, name).isfinite().all() for name in TENSORS):
        raise UserError(f"{file} holds values that are not finite at student layer {layer}: fit it again")


def bridge_file(path: str | Path) -> Path:
    """The file of a bridge that is named by it or by its folder."""
    path = Path(os.path.expanduser(path))
    # A folder may be called qwen3-1.7B, which is no file type.
    is_file = os.path.isfile(path) or (path.suffix[1:].isalpha() and not os.path.isdir(path))
    return path if is_file else path / BRIDGE_FILE


def _wide(h: Tensor) -> Tensor:
    return h.to(torch.promote_types(h.dtype, torch.float32))
