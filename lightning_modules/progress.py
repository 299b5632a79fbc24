"""The bar of long work over items: how many, how many a second, how long it will take."""

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text


class Speed(ProgressColumn):
    """Items a second, of late."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {task.fields.get('unit', 'items')}/s")


def bar_of(console: Console | None) -> Progress:
    """A bar that goes when its work is done; on the console that is told, or one of its own."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
