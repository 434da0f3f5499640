"""Settings of earlier versions, in the words of this one: flip, crop and cutout, which are entries of augment now."""

import itertools
from collections.abc import Sequence
from typing import Any

from cnnmpi.distributed import UserError

BEFORE = ("flip", "crop", "cutout")
NOW = "flip, crop and cutout are part of augment, as in augment = 'flip,crop=4,cutout=8'"
CROPS = {"smallresnet": 4, "resnet18": 4, "mobilenet": 4}  # what the recipes had; all other networks had CROP
CROP = 2


def with_augment(content: dict[str, Any], source: str) -> dict[str, Any]:
    """Return ``content``, {setting: value}, with one ``augment`` that does what flip, crop and cutout did.

    They were applied in that order, and a person's own augmentation before cutout. Those that are missing had their
    usual values: a flip, the crop of the network's recipe, no cutout. Raises UserError, beginning with ``source``, for
    a flip that is neither true nor false, and where neither the crop nor the network is said.
    """
    if not set(BEFORE) & content.keys():
        return content
    if not {"crop", "model"} & content.keys():  # the crop was the network's, and that is not known here
        raise UserError(f"{source}: {NOW}")
    flip, cutout, own = content.get("flip", True), content.get("cutout", 0), content.get("augment")
    crop = content.get("crop", CROPS.get(str(content.get("model")), CROP))
    if not isinstance(flip, bool):
        raise UserError(f"{source}: flip must be true or false, got {flip!r}")
    words = ["flip"] if flip else []
    if crop not in (0, "0"):
        words.append(f"crop={crop}")
    if own is not None:
        words.append(str(own))
    if cutout not in (0, "0"):
        words.append(f"cutout={cutout}")
    others = {key: value for key, value in content.items() if key not in BEFORE}
    return others | {"augment": ",".join(words) or "none"}


def check_flags(args: Sequence[str]) -> None:
    """Raise UserError that says what to write now, where a command line has flags of earlier versions."""
    content: dict[str, Any] = {}
    for argument, after in itertools.pairwise([*args, "--"]):
        name, inline, value = argument.partition("=")
        value = value if inline else after
        if name in ("--flip", "--no-flip"):
            content["flip"] = name == "--flip" and value.lower() != "false"
        elif name in ("--crop", "--cutout", "--model"):
            content[name.removeprefix("--")] = "N" if value.startswith("--") else value
    if old := [f"--{name}" for name in BEFORE if name in content]:
        text = with_augment({"model": None, **content}, "")["augment"]
        raise UserError(f"{', '.join(old)}: augmentation is one setting now: write --augment {text}")
