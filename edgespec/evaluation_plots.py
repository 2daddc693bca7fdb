"""Heat maps of an EvalResult as PNG files. matplotlib is imported inside: it is an extra (`plots`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgespec.evaluation_result import LABELS, EvalResult, Row

DEEP = "needle"  # the task whose depths are drawn


def heat_maps(result: EvalResult, folder: Path) -> list[str]:
    """Write the PNGs of every budget into the folder, and name them; ModuleNotFoundError: no matplotlib."""
    from matplotlib.figure import Figure

    names = []
    for budget in sorted({r.budget for r in result.rows} - {100}):
        rows = [r for r in result.rows if r.budget == budget]
        for kind, draw in ((DEEP, needles), ("tasks", tasks)):
            figure = Figure(layout="constrained")
            if draw(figure, rows, result):
                name = f"heatmap-{kind}-{budget}.png"
                figure.savefig(folder / name, dpi=110, metadata={"Software": None})
                names.append(name)
    return names


def needles(figure: Any, rows: list[Row], result: EvalResult) -> bool:
    """A panel for each policy: accuracy by depth (down) and length (across); False without such a task."""
    rows = [r for r in rows if r.task == DEEP]
    whole = [r for r in result.rows if r.task == DEEP and r.budget == 100]
    if not rows:
        return False
    policies = list(dict.fromkeys(r.policy for r in (*whole, *rows)))
    lengths = sorted({r.length for r in rows})
    depths = sorted({d.depth for r in rows for d in r.depths})
    across = min(4, len(policies))
    figure.set_size_inches(2 + 2.2 * across, 1 + 2.4 * -(-len(policies) // across))
    panels = figure.subplots(-(-len(policies) // across), across, squeeze=False).ravel()
    for panel in panels[len(policies) :]:
        panel.axis("off")
    image = None
    for panel, policy in zip(panels, policies, strict=False):
        at = {
            (d.depth, r.length): d.accuracy for r in (*whole, *rows) if r.policy == policy for d in r.depths
        }
        grid = [[at.get((depth, length), float("nan")) for length in lengths] for depth in depths]
        image = table(panel, grid, [f"{d:.0%}" for d in depths], [f"{n:,}" for n in lengths], "{:.0%}", 0, 1)
        panel.set_title(LABELS.get(policy, policy), fontsize=9)
    figure.colorbar(image, ax=list(panels), label="right answers")
    figure.suptitle(f"{DEEP}: depth by length, budget {rows[0].budget} %")
    return True


def tasks(figure: Any, rows: list[Row], result: EvalResult) -> bool:
    """Policies down, tasks and lengths across: the cost in nats."""
    columns = list(dict.fromkeys((r.length, r.task) for r in rows))
    policies = list(dict.fromkeys(r.policy for r in rows))
    at = {(r.policy, (r.length, r.task)): r.cost.mean for r in rows}
    grid = [[at.get((policy, column), float("nan")) for column in columns] for policy in policies]
    figure.set_size_inches(2.5 + 0.75 * len(columns), 2 + 0.35 * len(policies))
    names = [f"{task}\n{length:,}" for length, task in columns]
    panel = figure.subplots()
    image = table(panel, grid, [LABELS.get(p, p) for p in policies], names, "{:.2f}", 0, None, "viridis_r")
    figure.colorbar(image, ax=panel, label="nats worse than un-evicted")
    panel.set_title(f"cost of each task, budget {rows[0].budget} %")
    return True


def table(
    panel: Any,
    grid: list[list[float]],
    down: list[str],
    across: list[str],
    form: str,
    least: float,
    most: float | None,
    colours: str = "viridis",
) -> Any:
    """A coloured table with its figures written in; the image, for a colour bar."""
    image = panel.imshow(grid, aspect="auto", cmap=colours, vmin=least, vmax=most)
    panel.set_yticks(range(len(down)), down, fontsize=8)
    panel.set_xticks(range(len(across)), across, fontsize=8, rotation=45 if len(across) > 4 else 0)
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            dark = image.norm(value) > 0.5
            light = dark if colours.endswith("_r") else not dark
            panel.text(
                x,
                y,
                form.format(value),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if light else "black",
            )
    return image
