"""The scoreboard and the page of claims, as Markdown that is generated whenever the book is built."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from pathlib import Path

from hessnb.paper.claims import Assessment, Question, Tested, assess
from hessnb.paper.evidence import STATISTICS
from hessnb.paper.tables import markdown
from hessnb.paper.verdicts import Part, Verdict

QUESTIONS: dict[Question, str] = {
    "Q1": "Where training with large batches ends",
    "Q2": "Robustness against the batch size",
    "Q3": "Adversarial training, and the Hessian in the input",
}

_MARKS = {
    Verdict.HOLDS: "✓",
    Verdict.IN_PART: "◐",
    Verdict.FAILS: "✗",
    Verdict.UNDECIDED: "?",
    Verdict.MISSING: "·",
}

# What is said of one and of several.
_WORDS = {
    Verdict.HOLDS: ("holds", "hold"),
    Verdict.IN_PART: ("holds in part", "hold in part"),
    Verdict.FAILS: ("does not hold", "do not hold"),
    Verdict.UNDECIDED: ("is not decided", "are not decided"),
}
_NOT_MEASURED = ("is not measured yet", "are not measured yet")
_NO_NUMBERS = ("lacks numbers", "lack numbers")


def generated(record: Path, chapters: Collection[str]) -> dict[str, str]:
    """Return the generated files by name, from the record's folder; ``chapters`` are the pages that can be linked."""
    assessed = assess(record)
    return {
        "scoreboard.md": counts(assessed),
        **{f"scoreboard_{q}.md": of_question([a for a in assessed if a.claim.question == q]) for q in QUESTIONS},
        "claims.md": details(assessed, chapters),
        "statistics.md": statistics_list(),
    }


def counts(assessed: Sequence[Assessment]) -> str:
    """Return how many claims have which verdict, by question, here and in the paper's own numbers."""
    rows = []
    for name in (*QUESTIONS, "All"):
        chosen = [a for a in assessed if name in ("All", a.claim.question)]
        for where, verdicts in (
            ("measured here", [a.ours.verdict for a in chosen]),
            ("in the paper's own numbers", [a.papers.verdict for a in chosen]),
        ):
            rows.append((name, where, *(str(verdicts.count(v)) for v in Verdict), str(len(chosen))))
    return _plain(("Question", "", *(f"{_MARKS[v]} {v}" for v in Verdict), "Claims"), rows)


def of_question(assessed: Sequence[Assessment]) -> str:
    """Return what was found on one question: a sentence on ours, one on the paper's numbers, and the claims."""
    rows = [
        (f"[{a.claim.title}](#claim-{a.claim.id})", _shown(a.ours.verdict) + _scale(a.ours), _papers_verdict(a.papers))
        for a in assessed
    ]
    table = _plain(("Claim", "Measured here", "In the paper's numbers"), rows)
    ours, papers = ({a.claim.title: getattr(a, who).verdict for a in assessed} for who in ("ours", "papers"))
    here, there = ([title for title, found in some.items() if found is Verdict.FAILS] for some in (ours, papers))
    return (
        f"**Found so far.** Of the {len(assessed)} claims on this question, "
        f"{_in_words(list(ours.values()), _NOT_MEASURED, here)}. In the numbers that the paper itself prints, "
        f"{_in_words(list(papers.values()), _NO_NUMBERS, there)}.\n\n{table}"
    )


def _in_words(found: Sequence[Verdict], missing: tuple[str, str], failing: Sequence[str] = ()) -> str:
    """Return the counts in words, with the titles of the ``failing``; ``missing`` is said of what has no numbers."""
    named = f" (*{'*, *'.join(failing)}*)" if failing else ""
    told = []
    for verdict, (one, many) in (_WORDS | {Verdict.MISSING: missing}).items():
        if count := found.count(verdict):
            told.append(f"{count} {one if count == 1 else many}{named if verdict is Verdict.FAILS else ''}")
    return " and ".join([", ".join(told[:-1]), told[-1]] if len(told) > 1 else told)


def details(assessed: Sequence[Assessment], chapters: Collection[str]) -> str:
    """Return every claim with its statistic, verdicts, what is missing, and, folded, the numbers of each part."""
    parts = []
    for question, title in QUESTIONS.items():
        parts.append(f"## {question}. {title}\n")
        parts += [_claim(a, chapters) for a in assessed if a.claim.question == question]
    return "\n".join(parts)


