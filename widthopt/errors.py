"""The errors that a user can cause and correct, and the checks that raise them.

Every other exception is a fault of the program and keeps its traceback.
"""

from typing import Literal


NetworkAxis = Literal["width", "depth", "resolution"]
"""An axis of a setting that changes the network; the fraction of the images does not."""


class InputError(ValueError):
    """A request cannot be carried out; the message is the one line that a user needs.

    Its form is ``<key as typed> is <value>, but <rule>; <what to do>``. The command
    prints it without a traceback and exits with code 2, before any work has started.
    """


class AxisError(InputError):
    """A network cannot be built at the value of one of its axes.

    The message begins with the name of the axis. `widthopt.request.Request.blueprint` adds the
    group of the key that the user typed: ``target`` or ``projection``.

    Attributes:
        axis: ``width``, ``depth`` or ``resolution``.
    """

    def __init__(self, axis: NetworkAxis, reason: str) -> None:
        """Name the axis and the reason.

        Args:
            axis: The axis.
            reason: ``<value>, but <rule>; <what to do>``.
        """
        super().__init__(axis, reason)  # both, so that another process can load the error
        self.axis: NetworkAxis = axis

    def __str__(self) -> str:
        return f"{self.axis} is {self.args[1]}"


def check_value(key: str, value: object, *, holds: bool, rule: str) -> None:
    """Raise InputError unless the rule of a value holds.

    Args:
        key: The key as typed, for example ``recipe.epochs``.
        value: Its value, for the message.
        holds: Whether the rule holds.
        rule: The rule and what to do, joined by a semicolon.
    """
    if not holds:
        shown = f"{value:g}" if isinstance(value, float) else value
        raise InputError(f"{key} is {shown}, but {rule}")


def check_fields(group: str, values: object, *rules: tuple[str, bool, str], remedy: str) -> None:
    """Raise InputError for the first field of a dataclass whose rule does not hold.

    Args:
        group: What the keys begin with, for example ``recipe``.
        values: The dataclass.
        rules: Each is the name of a field, whether the rule holds, and the rule in words.
        remedy: What to do, whichever field it is.
    """
    for name, holds, rule in rules:
        value = getattr(values, name)
        check_value(f"{group}.{name}", value, holds=holds, rule=f"{rule}; {remedy}")
