"""What --help prints: each flag once, under headings, those that everybody uses first."""

from argparse import ArgumentDefaultsHelpFormatter

VALUES = {"int": "N", "float": "X", "string_to_bool": "true|false"}


class Help(ArgumentDefaultsHelpFormatter):
    """Tells the default of each flag but those whose words do: they have None."""

    def _format_action(self, action):
        """Words that need several lines begin below the flag."""
        text, flag = super()._format_action(action), f"  {self._format_action_invocation(action)}"
        if text.count("\n") > 1 and text.startswith(f"{flag}  "):
            text = f"{flag}\n{' ' * self._max_help_position}{text.removeprefix(flag).lstrip()}"
        return text

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return VALUES.get(getattr(action.type, "__name__", ""), action.dest.rpartition("_")[2].upper())

    def _metavar_formatter(self, action, default_metavar):
        many = action.choices is not None and len(list(action.choices)) > 8
        return (
            (lambda times: (default_metavar,) * times) if many else super()._metavar_formatter(action, default_metavar)
        )

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action)) if action.nargs != 0 else ""
        return f"{max(action.option_strings, key=len)} {values}".strip()


def arrange(parser, dataclasses_: tuple) -> None:
    """Puts the flags of `parser` under the HEADING of the dataclass that declares each: first those of `dataclasses_` that its
    MOST_USED names, last those that are transformers' own."""
    most_used = [name for cls in dataclasses_ for name in cls.MOST_USED]
    owners = [base for cls in dataclasses_ for base in cls.__mro__ if "HEADING" in vars(base)]
    heading_of = {name: base.HEADING for base in reversed(owners) for name in base.__dataclass_fields__}
    heading_of |= dict.fromkeys(most_used, "the most used") | {"help": owners[-1].HEADING}
    under: dict[str, list] = {heading: [] for heading in ("the most used", *(base.HEADING for base in owners))}
    for action in parser._actions:
        under.setdefault(heading_of.get(action.dest, "transformers' Trainer"), []).append(action)
    under["the most used"].sort(key=lambda action: most_used.index(action.dest))
    parser._action_groups = []
    for heading, actions in under.items():
        parser.add_argument_group(heading)._group_actions.extend(actions)
