"""The Snapdragon chips that headrace compiles for, as data. Knows nothing about compilers or files.

Numbers as Qualcomm's SDK has them (QnnTypes / HTP backend extensions: soc_model and dsp_arch).
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import TargetError, did_you_mean

__all__ = ["SOCS", "Soc", "find_soc", "soc_of_model"]


@dataclass(frozen=True)
class Soc:
    """One chip.

    Attributes:
        name: as `--target` takes it.
        title: its trade name.
        model: Qualcomm's `soc_model`, which every compiled binary carries.
        arch: generation of the Hexagon tensor processor, the 79 of "v79".
        vtcm_mb: megabytes of the processor's own fast memory; the compiler plans for 4 unless told.
        android: runs Android, reached by adb; otherwise Windows on the machine itself.
    """

    name: str
    title: str
    model: int
    arch: int
    vtcm_mb: int = 8
    android: bool = True

    @property
    def dsp_arch(self) -> str:
        """`v79`, as Qualcomm's configuration files and library folders spell it."""
        return f"v{self.arch}"


SOCS = (
    Soc("snapdragon-8-elite-gen5", "Snapdragon 8 Elite Gen 5", 87, 81),
    Soc("snapdragon-8-elite", "Snapdragon 8 Elite", 69, 79),
    Soc("snapdragon-8-gen3", "Snapdragon 8 Gen 3", 57, 75),
    Soc("snapdragon-8-gen2", "Snapdragon 8 Gen 2", 43, 73),
    Soc("sm8845", "Snapdragon 8 Gen 5 (SM8845)", 97, 81),
    Soc("qcs9100", "Dragonwing IQ-9100 (QCS9100)", 77, 73),
    Soc("sa8255", "Snapdragon Ride (SA8255)", 52, 73),
    Soc("snapdragon-x-elite", "Snapdragon X Elite and X Plus", 60, 73, android=False),
)


def find_soc(name: str) -> Soc:
    """The chip called `name`.

    Raises:
        TargetError: there is no such chip.
    """
    for soc in SOCS:
        if soc.name == name:
            return soc
    known = [soc.name for soc in SOCS]
    raise TargetError(f"unknown target {name!r}{did_you_mean(name, known)}; expected one of {', '.join(known)}")


def soc_of_model(model: int) -> Soc | None:
    """The chip with this `soc_model`; None when headrace does not know it."""
    return next((soc for soc in SOCS if soc.model == model), None)
