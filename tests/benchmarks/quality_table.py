"""The tables and the picture of what ways of training reach on real text, of the figures that the benchmark wrote."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flair_peft.training.rates import as_written
from tests.benchmarks import steps
from tests.benchmarks.trainings import Record, lead

FULL, LORA = "full fine-tuning", "LoRA"
WANTED_POINTS = -0.5
CHOOSING = ("SST-2", "UD-EWT", "NER, linear")
"""Tasks on which rates are chosen."""
NAMES = {
    "MiniLM": "MiniLM (all-MiniLM-L6-v2, 6 layers, 22.7 M parameters)",
    "MPNet": "all-mpnet-base-v2 (12 layers, 109 M parameters)",
}


def rows(records: Sequence[Record], tasks: Iterable[str]) -> list[dict[str, Any]]:
    """Return what each way of one base reached on each task, in percent, and the medians of what it cost."""
    ways = {record["way"] for record in records}
    tasks, found = list(tasks), []
    usual = _usual(records, tasks[0])
    for task in tasks:
        by_way = {
            way: {r["seed"]: r for r in records if (r["task"], r["way"]) == (task, way)} for way in sorted_ways(ways)
        }
        found += [row(task, way, those, by_way.get(FULL, {}), usual) for way, those in by_way.items() if those]
    return found


def _usual(records: Sequence[Record], task: str) -> str:
    """Return the processor that timed full fine-tuning on this task, or else most of all: others do not compare."""
    full = [record for record in records if (record["task"], record["way"]) == (task, FULL)]
    return statistics.mode(record["processor"] for record in full or records)


def sorted_ways(ways: Iterable[str]) -> list[str]:
    """Return the ways with the whole encoder first, then the head alone, then LoRA, then the others."""
    order = [FULL, "frozen encoder", LORA, *(f"LoRA, upper {count} layers" for count in (8, 6, 4)), "DoRA", "IA³"]
    return sorted(ways, key=lambda way: (order.index(way) if way in order else len(order), way))


def row(task: str, way: str, those: dict[int, Record], full: dict[int, Record], usual: str) -> dict[str, Any]:
    """Return the figures of one way on one task, and its lead over full fine-tuning with the same seeds.

    Time and memory are those on one kind of processor alone, the usual one, which also trains in one precision.
    """
    scores = [100 * those[seed]["score"] for seed in sorted(those)]
    usually = [record for record in those.values() if record["processor"] == usual]
    record = those[min(those)]
    common = sorted(those.keys() & full.keys()) if way != FULL else []
    return {
        "task": task,
        "way": way,
        "rate": record["rate"],
        "head_rate": record["head_rate"],
        "scores": scores,
        "lead": lead(*([100 * side[seed]["score"] for seed in common] for side in (those, full)))
        if len(common) > 1
        else None,
        "share": record["trained"] / record["parameters"],
        **{what: _median(r[what] for r in usually) for what in ("seconds", "memory")},
        "file": statistics.median(r["file"] for r in those.values()),
    }


def _median(values: Iterable[float | None]) -> float | None:
    """Return the median of what was measured; of trainings that shared a process, memory was not."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    lines = ["# Quality on real text, and what it costs", ""]
    if "quality" in report:
        lines += quality_page(report["quality"])
    if "step" in report:
        lines += steps.step_page(report["step"])
    return "\n".join(lines).rstrip() + "\n"


