"""Pictures of measurements, as PNG and SVG: time to first token, decoding over depth, KL against bytes.

Needs matplotlib (headrace[plots]). Draws records; measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headrace.errors import UserError
from headrace.measure.facts import decimal

__all__ = ["Point", "Series", "need_matplotlib", "plot_bench", "plot_course", "plot_kl", "plot_speeds"]

# Paul Tol's bright scheme: told apart by people with any colour vision, and in grey.
OURS, OTHERS = ("#4477AA", "#66CCEE"), ("#EE6677", "#228833", "#CCBB44", "#AA3377", "#BBBBBB")
_INK, _FAINT = "#333333", "#E4E4E4"
_ACROSS = 4  # panels side by side
_HEADING = 0.58  # inches
_TITLE: dict[str, Any] = {"fontweight": "bold"}
_NOTE: dict[str, Any] = {"color": "#777777"}
_STYLE: Any = {
    "figure.figsize": (7.0, 4.2),
    "figure.dpi": 150,
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small files that a browser's own font draws
    "svg.hashsalt": "headrace",  # the same picture is the same file
}


@dataclass(frozen=True)
class Point:
    """A model in a plot of quality against size."""

    label: str
    bytes: float
    kl: float


@dataclass(frozen=True)
class Series:
    """Points of one origin; `ours` are joined and drawn in front."""

    name: str
    points: Sequence[Point]
    ours: bool = False


def need_matplotlib() -> None:
    """Raise UserError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise UserError("pictures need matplotlib; expected: pip install 'headrace[plots]'")


