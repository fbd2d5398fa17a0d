"""What earlier requests left in the KV cache: a radix tree of sessions, exact to the token.

    root of a namespace --[edge: token ids]--> node --[edge]--> leaf: a session of all tokens on its path

Every leaf holds a session and no inner node does: a session serves any beginning of its tokens, by fork() and
rewind(). Namespaces do not see each other, so that nobody learns from the speed of an answer what others have
asked (CVE-2025-46570). Edges are compared token by token, never by hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..drivers.batch import CachedSession, common_prefix


@dataclass(eq=False)
class Node:
    """A point of the tree. edge: the token ids between its parent and it. used: when it was last of use."""

    edge: list[int]
    parent: Node | None = None
    children: dict[int, Node] = field(default_factory=dict)  # by the first token of their edges
    session: CachedSession | None = None
    used: int = 0

    def touch(self, now: int) -> None:
        """This node and all above it are of use now."""
        node: Node | None = self
        while node is not None:
            node.used = now
            node = node.parent


class PrefixTree:
    """Sessions by their tokens. It does not lock: the engine thread alone uses it."""

    def __init__(self) -> None:
        self._roots: dict[str, Node] = {}
        self._leaves: set[Node] = set()
        self._now = 0

    def __len__(self) -> int:
        """How many sessions it holds."""
        return len(self._leaves)

    def find(self, namespace: str, tokens: Sequence[int]) -> tuple[CachedSession | None, int]:
        """(a session that holds the longest beginning of `tokens` that any does, how many tokens that is)."""
        node = self._roots.get(namespace)
        if node is None:
            return None, 0
        node, depth, _ = self._descend(node, tokens)
        if depth == 0:
            return None, 0
        while node.session is None:
            node = max(node.children.values(), key=lambda child: child.used)
        self._now += 1
        node.touch(self._now)
        return node.session, depth

    def insert(self, namespace: str, session: CachedSession) -> None:
        """Keep a session, which from now on belongs to the tree; one that holds nothing new is let go."""
        tokens = session.tokens
        if not tokens:
            return
        root = self._roots.setdefault(namespace, Node([]))
        node, depth, matched = self._descend(root, tokens)
        self._now += 1
        if depth == len(tokens):
            node.touch(self._now)
            return
        if node.session is not None and matched == len(node.edge):
            # all of its tokens are a beginning of the new session's, which takes its place
            node.edge, node.session = node.edge + tokens[depth:], session
            node.touch(self._now)
            return
        if matched < len(node.edge):
            node = self._split(node, matched)
        leaf = Node(tokens[depth:], node, session=session)
        node.children[leaf.edge[0]] = leaf
        self._leaves.add(leaf)
        leaf.touch(self._now)

    def evict(self) -> bool:
        """Let go of the session that was of no use for the longest time; False if there is none."""
        if not self._leaves:
            return False
        leaf = min(self._leaves, key=lambda node: node.used)
        self._leaves.remove(leaf)
        leaf.session = None
        self._prune(leaf)
        return True

    def clear(self) -> None:
        """Let go of all."""
        for leaf in self._leaves:
            leaf.session = None  # nodes refer to each other, and would keep it until the collector comes by
        self._roots.clear()
        self._leaves.clear()

    def _descend(self, node: Node, tokens: Sequence[int]) -> tuple[Node, int, int]:
        """(the deepest node whose edge `tokens` enters, tokens matched in all,
        tokens matched of that edge).
        """
        depth, matched = 0, len(node.edge)
        while depth < len(tokens) and matched == len(node.edge):
            child = node.children.get(tokens[depth])
            if child is None:
                break
            matched = common_prefix(child.edge, tokens[depth : depth + len(child.edge)])
            node, depth = child, depth + matched
        return node, depth, matched

    def _split(self, node: Node, at: int) -> Node:
        """A new node in the middle of the edge that leads to `node`, after `at` of its tokens."""
        assert node.parent is not None
        middle = Node(node.edge[:at], node.parent, used=node.used)
        node.parent.children[node.edge[0]] = middle
        node.edge, node.parent = node.edge[at:], middle
        middle.children[node.edge[0]] = node
        return middle

    def _prune(self, node: Node) -> None:
        """Take a node without session and children out, and join what it leaves with a single child."""
        parent = node.parent
        while parent is not None and not node.children and node.session is None:
            del parent.children[node.edge[0]]
            node, parent = parent, parent.parent
        if parent is None:
            if not node.children:
                self._roots = {name: root for name, root in self._roots.items() if root is not node}
        elif len(node.children) == 1 and node.session is None:
            (child,) = node.children.values()
            child.edge, child.parent = node.edge + child.edge, parent
            parent.children[child.edge[0]] = child