def quality_page(found: dict[str, Any]) -> list[str]:
    lines = [
        f"`python -m tests.benchmarks.quality`, {found['date']}, {found['machine']}, {found['versions']}.",
        "",
        "Sentiment of SST-2 and parts of speech of UD-EWT (accuracy); names in the sentences of UD-EWT (UNER-EWT:",
        "people, organisations, places; micro-F1 of spans) with a linear head and with a CRF, without context and",
        "with 16 words on either side. Flair's `ModelTrainer.fine_tune`; LoRA has r=16 on all linear layers and",
        "alpha twice the rank, on the upper layers a rank that trains as many weights. Each seed draws its",
        "sentences, their order and the start of the head, which all ways have in common; of names all 1,653",
        "sentences are taken. Learning rates of the base and of the head are chosen on other sentences with one",
        "seed, in steps of three, on names in half steps beside the best, and the best two with two seeds more:",
        "DoRA and LoRA on the upper layers take those of LoRA, all tasks of names those of the first. Scores are",
        "those of the whole test part: mean and standard deviation over the seeds, and the difference to full",
        "fine-tuning paired by seed, with a 95 % interval of Student's t. They say nothing of the choice of the",
        "rates, or of another test part; some short sentences stand in several parts (68 of 2,077 in the test",
        "part of UD-EWT, 2 of 1,821 in that of SST-2). Time is that of the processor in the trainer; the vectors of a",
        "frozen encoder are kept after the first epoch where there is no context. Memory is the peak until the end of",
        "the training, beyond what the process had before. Both are medians, of trainings on the first of the",
        "processors alone. The first seed's model of each row was saved and loaded again, and gave 50 test",
        "sentences the same labels and scores.",
        "",
        "![What each way reached with each seed](quality.png)",
        "",
    ]
    for base, of_base in found["bases"].items():
        size = of_base["settings"]
        lines += [
            f"## {NAMES[base]}",
            "",
            f"{size['sentences']} sentences of SST-2 and UD-EWT, {size['epochs']} epochs, batches of {size['batch']}."
            + _precision(of_base["mixed"], sum(len(r["scores"]) for r in of_base["rows"])),
            "",
        ]
        for task in dict.fromkeys(r["task"] for r in of_base["rows"]):
            lines += table(task, [r for r in of_base["rows"] if r["task"] == task])
        if of_base["gap"]:
            lines += [
                "### Between LoRA and full fine-tuning",
                "",
                "Other ranks, targets and numbers of epochs, at the rates of LoRA and of full fine-tuning, with the",
                "same seeds:",
                "",
            ]
        for task in dict.fromkeys(r["task"] for r in of_base["gap"]):
            lines += [f"On {task}:", "", *rows_of(task, [r for r in of_base["gap"] if r["task"] == task])]
    return lines


def _precision(mixed: int, trainings: int) -> str:
    if not mixed:
        return ""
    others = f"; {trainings - mixed} of {trainings} trainings in fp32, on a processor without it"
    return f" Trained with Flair's `use_amp` (bfloat16){others if mixed < trainings else ''}."


def table(task: str, of_task: Sequence[dict[str, Any]]) -> list[str]:
    return [f"### {task}", "", *rows_of(task, of_task), *verdict(task, of_task)]


