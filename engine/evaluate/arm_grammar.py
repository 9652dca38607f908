"""The arms of a job, as --arms spells them: METHOD[+LOSS][@SCALE][%RATE], joined by commas

    sft,sdft,stm:2.5,dft,psft:0.2,k3:0.02,sft@0.5,sdft+dft%3e-4

    METHOD    what is trained on
              sft             the references
              sdft            the accepted rewrites; the reference where none was accepted
              self            the seed's accepted answers to the plain prompt, else the reference
              rft             the accepted rewrites; rows without one are dropped
              replay:SHARE    the references, and the seed's own answers to general prompts as
                              further rows; the share is theirs of all rows (0.2: one of five)
    LOSS      how tokens are weighted (engine/train/losses.py); without it as --loss says: all the
              same
    SCALE     strength at which the trained adapter is measured; 1 without it
    RATE      peak learning rate, in place of --lr

A loss alone means sft+LOSS. Arms that differ in nothing but the scale share one training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from engine.train.losses import Loss
from model.lora import LARGEST_STRENGTH

DEFAULT_ARMS = "sft,sdft"
SPELLING = "METHOD[+LOSS][@SCALE][%RATE]"
METHODS = {  # name -> the name that people are shown
    "sft": "SFT",
    "sdft": "SDFT",
    "self": "self-output",
    "rft": "RFT",
    "replay": "replay",
}
# the losses, as they are spelled -> the name that people are shown
LOSSES = {"stm": "STM", "dft": "DFT", "psft": "PSFT", "k3": "k3", "eaft": "EAFT"}
PLAIN = "sft"  # the loss in which every token counts the same
STEP = " step "  # between an arm's name and the step of an earlier checkpoint of its training
HIGHEST_RATE = 100.0


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison: what is trained on, how, and at which strength it is measured."""

    method: str = "sft"  # a key of METHODS
    loss: str = PLAIN  # as engine/train/losses.py spells it
    share: float = 0.0  # of `replay`: share of all training rows that are replay
    scale: float = 1.0  # strength of the adapter
    rate: float | None = None  # peak learning rate; None: that of --lr

    @classmethod
    def parse(cls, text: str) -> Arm:
        """The arm that `text` spells; ValueError names the part that cannot be read."""
        rest, percent, rate_text = text.partition("%")
        rest, at, scale_text = rest.partition("@")
        try:
            arm = _method_and_loss(rest)
            scale = _number(scale_text, "scale", LARGEST_STRENGTH) if at else 1.0
            rate = _number(rate_text, "rate", HIGHEST_RATE) if percent else None
        except ValueError as error:
            raise ValueError(f"arm {text!r}: {error}") from None
        return dataclasses.replace(arm, scale=scale, rate=rate)

    @property
    def way(self) -> str:
        """Method and loss, as they are spelled: what the arm is, at any scale and rate."""
        method = self.method
        if method == "replay":
            method = f"replay:{short(self.share)}"
        if self.loss == PLAIN:
            return method
        if self.method == "sft":
            return self.loss
        return f"{method}+{self.loss}"

    @property
    def name(self) -> str:
        """The shortest spelling, which `parse` reads; equal arms have equal names."""
        name = self.way
        if self.scale != 1:
            name += f"@{short(self.scale)}"
        if self.rate is not None:
            name += f"%{short(self.rate)}"
        return name

    @property
    def title(self) -> str:
        """The name that people are shown, as in `SDFT + DFT x0.5, lr 0.0003`."""
        method = METHODS[self.method]
        if self.method == "replay":
            method = f"replay {short(self.share)}"
        title = method
        if self.loss != PLAIN:
            loss_name, _, value = self.loss.partition(":")
            title = f"{LOSSES[loss_name]} {value}".strip()
            if self.method != "sft":
                title = f"{method} + {title}"
        if self.scale != 1:
            title += f" x{short(self.scale)}"
        if self.rate is not None:
            title += f" lr {short(self.rate)}"
        return title

    @property
    def directory(self) -> str:
        """The name of the training's directory, the same for every scale.

        Different trainings have different names; no character needs quoting in a shell or a URL.
        """
        name = self.way.replace(":", "-")
        if self.rate is not None:
            name += f"-lr{short(self.rate)}"
        return name

    def trained(self) -> Arm:
        """The arm at scale 1, which is trained for every scale."""
        return dataclasses.replace(self, scale=1.0)

    def at(self, scale: float) -> Arm:
        """The same training, measured at that scale."""
        return dataclasses.replace(self, scale=scale)


