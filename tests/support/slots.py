"""Which slot each state of a schedule takes, by walking through it: the truth for `magic.engine.costs`."""

from collections import Counter
from heapq import heappop, heappush

from magic.schedule import Drop, Load, Save


def placed(actions):
    """Each Save, Load and Drop with its slot: the lowest that is free when the state is saved."""
    slot_of: dict[int, int] = {}
    free: list[int] = []
    for action in actions:
        match action:
            case Save(t):
                slot_of[t] = heappop(free) if free else len(slot_of)
                yield action, slot_of[t]
            case Load(t):
                yield action, slot_of[t]
            case Drop(t):
                heappush(free, slot_of[t])
                yield action, slot_of.pop(t)


def uses(actions):
    """How often each slot is saved to, loaded from and dropped."""
    return Counter(slot for _, slot in placed(actions))
