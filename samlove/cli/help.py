"""How help pages look: commands in groups, each with a full sentence, and examples below."""

from typing import Any

from typer.core import TyperGroup


class GroupedHelp(TyperGroup):
    """Lists commands under the title that each has as its `rich_help_panel`, in the order of definition.

    Plain text: looks the same with and without a terminal. Without this class the titles need typer's rich mode.
    """

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                title = getattr(command, "rich_help_panel", None) or "Commands"
                groups.setdefault(title, []).append((name, _summary(command.help)))
        width = max(len(name) for rows in groups.values() for name, _ in rows)
        for title, rows in groups.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), summary) for name, summary in rows])


def examples(*commands: str) -> str:
    """An epilog of example commands, one per line; click does not wrap lines after a backspace character."""
    return "\n".join(["\b", "Examples:" if len(commands) > 1 else "Example:", *(f"  {c}" for c in commands)])


def _summary(text: str | None) -> str:
    """The first paragraph, which the list of commands wraps instead of cutting it."""
    return " ".join((text or "").split("\n\n")[0].split())