def parse_arms(text: str) -> list[Arm]:
    """The arms of a list joined by commas.

    ValueError for an arm that cannot be read, and for one that is there twice in any spelling.
    """
    arms: dict[str, str] = {}  # name -> as it was typed
    parsed = []
    for part in text.split(","):
        typed = part.strip()
        arm = Arm.parse(typed)
        if arm.name in arms:
            raise ValueError(
                f"arms {text!r}: {typed!r} and {arms[arm.name]!r} are the same arm; expected each "
                "once"
            )
        arms[arm.name] = typed
        parsed.append(arm)
    return parsed


def parse_arm_scales(text: str) -> list[float]:
    """The scales of a list joined by commas, each above 0; ValueError where one is twice."""
    scales = [_number(part.strip(), "scale", LARGEST_STRENGTH) for part in text.split(",")]
    if len(set(scales)) < len(scales):
        raise ValueError(f"scales {text!r}: expected each once, as in 0.5,1")
    return scales


def trainings(arms: Sequence[Arm]) -> list[Arm]:
    """The arms to train, each once, in the order of their first use."""
    return list(dict.fromkeys(arm.trained() for arm in arms))


def title_of(name: str) -> str:
    """The name that people are shown for an arm's name in a file: `sft@0.5`, `sft step 40`."""
    if name == "seed":
        return name
    spelled, step, number = name.partition(STEP)
    return Arm.parse(spelled).title + step + number


def way_of(name: str) -> str:
    """Method and loss of an arm's name in a file."""
    spelled, _, _ = name.partition(STEP)
    return Arm.parse(spelled).way


def short(value: float) -> str:
    """The shortest decimal text that is read back as the same number."""
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


def _method_and_loss(text: str) -> Arm:
    """The arm that METHOD[+LOSS] or a loss alone spells; ValueError says what was expected."""
    method_text, plus, loss_text = text.partition("+")
    method, colon, value = method_text.partition(":")
    if not plus and method in LOSSES:
        return Arm(loss=_loss(method_text))
    if method not in METHODS:
        raise ValueError(f"{method_text!r} is no method and no loss; {_expected()}")
    share = 0.0
    if method == "replay":
        share = _number(value, "share", 1.0)
    elif colon:
        raise ValueError(f"{method_text!r}: {method} takes no value; {_expected()}")
    loss = _loss(loss_text) if plus else PLAIN
    return Arm(method, loss, share)


def _loss(text: str) -> str:
    """The loss in its one spelling; ValueError where it is none, or its number is out of range."""
    name, _, _ = text.partition(":")
    if name not in (*LOSSES, PLAIN):
        raise ValueError(f"{text!r} is no loss; {_expected()}")
    return str(Loss.parse(text))


def _expected() -> str:
    """The end of a message: the spelling, the methods and the losses."""
    return (
        f"expected {SPELLING} with a method among sft, sdft, self, rft, replay:SHARE and a loss "
        "among stm:TAU, dft, psft:EPS, k3:BETA, eaft[:ALPHA]"
    )


def _number(text: str, what: str, highest: float) -> float:
    """A number above 0 and at most `highest`; ValueError names `what`."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= highest:  # "not <": NaN too
        raise ValueError(
            f"{what} {text!r}: expected a number above 0 and at most {highest:g} ({SPELLING})"
        )
    return value
