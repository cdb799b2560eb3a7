"""What is printed is what was said."""

from rich.table import Table

from hpm.core.progress import result_console, say


def test_brackets_are_not_markup(capsys):
    name = "runs/[a]/[/x]"
    table = Table()
    table.add_column(name)
    table.add_row(name)
    result_console().print(name)
    result_console().print(table)
    say(name)
    printed = capsys.readouterr()
    assert printed.out.count(name) == 3 and printed.err.strip() == name
