"""Where labels go so that they do not cover each other."""

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart within [low, high], close to the wanted ones, in their order.

    Where there is no room for all, the gap is made smaller.
    """
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    placed = [0.0] * len(wanted)
    for group in _merged([wanted[place] for place in order], gap, low, high):
        for offset, position in group:
            placed[order[offset]] = position
    return placed


def _merged(
    wanted: list[float], gap: float, low: float, high: float
) -> list[list[tuple[int, float]]]:
    """Merge sorted positions into groups, each evenly spaced around its members' mean."""
    groups: list[list[int]] = []
    starts: list[float] = []
    for place in range(len(wanted)):
        groups.append([place])
        starts.append(_start(groups[-1], wanted, gap, low, high))
        while len(groups) > 1 and starts[-2] + gap * len(groups[-2]) > starts[-1] + 1e-9:
            groups[-2:] = [groups[-2] + groups[-1]]
            starts[-2:] = [_start(groups[-1], wanted, gap, low, high)]
    return [
        [(place, start + gap * k) for k, place in enumerate(group)]
        for group, start in zip(groups, starts, strict=True)
    ]


def _start(group: list[int], wanted: list[float], gap: float, low: float, high: float) -> float:
    length = gap * (len(group) - 1)
    middle = sum(wanted[place] for place in group) / len(group)
    return min(max(middle - length / 2, low), max(high - length, low))


def offsets(
    points: Sequence[tuple[float, float]],
    widths: Sequence[float],
    obstacles: Sequence[Box],
    area: tuple[float, float],
) -> list[tuple[float, float]]:
    """Where to write each point's label, as the offset of its left middle from the point.

    Greedy: of places on rings around the point, the nearest that covers no label, point or border.

    Args:
        points: x and y (downwards) in pixels.
        widths: the labels' widths in pixels.
        obstacles: what else should not be covered, in pixels.
        area: width and height of the plot in pixels.
    """
    taken = [*obstacles, *((x - 6, y - 6, x + 6, y + 6) for x, y in points)]
    found = []
    for point, width in zip(points, widths, strict=True):
        options = [_option(point, width, *ring) for ring in _rings()]
        best = min(options, key=lambda option: _cost(option[1], taken, area) + option[2])
        taken.append(best[1])
        found.append(best[0])
    return found


def _rings() -> list[tuple[float, float]]:
    return [(radius, turn * math.pi / 8) for radius in (18, 34, 52, 74, 100) for turn in range(16)]


def _option(
    point: tuple[float, float], width: float, radius: float, angle: float
) -> tuple[tuple[float, float], Box, float]:
    """Offset, box and preference (nearer is better) of a label on a ring around its point."""
    dx, dy = radius * math.cos(angle), radius * math.sin(angle)
    left = dx if dx > 1 else dx - width if dx < -1 else dx - width / 2
    x, y = point[0] + left, point[1] + dy
    return (left, dy), (x, y - 8, x + width, y + 8), radius / 10


def _cost(box: Box, taken: Sequence[Box], area: tuple[float, float]) -> float:
    outside = max(0, -box[0], -box[1], box[2] - area[0], box[3] - area[1])
    return 1000 * outside + sum(_overlap(box, other) for other in taken)


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0
