"""What the store in Redis does without a Redis."""

from heapq import heappush

from chatd.store.redis.store import pop_names


def test_names_that_a_scan_gives_twice():
    """Each name is taken once, in order, also if the copies would fall into two pieces."""
    heap = []
    for name in "dacbcaddb":
        heappush(heap, name)
    assert [pop_names(heap, 3), pop_names(heap, 3), pop_names(heap, 3)] == [["a", "b", "c"], ["d"], []]
