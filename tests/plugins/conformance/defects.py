"""How a defect of the toy plugin is written down."""

from __future__ import annotations

from dataclasses import dataclass

from toy import Toy, good_toy


@dataclass(frozen=True)
class Change:
    """One text replaced by another in a file of the toy; it must occur."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    """One defect.

    Attributes:
        check: the check that it makes fail.
        subject: the component that the defect is in.
        says: words of the failure's message.
        changes: what is replaced in the toy's files.
    """

    check: str
    subject: str
    says: str
    changes: tuple[Change, ...]

    def toy(self) -> Toy:
        """The toy with the defect."""
        broken = good_toy()
        for change in self.changes:
            text = broken.files[change.file]
            assert change.old in text, f"{change.file} of the toy has no {change.old!r}"
            broken.files[change.file] = text.replace(change.old, change.new)
        return broken


_FILES = {
    "predictor/toy_dit": "predictor.py",
    "ae/toy_vae": "autoencoder.py",
    "text_encoder/toy_text": "text_encoder.py",
    "diffusion/toy_flow": "scheduler.py",
    "transformers_model/toy_net": "network.py",
}


def broken(subject: str, check: str, says: str, *pairs: tuple[str, str], file: str = "") -> Mutation:
    place = file or _FILES.get(subject, "parts.py")
    return Mutation(check, subject, says, tuple(Change(place, old, new) for old, new in pairs))


def dit(check: str, says: str, *pairs: tuple[str, str], file: str = "") -> Mutation:
    return broken("predictor/toy_dit", check, says, *pairs, file=file)


def vae(check: str, says: str, *pairs: tuple[str, str], file: str = "") -> Mutation:
    return broken("ae/toy_vae", check, says, *pairs, file=file)


def text(check: str, says: str, *pairs: tuple[str, str]) -> Mutation:
    return broken("text_encoder/toy_text", check, says, *pairs)


def flow(check: str, says: str, *pairs: tuple[str, str]) -> Mutation:
    return broken("diffusion/toy_flow", check, says, *pairs)


def first(check: str, says: str, *pairs: tuple[str, str]) -> Mutation:
    return broken("i2v_processor/toy_first", check, says, *pairs)


def net(check: str, says: str, *pairs: tuple[str, str], file: str = "") -> Mutation:
    return broken("transformers_model/toy_net", check, says, *pairs, file=file)


def part(subject: str, check: str, says: str, *pairs: tuple[str, str]) -> Mutation:
    return broken(subject, check, says, *pairs, file="parts.py")