def statistics_list() -> str:
    """Return the statistics and what each is, from the code's own words, as a definition list."""
    told = {name: (inspect.getdoc(function) or "").replace("\n", " ") for name, function in STATISTICS.items()}
    return "\n".join(f"`{name}`\n: {text}\n" for name, text in told.items())


def _claim(a: Assessment, chapters: Collection[str]) -> str:
    claim = a.claim
    chapter = f"{{doc}}`/notebooks/{claim.chapter}`" if claim.chapter in chapters else "the chapter is not written yet"
    lines = [f"(claim-{claim.id})=", f"### {claim.title}", "", claim.sentence, ""]
    lines += [f"- **The paper:** {claim.place}. **Here:** {chapter}."]
    lines += [f"- **Taken as:** {claim.reading}"] if claim.reading else []
    lines += [
        f"- **Statistic:** `{claim.statistic}`, {_region(a)}; on {', '.join(f'`{name}`' for name in claim.frames)}."
    ]
    lines += [f"- **In the paper's numbers:** {_papers_verdict(a.papers)}{_counted(a.papers)}"]
    lines += [f"- **Measured here:** {_shown(a.ours.verdict)}{_scale(a.ours)}{_counted(a.ours)}"]
    lines += [f"- **Missing here:** {missing(a.ours)}"] if missing(a.ours) else []
    lines += [""]
    rows = [
        (where, part.network, part.label, _interval(part), str(part.n), _part_verdict(part, found), part.numbers or "–")
        for where, tested in (("paper's", a.papers), ("ours", a.ours))
        for part, found in tested.parts
        if part.n
    ]
    if rows:
        header = ("Numbers", "Network", "Part", "Statistic (95 %)", "n", "Verdict", "Computed from")
        lines += ["```{dropdown} The numbers", markdown(header, rows), "```", ""]
    return "\n".join(lines)


def missing(tested: Tested) -> str:
    """Return what keeps parts of a claim without a verdict, and of which networks; empty when all have one."""
    if not tested.parts:
        return "everything: the record holds none of these numbers."
    told: dict[str, dict[str, None]] = {}
    for part, found in tested.parts:
        if found in (Verdict.UNDECIDED, Verdict.MISSING):
            reason = part.lacks or "measured, but the interval leaves it open"
            told.setdefault(reason, {})[part.network] = None
    return "; ".join(f"{', '.join(networks)}: {reason}" for reason, networks in told.items()) + ("." if told else "")


def _plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table without number and caption, whose first column may wrap on a narrow screen."""
    return f"```{{table}}\n:class: scoreboard\n:align: left\n\n{markdown(header, rows)}\n```\n"


def _region(a: Assessment) -> str:
    low, high = a.claim.holds.low, a.claim.holds.high
    if low is None or high is None:
        return f"claimed to be above {low:g}" if high is None else f"claimed to be below {high:g}"
    return f"claimed to be between {low:g} and {high:g}"


def _interval(part: Part) -> str:
    return f"{part.interval:.3g}".replace("-", "−") if part.interval else part.lacks


def _part_verdict(part: Part, found: Verdict) -> str:
    return "too few" if found is Verdict.MISSING else _shown(found)


def _shown(verdict: Verdict) -> str:
    return f"{_MARKS[verdict]} {verdict}"


def _papers_verdict(tested: Tested) -> str:
    """Return the verdict on the paper's numbers, of which there may be none, or too few."""
    if tested.verdict is not Verdict.MISSING:
        return _shown(tested.verdict)
    return f"{_MARKS[Verdict.MISSING]} {'too few to tell' if tested.parts else 'no numbers printed'}"


def _scale(tested: Tested) -> str:
    """Return where the numbers come from, unless all have the paper's scale."""
    return f" ({'; '.join(tested.profiles)})" if set(tested.profiles) - {"paper"} else ""


def _counted(tested: Tested) -> str:
    total = len(tested.parts)
    if total < 2:
        return "."
    told = _in_words([found for _, found in tested.parts], _NO_NUMBERS)
    return f": of {total} parts {told}."
