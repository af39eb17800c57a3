"""What a group of flags, a dataclass of arguments.py, says of itself besides its fields."""

from typing import ClassVar


class Flags:
    FILES = ()  # names of the flags that name a file or folder
    HUB = ()  # of those that name one, or something on the Hub
    SERVED = False  # whether those may name a model on a server, openai:MODEL
    MOST_USED = ()  # names of the flags that --help lists first
    REPLACED: ClassVar[dict[str, str]] = {}  # inherited flags that do nothing here, each with what to do instead

    def check_words(self, words: list[str]) -> None:
        """UserError if the arguments that are not flags are wrong."""

    def answer(self) -> tuple[str, int] | None:
        """(text, exit code) of what is printed at once, in place of running the script."""

    def complete(self):
        """The group with what can only be done once torch is imported."""
        return self
