"""Controls above a picture: live with ipywidgets, and over ready-made states where no kernel runs.

A picture is a template of HTML and SVG with fields in braces, a state the texts that fill them. Python fills the
template in Jupyter and ``explorer.js`` on a page: both show the same thing, because they fill in the same texts.
"""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from hessnb.errors import InputError

if TYPE_CHECKING:
    import ipywidgets

# The texts for the first choices (indices into their options): a state is what all its beginnings give together.
Fields = Callable[[tuple[int, ...]], Mapping[str, str]]

_FIELD = re.compile(r"\{(\w+)\}")
_numbers = itertools.count(1)  # of the page: one kernel makes one page


def escaped(text: str) -> str:
    """Return a text as HTML that a template can hold, too: a brace in it begins no field."""
    return html.escape(text).replace("{", "&#123;").replace("}", "&#125;")


@dataclass(frozen=True)
class Choice:
    """A control: its label and the options, all of them HTML, and which are ready-made (all, unless given).

    ``start`` is the option shown at first, a ready-made one; a ``slider`` is for options that are in an order.
    """

    label: str
    options: tuple[str, ...]
    ready: tuple[int, ...] = ()
    start: int = 0
    slider: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ready", tuple(self.ready) or tuple(range(len(self.options))))
        if not self.options:
            raise InputError(f"nothing to choose from for {self.label!r}: give at least one")
        if self.start not in self.ready:
            raise InputError(f"{self.label!r} starts with option {self.start}, which is not one of the ready-made ones")


class Explorer:
    """Shows itself: as live controls where a kernel runs, else as a page's own over the ready-made states.

    ``template``: HTML with fields in braces; one named ``said`` is required of each state, a sentence that is read out
    after each change. ``fields`` is asked for each beginning of a choice: what depends on the first control alone it
    gives for that one, and so it stands only once on a page. Texts are HTML.
    """

    def __init__(self, title: str, choices: Sequence[Choice], template: str, fields: Fields) -> None:
        self.title, self.choices, self.template = title, tuple(choices), template
        self._fields, self._known = fields, dict[tuple[int, ...], dict[str, str]]()

    def fields(self, chosen: tuple[int, ...]) -> dict[str, str]:
        """Return what the first choices (indices) add to a state; computed once."""
        if chosen not in self._known:
            self._known[chosen] = dict(self._fields(chosen))
        return self._known[chosen]

    def state(self, chosen: tuple[int, ...]) -> dict[str, str]:
        """Return the texts of a state, given by an index into the options of each choice."""
        return {name: text for n in range(len(chosen) + 1) for name, text in self.fields(chosen[:n]).items()}

    def picture(self, chosen: tuple[int, ...]) -> str:
        """Return a state as HTML: the template with its fields filled in."""
        texts = self.state(chosen)
        return _FIELD.sub(lambda field: texts[field[1]], self.template)

    @property
    def start(self) -> tuple[int, ...]:
        """The state that is shown at first."""
        return tuple(choice.start for choice in self.choices)

    def ready_made(self) -> Iterator[tuple[int, ...]]:
        """Yield the choices whose states go with a page."""
        return itertools.product(*(choice.ready for choice in self.choices))

    # -- in Jupyter ----------------------------------------------------------------------------------------------------

    @cached_property
    def live(self) -> ipywidgets.VBox:
        """The controls and the picture as ipywidgets: each change computes. Raises ImportError without ipywidgets."""
        import ipywidgets

        picture = ipywidgets.HTML()
        wide = {"style": {"description_width": "initial"}, "layout": {"width": "auto", "flex": "1 1 15em"}}
        controls = [
            (ipywidgets.SelectionSlider if choice.slider else ipywidgets.Dropdown)(
                description=html.unescape(choice.label),
                options=[(html.unescape(option), i) for i, option in enumerate(choice.options)],
                value=choice.start,
                **wide,
            )
            for choice in self.choices
        ]

        def show(_: object = None) -> None:
            chosen = tuple(control.value for control in controls)
            said = f'<p class="hessnb-said">{self.state(chosen)["said"]}</p>'
            picture.value = f'{_style()}<div class="hessnb-explorer">{said}{self.picture(chosen)}</div>'

        for control in controls:
            control.observe(show, "value")
        show()
        return ipywidgets.VBox(
            [
                ipywidgets.HBox(controls, layout={"flex_flow": "row wrap", "grid_gap": "0 1.5em", "max_width": "45em"}),
                picture,
            ]
        )

    # -- on a page -----------------------------------------------------------------------------------------------------

    def page(self) -> str:
        """Return HTML that needs nothing else: controls, the ready-made states, and the script that shows them."""
        name = f"hessnb-explorer-{next(_numbers)}"
        texts: dict[str, dict[str, str]] = {}
        for chosen in self.ready_made():
            positions = [choice.ready.index(i) for choice, i in zip(self.choices, chosen, strict=True)]
            for n in range(len(chosen) + 1):
                texts.setdefault(",".join(map(str, positions[:n])), self.fields(chosen[:n]))
        data = {
            "template": self.template,
            "options": [[html.unescape(choice.options[i]) for i in choice.ready] for choice in self.choices],
            "fields": {key: fields for key, fields in texts.items() if fields},
        }
        packed = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
        controls = "".join(_control(f"{name}-{i}", choice) for i, choice in enumerate(self.choices))
        return (
            f'{_style()}<div class="hessnb-explorer" id="{name}" role="group" aria-label="{html.escape(self.title)}">'
            f'<div class="hessnb-controls">{controls}</div>'
            f'<p class="hessnb-said" role="status">{self.state(self.start)["said"]}</p>'
            f'<div class="hessnb-picture">{self.picture(self.start)}</div>'
            f'<script type="application/json">{packed}</script>'
            f'<script>({_asset("explorer.js").strip()})(document.getElementById("{name}"))</script></div>'
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": self.title, "text/html": self.page()}
        with suppress(ImportError):  # the page's controls do without
            bundle |= self.live._repr_mimebundle_() | {"text/plain": self.title}
        return bundle


def _control(name: str, choice: Choice) -> str:
    label, start = f'<label for="{name}">{choice.label}</label>', choice.ready.index(choice.start)
    if choice.slider:
        return (
            f'<div>{label}<input type="range" id="{name}" min="0" max="{len(choice.ready) - 1}" step="1" '
            f'value="{start}" aria-valuetext="{choice.options[choice.start]}" autocomplete="off">'
            f'<span class="hessnb-value" aria-hidden="true">{choice.options[choice.start]}</span></div>'
        )
    options = "".join(
        f'<option value="{n}"{" selected" if n == start else ""}>{choice.options[i]}</option>'
        for n, i in enumerate(choice.ready)
    )
    return f'<div>{label}<select id="{name}" autocomplete="off">{options}</select></div>'


def _style() -> str:
    return f"<style>{_asset('explorer.css').strip()}</style>"


def _asset(name: str) -> str:
    return files("hessnb.widgets").joinpath(name).read_text(encoding="utf-8")
