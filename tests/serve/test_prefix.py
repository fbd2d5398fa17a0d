"""The tree of sessions finds the longest beginning that any of them holds, and lets
the least useful one go first.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

from qwen3c.drivers.batch import CachedSession, common_prefix
from qwen3c.serve.prefix import Node, PrefixTree


class Held:
    """A session, as far as the tree looks at it."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)


def session(tokens: Sequence[int]) -> CachedSession:
    return cast(CachedSession, Held(tokens))


def nodes(tree: PrefixTree) -> list[tuple[Node, list[int]]]:
    """Every node with the tokens of its path."""
    found: list[tuple[Node, list[int]]] = []
    waiting: list[tuple[Node, list[int]]] = [(root, []) for root in tree._roots.values()]
    while waiting:
        node, before = waiting.pop()
        path = before + node.edge
        found.append((node, path))
        waiting += [(child, path) for child in node.children.values()]
    return found


def check(tree: PrefixTree) -> None:
    """Leaves hold sessions with the tokens of their paths, inner nodes branch, and no namespace is empty."""
    for node, path in nodes(tree):
        if node.parent is None:
            assert node.children and not node.edge
        elif node.children:
            assert node.session is None and len(node.children) > 1
        else:
            assert node.session is not None and node.session.tokens == path and node in tree._leaves
        for first, child in node.children.items():
            assert child.edge[0] == first and child.parent is node and child.used <= node.used
    assert len(tree) == sum(node.session is not None for node, _ in nodes(tree))


def test_a_random_tree_finds_what_a_search_of_all_sessions_finds() -> None:
    draw = random.Random(1)
    for _ in range(60):
        tree, held = PrefixTree(), list[tuple[str, list[int]]]()
        for _ in range(60):
            namespace = draw.choice(["", "a"])
            tokens = [draw.randrange(3) for _ in range(draw.randrange(1, 12))]
            if draw.random() < 0.15 and len(tree):
                assert tree.evict()
                held = [
                    (ns, t)
                    for ns, t in held
                    if any(
                        n.session and n.session.tokens == t and _namespace(tree, n) == ns
                        for n, _ in nodes(tree)
                    )
                ]
            elif draw.random() < 0.6:
                tree.insert(namespace, session(tokens))
                held.append((namespace, tokens))
            check(tree)
            wanted = [draw.randrange(3) for _ in range(draw.randrange(1, 12))]
            best = max((common_prefix(t, wanted) for ns, t in held if ns == namespace), default=0)
            found, n = tree.find(namespace, wanted)
            assert n == best
            assert (found is None) == (n == 0) and (found is None or found.tokens[:n] == wanted[:n])


def _namespace(tree: PrefixTree, node: Node) -> str:
    while node.parent is not None:
        node = node.parent
    return next(name for name, root in tree._roots.items() if root is node)


def test_a_namespace_does_not_see_another() -> None:
    tree = PrefixTree()
    tree.insert("a", session([1, 2, 3]))
    assert tree.find("b", [1, 2, 3]) == (None, 0)
    assert tree.find("a", [1, 2, 3])[1] == 3


def test_a_session_that_goes_on_takes_the_place_of_its_beginning() -> None:
    tree = PrefixTree()
    first, longer = session([1, 2]), session([1, 2, 3])
    tree.insert("", first)
    tree.insert("", longer)
    assert len(tree) == 1 and tree.find("", [1, 2])[0] is longer
    tree.insert("", session([1]))
    assert len(tree) == 1


def test_the_least_recently_used_goes_first() -> None:
    tree = PrefixTree()
    sessions = [session([9, i]) for i in range(4)]
    for one in sessions:
        tree.insert("", one)
    tree.find("", [9, 0])
    order = []
    while len(tree):
        before = {id(n.session) for n, _ in nodes(tree) if n.session}
        tree.evict()
        gone = before - {id(n.session) for n, _ in nodes(tree) if n.session}
        order += [i for i, one in enumerate(sessions) if id(one) in gone]
    assert order == [1, 2, 3, 0]
    assert not tree.evict() and not tree._roots


def test_nothing_keeps_an_evicted_session() -> None:
    import weakref

    tree = PrefixTree()
    one: Any = session([1, 2, 3])
    watched = weakref.ref(one)
    tree.insert("", one)
    del one
    assert watched() is not None
    tree.evict()
    assert watched() is None
