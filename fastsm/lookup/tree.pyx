"""A tree of places in the order of their keys.

A B+tree without keys: a place is always that of the same record, and the record has the key. Nodes take only the memory
they use: 8.5 bytes per key, wherever new keys are inserted. A node with a single reference is changed in place; a
shared one is copied, together with the path to it (Driscoll, Sarnak, Sleator, Tarjan, JCSS 1989). So a reader that
holds a root keeps the tree as it was, at no cost.
"""

from libc.stdlib cimport free, malloc

from fastsm.lookup.sorting cimport compare_key, compare_places
from fastsm.lookup.table cimport prefetch

cdef extern from *:
    """
    #define fastsm_drop(count) __atomic_sub_fetch(count, 1, __ATOMIC_ACQ_REL)
    """
    uint32_t drop_user "fastsm_drop"(uint32_t *count) noexcept nogil

# ---- nodes ---------------------------------------------------------------------------------------------

cdef Node *new_node(uint32_t level, size_t room) noexcept nogil:
    cdef Node *node = <Node *>malloc(node_size(level, room))
    if node != NULL:
        node.users = 1
        node.count = 0
        node.room = <uint16_t>room
        node.level = level
    return node


cdef void hold(Node *node) noexcept nogil:
    """Adds a reference to a node, which may be NULL."""
    if node != NULL:
        add_user(&node.users)


cdef void release(Node *node) noexcept nogil:
    """Drops a reference; the last one frees the node, and what only that node refers to."""
    cdef uint32_t i
    if node == NULL or drop_user(&node.users):
        return
    if node.level:
        for i in range(node.count):
            if i + 1 < node.count:
                prefetch(children_of(node)[i + 1].node)
            release(children_of(node)[i].node)
    free(node)


# ---- search --------------------------------------------------------------------------------------------

cdef size_t lower_bound(
    Work *work, const uint64_t *places, size_t first, size_t stop, const uint8_t *key, size_t size
) noexcept nogil:
    """Returns the first position in [first, stop) whose key is not less than `key`; `stop` if there is none."""
    cdef size_t middle
    while first < stop:
        middle = first + (stop - first) / 2
        work.comparisons += 1
        if compare_key(work.arena + places[middle], key, size) < 0:
            first = middle + 1
        else:
            stop = middle
    return first


cdef size_t gallop(
    Work *work, const uint64_t *places, size_t first, size_t stop, const uint8_t *key, size_t size
) noexcept nogil:
    """Does the same as `lower_bound`, in O(log distance from `first`)."""
    cdef size_t step = 1
    while first + step <= stop:
        work.comparisons += 1
        if compare_key(work.arena + places[first + step - 1], key, size) >= 0:
            return lower_bound(work, places, first, first + step - 1, key, size)
        first += step
        step *= 2
    return lower_bound(work, places, first, stop, key, size)


cdef size_t child_for(Work *work, Node *node, size_t first, const uint8_t *key, size_t size) noexcept nogil:
    """Returns the last child whose least key is not greater than `key`, or `first`."""
    cdef Child *children = children_of(node)
    cdef size_t low = first + 1
    cdef size_t high = node.count
    cdef size_t middle
    while low < high:
        middle = low + (high - low) / 2
        work.comparisons += 1
        if compare_key(work.arena + children[middle].least, key, size) <= 0:
            low = middle + 1
        else:
            high = middle
    return low - 1


# ---- walk ----------------------------------------------------------------------------------------------

cdef void seek(Work *work, Cursor *cursor, Node *root, const uint8_t *key, size_t size, bint at_end) noexcept nogil:
    """Moves to the first place whose key is not less than `key`; without a key, to the start or the end."""
    cdef Node *node = root
    cdef size_t at
    cursor.depth = 0
    while node != NULL:
        if node.level == 0:
            if key == NULL:
                at = node.count if at_end else 0
            else:
                at = lower_bound(work, places_in(node), 0, node.count, key, size)
        elif key == NULL:
            at = node.count - 1 if at_end else 0
        else:
            at = child_for(work, node, 0, key, size)
        cursor.nodes[cursor.depth] = node
        cursor.at[cursor.depth] = <uint32_t>at
        cursor.depth += 1
        node = children_of(node)[at].node if node.level else NULL


