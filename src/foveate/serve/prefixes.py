"""What the LLM has read of conversations: its keys and values, for those that begin in the same way.

A tree: a node is a stretch of a conversation that follows its parent's. One stretch ends with a picture, the
last of a conversation, so that all questions about it share what was read of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor

from foveate.ask.context import Passage
from foveate.picture.account import Account

LEAST = 64  # tokens without a picture that are worth finding again
States = list[tuple[Tensor, Tensor]]  # per layer keys and values (heads, T, width)


@dataclass(frozen=True)
class Seen:
    """A picture that the LLM has read.

    Attributes:
        key: all that its visual tokens depend on.
        start, end: its first placeholder and the one after its last, from the conversation's start.
        account: where the method looked.
        tokens: visual tokens that the LLM got.
    """

    key: Hashable
    start: int
    end: int
    account: Account
    tokens: int


@dataclass(eq=False)
class Node:
    """A stretch of a conversation.

    Attributes:
        ids: its tokens.
        visible: per token whether the LLM got it; not the visual ones that a connector dropped.
        states: of the visible ones.
        seen: its pictures.
    """

    ids: list[int]
    visible: list[bool]
    states: States
    seen: list[Seen]
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    used: int = 0

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for layer in self.states for part in layer)


@dataclass(frozen=True)
class Known:
    """The beginning of a conversation that was read before.

    Attributes:
        tokens: how many; dropped ones count.
        nodes: the stretches, and how many tokens of each.
    """

    tokens: int = 0
    nodes: tuple[tuple[Node, int], ...] = ()

    @property
    def visible(self) -> list[bool]:
        return [keep for node, taken in self.nodes for keep in node.visible[:taken]]

    @property
    def seen(self) -> list[Seen]:
        return [one for node, _ in self.nodes for one in node.seen if one.end <= self.tokens]

    @property
    def columns(self) -> int:
        """Visible tokens."""
        return sum(sum(node.visible[:taken]) for node, taken in self.nodes)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Writes the states of the visible tokens in one layer to tensors (heads, T, width)."""
        at = 0
        for node, taken in self.nodes:
            count = sum(node.visible[:taken])
            for held, part in zip((keys, values), node.states[layer], strict=True):
                held[:, at : at + count] = part[:, :count]
            at += count


class Prefixes:
    """Beginnings of conversations; of one thread.

    Args:
        most: bound in bytes on what is kept; what was used longest ago is dropped first.
    """

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self.root = Node([], [], [], [])
        self._clock = count(1)

    def find(self, prompt: Passage) -> Known:
        """What is known of a prompt; its last token never counts."""
        known = self._walk(prompt.ids, prompt.pictures, prompt.places, len(prompt.ids) - 1)
        return known if known.tokens >= LEAST or known.seen else Known()

    def keep(self, ids: Sequence[int], visible: Sequence[bool], seen: Sequence[Seen], states: States) -> None:
        """Keeps a conversation as far as it was read.

        Args:
            ids: its tokens.
            visible: per token whether the LLM got it.
            seen: its pictures.
            states: per layer keys and values (heads, T, width) of the visible ones; copied.
        """
        if not self.most:
            return
        pictures, places = [one.key for one in seen], [(one.start, one.end) for one in seen]
        known = self._walk(ids, pictures, places, len(ids))
        whole = [node for node, taken in known.nodes if taken == len(node.ids)]
        node, start = whole[-1] if whole else self.root, sum(len(node.ids) for node in whole)
        if known.tokens == len(ids):
            return
        for end in (seen[-1].end if seen else 0, len(ids)):
            if end > start:
                node = self._add(node, start, end, ids, visible, seen, states)
                start = end
        self._forget()

    def clear(self) -> None:
        self.root.children.clear()
        self.bytes = 0

    def _add(
        self,
        parent: Node,
        start: int,
        end: int,
        ids: Sequence[int],
        visible: Sequence[bool],
        seen: Sequence[Seen],
        states: States,
    ) -> Node:
        first, last = sum(visible[:start]), sum(visible[:end])
        node = Node(
            list(ids[start:end]),
            list(visible[start:end]),
            [(keys[:, first:last].clone(), values[:, first:last].clone()) for keys, values in states],
            [one for one in seen if start < one.end <= end],
            parent,
            used=next(self._clock),
        )
        parent.children.append(node)
        self.bytes += node.bytes
        return node

    def _walk(
        self,
        ids: Sequence[int],
        pictures: Sequence[Hashable],
        places: Sequence[tuple[int, int]],
        most: int,
    ) -> Known:
        """The known nodes along a conversation, up to `most` of its tokens."""
        node, at, nodes = self.root, 0, []
        now, ours = next(self._clock), dict(zip(places, pictures, strict=True))
        while at < most:
            found = ((_alike(child, at, ids, ours), i) for i, child in enumerate(node.children))
            taken, i = max(found, default=(0, 0))
            taken = min(taken, most - at)
            taken = next((max(s - at, 0) for s, e in places if s < at + taken < e), taken)
            if not taken:
                break
            node = node.children[i]
            node.used = now
            nodes.append((node, taken))
            at += taken
            if taken < len(node.ids):
                break
        return Known(at, tuple(nodes))

    def _forget(self) -> None:
        """Drops the stretches used longest ago, the last of a conversation first, down to the bound."""
        while self.bytes > self.most:
            leaves = [node for node in _below(self.root) if not node.children]
            oldest = min(leaves, key=lambda node: node.used)
            assert oldest.parent is not None
            oldest.parent.children.remove(oldest)
            self.bytes -= oldest.bytes


def _below(node: Node) -> Iterator[Node]:
    waiting = list(node.children)
    while waiting:
        child = waiting.pop()
        waiting += child.children
        yield child


def _alike(node: Node, at: int, ids: Sequence[int], pictures: Mapping[tuple[int, int], Hashable]) -> int:
    """How many tokens of a node are those of a conversation from `at` on.

    `pictures`: the conversation's, by their first placeholder and the one after their last.
    """
    if node.ids[0] != ids[at]:
        return 0
    most = min(len(node.ids), len(ids) - at)
    for one in node.seen:
        if pictures.get((one.start, one.end)) != one.key:
            most = min(most, one.start - at)
    for start, _ in pictures:
        if at <= start < at + most and not any(one.start == start for one in node.seen):
            most = start - at
    most = max(most, 0)
    if node.ids[:most] == list(ids[at : at + most]):
        return most
    return next(i for i in range(most) if node.ids[i] != ids[at + i])
