import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.patches import Circle
from matplotlib.text import Annotation
from torch import Tensor, nn

from hessnb import figures
from hessnb.errors import InputError
from hessnb.paper.attack_planes import attack_plane, told_apart

WEIGHTS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])


class Linear(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ WEIGHTS.T


def image(*pixels: float) -> Tensor:
    return torch.tensor(pixels, dtype=torch.float32).view(1, 1, 2, 2)


X, Y = image(1.0, 0.0, 0.0, 0.5), torch.tensor([0])
FIRST, SECOND = image(1.0, 2.0, 0.0, 0.5), image(1.0, 1.0, 0.0, 1.5)


def test_the_plane_holds_sample_and_both_ends() -> None:
    plane = attack_plane(Linear(), X, Y, FIRST, SECOND, n=27)
    assert plane.ends.tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert plane.positions[[13, 18, 23]].tolist() == pytest.approx([0.0, 0.5, 1.0])
    assert plane.losses[13, 13] == pytest.approx(float(F.cross_entropy(Linear()(X), Y)))
    assert plane.losses[23, 13] == pytest.approx(float(F.cross_entropy(Linear()(FIRST), Y)))
    assert plane.losses[18, 18] == pytest.approx(float(F.cross_entropy(Linear()(SECOND), Y)))
    # The network does not see the last pixel, along which the second axis lies, and the second class wins past 1 / 2.
    assert torch.equal(plane.losses, plane.losses[:, :1].expand(27, 27))
    assert plane.classes[:, 0].tolist() == [int(position > 0.55) for position in plane.positions]


@pytest.mark.parametrize("second", [X, X + 2 * (FIRST - X), X - (FIRST - X)])
def test_steps_on_one_line_span_no_plane(second: Tensor) -> None:
    with pytest.raises(InputError, match="span no plane"):
        attack_plane(Linear(), X, Y, FIRST, second)
    with pytest.raises(InputError, match="span no plane"):
        attack_plane(Linear(), X, Y, X, SECOND)


def test_told_apart_is_the_first_that_only_the_first_attack_makes_wrong() -> None:
    x = torch.cat([image(0, 1, 0, 0), X, X, X])  # the first is wrong before
    y = torch.zeros(4, dtype=torch.int64)
    wrong, kept = image(0, 1, 0, 0), X
    first, second = torch.cat([wrong, wrong, wrong, wrong]), torch.cat([kept, wrong, kept, kept])
    assert told_apart(Linear(), x, y, first, second) == 2
    assert told_apart(Linear(), x, y, second, first) == 1  # none: the first that is right
    assert told_apart(Linear(), x[:1], y[:1], first[:1], second[:1]) == 0  # nor is one right


def test_the_figure_shows_each_plane_with_its_steps_and_classes() -> None:
    plane = attack_plane(Linear(), X, Y, FIRST, SECOND, n=27)
    figure = figures.attack_planes({"A": plane, "B": plane}, ("one", "two"), {"A": "abc", "B": "xyz"})
    for axis, names in zip(figure.axes, ("ab", "xy"), strict=True):
        assert {text.get_text() for text in axis.texts} == {"", *names}  # the steps are arrows without a text
        assert sum(isinstance(patch, Circle) for patch in axis.patches) == 1
        at = {text.get_text(): text.get_position() for text in axis.texts}
        assert at[names[0]][0] < 0.5 < at[names[1]][0]
        wrong, right = np.asarray(axis.collections[0].get_facecolor())[:, :3] @ [0.299, 0.587, 0.114]
        assert right - wrong > 0.1  # told apart in grey
        arrows = [text.arrow_patch for text in axis.texts if isinstance(text, Annotation)]
        assert [arrow.get_linestyle() for arrow in arrows if arrow] == ["-", "--"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
    assert [line.get_linestyle() for line in legend.get_lines()] == ["-", "--"]