def plot_bench(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """The pictures of a bench record: `ttft` and `decode`, those it has numbers for; their SVG and PNG files.

    Raises:
        UserError: matplotlib is not installed.
    """
    made: list[Path] = []
    where = f"{record['runner']}, {record['settings']['threads']} threads, {record['machine']['processor']}"
    name = record["bundle"]["name"].removesuffix(".bundle")
    if record["prompts"]:
        with _figure(folder / "ttft", f"{name}: time to first token", where, made) as axes:
            rows = sorted(record["prompts"], key=lambda row: row["tokens"])
            lengths = [row["tokens"] for row in rows]
            _band(axes, lengths, rows, lambda row, seconds: seconds)
            axes.plot(lengths, [row["formula_seconds"] for row in rows], "--", color=OTHERS[0], lw=1.6,
                      label="by formula: steps × one step")  # fmt: skip
            axes.set(xlabel="prompt, tokens", ylabel="seconds", ylim=(0, None), xlim=(0, None))
            axes.legend(loc="upper left")
    if record["decode"]:
        with _figure(folder / "decode", f"{name}: decoding over a filled cache", where, made) as axes:
            rows = record["decode"]
            _band(axes, [row["depth"] for row in rows], rows, lambda row, seconds: row["tokens"] / seconds)
            axes.set(xlabel="tokens in the cache", ylabel="tokens a second", ylim=(0, None))
            axes.legend(loc="lower left")
    return made


def plot_kl(series: Sequence[Series], path: Path, title: str, note: str) -> list[Path]:
    """KL against bytes, both on logarithmic axes: nearer to the lower left is better.

    Args:
        series: points by origin.
        path: of the files, without suffix.
        title, note: above the picture.

    Raises:
        UserError: matplotlib is not installed.
    """
    made: list[Path] = []
    with _figure(path, title, note, made) as axes:
        colours = {True: iter(OURS), False: iter(OTHERS)}
        largest = max(p.bytes for one in series for p in one.points)
        least = min(p.bytes for one in series for p in one.points)
        peers = [one for one in series if not one.ours]
        for one in [*(one for one in series if one.ours), *peers]:
            points = sorted(one.points, key=lambda p: p.bytes)
            below = one in peers[1::2]  # so that labels of two peers' points beside each other do not overlap
            colour = next(colours[one.ours])
            axes.plot([p.bytes / 1e6 for p in points], [p.kl for p in points], "o-" if one.ours else "s",
                      color=colour, ms=6, lw=1.4, label=one.name, zorder=3 if one.ours else 2)  # fmt: skip
            for p in points:
                inward = p.bytes > least + 0.7 * (largest - least)  # a label there would run out of the picture
                offset = (-8, -11 if one.ours else 5) if inward else (7, -10 if below else 5)
                axes.annotate(p.label, (p.bytes / 1e6, p.kl), xytext=offset, textcoords="offset points", fontsize=8,
                              ha="right" if inward else "left", color=_INK)  # fmt: skip
        axes.set(yscale="log", xlabel="megabytes of weights", ylabel="KL to the float model (lower is better)")
        axes.margins(x=0.06, y=0.12)
        _plain_log(axes)
        axes.figure.legend(loc="outside lower left", ncols=2, fontsize=9)
    return made


def plot_speeds(
    groups: Sequence[tuple[str, Sequence[tuple[str, float, float, float]]]], path: Path, title: str, note: str
) -> list[Path]:
    """Bars of speed by engine, one panel a group, with the range of repetitions.

    Args:
        groups: (what is measured, [(engine, median, low, high)]); an engine named headrace… is drawn as ours.
        path: of the files, without suffix.
        title, note: above the picture.

    Raises:
        UserError: matplotlib is not installed.
    """
    made: list[Path] = []
    names = list(dict.fromkeys(name for _, bars in groups for name, *_ in bars))
    rows = -(-len(groups) // _ACROSS)
    height = 0.9 + rows * (1 + 0.42 * len(names))
    with _figure(path, title, note, made, panels=len(groups), height=height) as panels:
        across = -(-len(groups) // rows)
        for axes, (what, bars) in zip(panels, groups):
            for name, value, low, high in bars:
                colour = OURS[0] if name.startswith("headrace") else "#B8B8B8"
                place = names.index(name)
                error = [[value - low], [high - value]]
                axes.barh([place], [value], xerr=error, color=colour, ecolor="#777777", height=0.62)
                axes.annotate(f"{value:.0f}" if value >= 100 else f"{value:.1f}", (high, place), xytext=(4, 0),
                              textcoords="offset points", va="center", fontsize=9)  # fmt: skip
            axes.set_yticks(range(len(names)), names if axes in panels[::across] else [""] * len(names))
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_xlim(0, 1.3 * max(high for *_, high in bars))
            axes.locator_params(axis="x", nbins=3)
            axes.grid(axis="y", visible=False)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.set_xlabel(what, fontsize=9)
    return made


def plot_course(
    memory: Sequence[tuple[float, float]],
    answers: Sequence[tuple[float, float, float]],
    path: Path,
    title: str,
    note: str,
    others: Sequence[tuple[float, float]] = (),
    pieces: int = 30,
) -> list[Path]:
    """A server over time: its memory, and how long clients waited.

    Args:
        memory: (second, bytes), resident.
        answers: (second of the end, seconds to the first piece, seconds in all) of each answer.
        path: of the files, without suffix.
        title, note: above the picture.
        others: (second, processors) that other programs took of those that the server could have.
        pieces: the time is cut into so many; of each the median and the 95th percentile are drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    made: list[Path] = []
    end = max(at for at, *_ in memory)
    cut: list[list[tuple[float, float]]] = [[] for _ in range(pieces)]
    for at, *waited in answers:
        cut[min(int(at / end * pieces), pieces - 1)].append((waited[0], waited[1]))
    minutes = [(number + 0.5) * end / pieces / 60 for number, piece in enumerate(cut) if piece]
    with _figure(path, title, note, made, panels=2, height=3.4) as (left, right):
        # A point a piece is enough to see, and keeps the file small.
        shown = memory[:: max(1, len(memory) // 200)]
        left.plot([at / 60 for at, _ in shown], [held / 1e6 for _, held in shown], color=OURS[0], lw=2)
        left.set_ylim(0, 1.15 * max(held for _, held in memory) / 1e6)
        left.set_xlabel("minutes")
        left.set_ylabel("resident memory, MB")
        for place, name, colour in ((1, "whole answer", OTHERS[4]), (0, "first piece", OURS[0])):
            waits = [sorted(one[place] for one in piece) for piece in cut if piece]
            middle = [one[len(one) // 2] for one in waits]
            slow = [one[min(int(0.95 * len(one)), len(one) - 1)] for one in waits]
            right.plot(minutes, middle, color=colour, lw=2, label=f"{name}, median")
            right.plot(minutes, slow, color=colour, lw=1, ls=":", label=f"{name}, 95 %")
        right.set_ylim(0, 1.35 * right.get_ylim()[1])  # room for the names above the lines
        right.set_xlabel("minutes")
        right.set_ylabel("seconds")
        if others:
            shares: list[list[float]] = [[] for _ in range(pieces)]
            for at, share in others:
                shares[min(int(at / end * pieces), pieces - 1)].append(share)
            beside = right.twinx()
            taken = [100 * sum(one) / len(one) for one in shares if one]
            places = [(number + 0.5) * end / pieces / 60 for number, one in enumerate(shares) if one]
            beside.fill_between(places, taken, color=OTHERS[4], alpha=0.35, lw=0, step="mid")
            beside.set_ylim(0, 200)  # the lower half of the picture
            beside.set_yticks([0, 50, 100])
            beside.set_ylabel("grey: others, % of a processor")
        right.legend(fontsize=8.5, loc="upper center", ncols=2)
    return made


def _band(axes: Any, places: list[int], rows: Sequence[Mapping[str, Any]], value: Any) -> None:
    """Measured: a line through the medians, and a band from the slowest to the fastest repetition."""
    low, middle, high = ([value(row, row[key]) for row in rows] for key in ("slowest", "seconds", "fastest"))
    axes.fill_between(places, low, high, color=OURS[0], alpha=0.18, lw=0)
    axes.plot(places, middle, "o-", color=OURS[0], ms=5, lw=2, label=f"measured, median of {len(rows[0]['samples'])}")
    for x, y in zip(places, middle):
        axes.annotate(decimal(y, 3), (x, y), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8.5)


def _plain_log(axes: Any) -> None:
    """0.05, 0.1, 0.2: numbers instead of powers of ten, at places that a short axis has enough of."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


@contextmanager
def _figure(
    path: Path, title: str, note: str, made: list[Path], *, panels: int = 1, height: float | None = None
) -> Iterator[Any]:
    need_matplotlib()
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with mpl.rc_context(_STYLE):
        width, tall = 7.0 if panels == 1 else 8.6, height or 4.4
        # Title and note stand above what is laid out.
        figure = Figure((width, tall), layout=ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - _HEADING / tall)))
        FigureCanvasAgg(figure)
        rows = -(-panels // _ACROSS)
        axes = figure.subplots(rows, -(-panels // rows), squeeze=False).flatten()
        for spare in axes[panels:]:
            spare.set_visible(False)
        left = 0.1 / width
        for text, down, size, style in ((title, 0.12, 11.5, _TITLE), (note, 0.36, 8.5, _NOTE)):
            line = figure.text(left, 1 - down / tall, text, va="top", fontsize=size, **style)
            line.set_in_layout(False)
            # What is wider than the picture is written smaller: cut off, it would say something else.
            line.set_fontsize(size * min(1, (1 - 2 * left) * figure.bbox.width / line.get_window_extent().width))
        yield axes[0] if panels == 1 else axes[:panels]
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("svg", "png"):
            file = path.with_suffix(f".{suffix}")
            figure.savefig(file, metadata={"Date": None} if suffix == "svg" else None)
            made.append(file)