cdef bint next_leaf(Cursor *cursor, int step) noexcept nogil:
    """Moves to the start of the next leaf (step 1), or to the end of the previous one (step -1)."""
    cdef int64_t depth = <int64_t>cursor.depth - 2
    cdef Node *node
    while depth >= 0:
        node = cursor.nodes[depth]
        if step > 0 and cursor.at[depth] + 1 < node.count:
            cursor.at[depth] += 1
            break
        if step < 0 and cursor.at[depth] > 0:
            cursor.at[depth] -= 1
            break
        depth -= 1
    if depth < 0:
        return False
    while depth + 1 < cursor.depth:
        node = children_of(cursor.nodes[depth])[cursor.at[depth]].node
        depth += 1
        cursor.nodes[depth] = node
        cursor.at[depth] = 0 if step > 0 else node.count - 1 if node.level else node.count
    return True


cdef void begin_walk(
    Work *work, Walk *walk, Node *root, const uint8_t *start, size_t start_size, const uint8_t *end, size_t end_size,
) noexcept nogil:
    """Begins a walk over [start, end); NULL: unbounded. `reverse` must be set already."""
    seek(work, &walk.low, root, start, start_size, False)
    seek(work, &walk.high, root, end, end_size, True)
    walk.done = root == NULL


cdef size_t walk_on(Walk *walk, size_t most, uint64_t **run) noexcept nogil:
    """Takes up to `most` adjacent places from the range, from its end in a reverse walk.

    `run` is set to the first of them, in the order of their keys. Returns 0 when nothing is left.
    """
    cdef Cursor *low = &walk.low
    cdef Cursor *high = &walk.high
    cdef Cursor *moving = high if walk.reverse else low
    cdef uint32_t last
    cdef uint32_t first, stop, taken
    cdef Node *leaf
    cdef bint both
    while not walk.done:
        last = moving.depth - 1
        leaf = moving.nodes[last]
        both = low.nodes[last] == high.nodes[last]
        first = low.at[last] if both or not walk.reverse else 0
        stop = high.at[last] if both or walk.reverse else leaf.count
        if first < stop:
            taken = <uint32_t>min(most, <size_t>(stop - first))
            if walk.reverse:
                high.at[last] = stop - taken
                run[0] = places_in(leaf) + (stop - taken)
            else:
                low.at[last] = first + taken
                run[0] = places_in(leaf) + first
            return taken
        walk.done = both or not next_leaf(moving, -1 if walk.reverse else 1)
    return 0


cdef bint owns_path(Walk *walk) noexcept nogil:
    """Returns whether the walk's leaf belongs to this tree alone, so that it may be changed."""
    cdef Cursor *moving = &walk.high if walk.reverse else &walk.low
    cdef uint32_t i
    for i in range(moving.depth):
        if not is_owned(moving.nodes[i]):
            return False
    return True


# ---- for stats and tests -------------------------------------------------------------------------------

cdef uint64_t tree_bytes(Node *root) noexcept nogil:
    """Returns how many bytes of memory the tree takes, without the overhead of `malloc`. O(leaves)."""
    cdef uint64_t total = 0
    cdef uint32_t i
    if root == NULL:
        return 0
    total = node_size(root.level, root.room)
    if root.level:
        for i in range(root.count):
            total += tree_bytes(children_of(root)[i].node)
    return total


cdef void check_tree(Node *root, const uint8_t *arena, uint64_t count) except *:
    """Asserts every invariant. O(places)."""
    cdef uint64_t last = 0
    assert check_node(root, arena, &last, 0) == count, f"the tree does not hold the {count} places that it counts"


cdef uint64_t check_node(Node *node, const uint8_t *arena, uint64_t *last, uint64_t least) except? 0:
    cdef uint64_t total = 0
    cdef uint64_t place
    cdef uint32_t i
    if node == NULL:
        return 0
    assert 0 < node.count <= node.room <= (INNER_ROOM if node.level else LEAF_ROOM)
    assert users_of(&node.users) > 0
    for i in range(node.count):
        if node.level:
            assert children_of(node)[i].node.level == node.level - 1
            place = children_of(node)[i].least
            if i and last[0]:
                assert compare_places(arena, last[0], place) < 0, "a child's least key is not above those before"
            total += check_node(children_of(node)[i].node, arena, last, place if i else least)
        else:
            place = places_in(node)[i]
            assert last[0] == 0 or compare_places(arena, last[0], place) < 0, "the keys do not rise"
            assert least == 0 or compare_places(arena, least, place) <= 0, "a key is below its child's least one"
            last[0] = place
            total += 1
    return total