def rows_of(task: str, of_task: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"| way | {'micro-F1' if task.startswith('NER') else 'accuracy'}, % | seeds | against full fine-tuning | "
        "trained | rate | head's rate | time, s | peak memory, MB | file, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in of_task:
        rate = "–" if r["way"] == "frozen encoder" else f"{r['rate']:g}"
        lines.append(
            f"| {r['way']} | {spread(r['scores'])} | {len(r['scores'])} | {difference(r['lead'])} | "
            f"{100 * r['share']:.2f} % | {rate} | {r['head_rate']:g} | {_time(r)} | {_memory(r)} | "
            f"{r['file'] / 1e6:.2f} |"
        )
    return [*lines, ""]


def spread(scores: Sequence[float]) -> str:
    """Return mean and standard deviation, or the one score there is."""
    return f"{statistics.mean(scores):.1f}" + (f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else "")


def _time(of_row: dict[str, Any], unit: str = "") -> str:
    return f"{of_row['seconds']:.0f}{unit}" if of_row["seconds"] is not None else ""


def _memory(of_row: dict[str, Any], unit: str = "") -> str:
    return f"{of_row['memory'] / 1e6:.0f}{unit}" if of_row["memory"] is not None else ""


def difference(of_row: dict[str, Any] | None) -> str:
    return f"{of_row['mean']:+.1f} ({of_row['low']:+.1f} to {of_row['high']:+.1f})" if of_row else ""


def verdict(task: str, of_task: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line that says whether LoRA is where it is wanted to be beside full fine-tuning."""
    of_lora = [r["lead"] for r in of_task if r["way"] == LORA and r["lead"]]
    if not of_lora:
        return []
    is_reached = of_lora[0]["mean"] >= WANTED_POINTS
    return [
        f"LoRA minus full fine-tuning on {task}: {of_lora[0]['mean']:+.2f} points over {len(of_lora[0]['pairs'])} "
        f"seeds (wanted: ≥ {WANTED_POINTS}; {'reached' if is_reached else 'not reached'}).",
        "",
    ]


def overview(found: dict[str, Any], ways: Sequence[str] = ()) -> list[str]:
    """Return the lines of one table of all bases and tasks, of these ways or of all, if of several seeds."""
    rows = [(base, r) for base, of_base in found["bases"].items() for r in of_base["rows"] if len(r["scores"]) > 1]
    tasks = list(dict.fromkeys(r["task"] for _, r in rows))
    lines = [
        f"| | | trained | {' | '.join(tasks)} | time | memory | file |",
        "|---|---|" + "---|" * (len(tasks) + 4),
    ]
    for base in found["bases"]:
        for way in sorted_ways(ways or {r["way"] for of, r in rows if of == base}):
            of_way = {r["task"]: r for of, r in rows if (of, r["way"]) == (base, way)}
            if not of_way:
                continue
            cells = [spread(of_way[task]["scores"]) if task in of_way else "" for task in tasks]
            first = of_way[min(of_way, key=tasks.index)]
            lines.append(
                f"| {base} | {way} | {100 * first['share']:.2g} % | {' | '.join(cells)} | {_time(first, ' s')} | "
                f"{_memory(first, ' MB')} | {first['file'] / 1e6:.3g} MB |"
            )
    return lines


def rates(found: dict[str, Any]) -> list[str]:
    """Return the lines of the table of the rates that were chosen, of ways that take no other's."""
    rows = [(base, r) for base, of_base in found["bases"].items() for r in of_base["rows"]]
    tasks = [task for task in dict.fromkeys(r["task"] for _, r in rows) if task in CHOOSING]
    lines = ["| | | " + " | ".join(tasks) + " |", "|---|---|" + "---|" * len(tasks)]
    for base, way in dict.fromkeys((base, r["way"]) for base, r in rows):
        if way == "DoRA" or "upper" in way:
            continue
        chosen = {r["task"]: [r["rate"], r["head_rate"]] for of, r in rows if (of, r["way"]) == (base, way)}
        shown = {task: found[way == "frozen encoder" :] for task, found in chosen.items()}
        cells = [", ".join(f"`{as_written(rate)}`" for rate in shown.get(task, ())) for task in tasks]
        lines.append(f"| {base} | {way} | {' | '.join(cells)} |")
    return lines


def leads(found: dict[str, Any]) -> list[str]:
    """Return the lines of the table of LoRA beside full fine-tuning."""
    lines = ["| | | LoRA minus full fine-tuning, points | 95 % | seeds |", "|---|---|---|---|---|"]
    for base, of_base in found["bases"].items():
        for r in of_base["rows"]:
            if r["way"] == LORA and r["lead"]:
                apart = r["lead"]
                lines.append(
                    f"| {base} | {r['task']} | {apart['mean']:+.2f} | {apart['low']:+.2f} to {apart['high']:+.2f} | "
                    f"{len(apart['pairs'])} |"
                )
    return lines


def gaps(found: dict[str, Any]) -> list[str]:
    """Return the lines of the table of what was tried between LoRA and full fine-tuning, of several seeds, and LoRA."""
    lines = ["| | | | % | against full fine-tuning, points | seeds |", "|---|---|---|---|---|---|"]
    for base, of_base in found["bases"].items():
        tried = [r for r in of_base["gap"] if len(r["scores"]) > 1]
        for task in dict.fromkeys(r["task"] for r in tried):
            of_lora = [r for r in of_base["rows"] if (r["task"], r["way"]) == (task, LORA)]
            for r in (*of_lora, *(r for r in tried if r["task"] == task)):
                way = f"{LORA}, r=16" if r["way"] == LORA else r["way"]
                cells = (base, task, way, spread(r["scores"]), difference(r["lead"]), str(len(r["scores"])))
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(found: dict[str, Any], path: Path) -> None:
    """Write a picture: what each way reached with each seed, a row of panels for each base."""
    bases = found["bases"]
    tasks = list(dict.fromkeys(r["task"] for of_base in bases.values() for r in of_base["rows"]))
    if not tasks:
        return
    figure = Figure(figsize=(2.6 * len(tasks) + 2, 2.9 * len(bases)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(bases), len(tasks), squeeze=False, sharey="row")
    for of_panels, (base, of_base) in zip(panels, bases.items(), strict=True):
        ways = sorted_ways(dict.fromkeys(r["way"] for r in of_base["rows"]))[::-1]
        for axes, task in zip(of_panels, tasks, strict=True):
            of_task = [r for r in of_base["rows"] if r["task"] == task]
            if not of_task:
                axes.set_axis_off()
                continue
            for r in of_task:
                height = ways.index(r["way"])
                axes.plot(r["scores"], [height] * len(r["scores"]), "o", color="C0", alpha=0.5, markersize=5)
                axes.plot([statistics.mean(r["scores"])], [height], "|", color="black", markersize=14)
            axes.set_yticks(range(len(ways)), ways, fontsize=8)
            axes.set_title(f"{base}: {task}", fontsize=9)
            axes.tick_params(axis="x", labelsize=8)
            axes.grid(axis="x", alpha=0.3)
    figure.supxlabel("accuracy, or micro-F1 of names, %: seeds and their mean", fontsize=8)
    figure.savefig(path)
