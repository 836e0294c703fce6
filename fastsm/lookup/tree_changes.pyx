"""Changes of a tree of places.

Changes come in batches of sorted places, so many of them cost little more than a merge. If an operation gets no memory,
the tree is lost, and the caller builds a new one: the tree is derived from the table.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove

from fastsm.disk.format cimport record_key, record_key_size
from fastsm.lookup.sorting cimport compare_places
from fastsm.lookup.tree cimport (
    DEEPEST, INNER_ROOM, LEAF_ROOM, Child, add_user, child_for, children_of, gallop, hold, is_owned, lower_bound,
    new_node, node_size, places_in, release,
)


cdef int reserve(Children *children, size_t more) noexcept nogil:
    cdef Child *items
    cdef size_t room
    if children.count + more <= children.room:
        return 0
    room = children.count + more + children.room / 2
    items = <Child *>realloc(children.items, room * sizeof(Child))
    if items == NULL:
        return -1
    children.items = items
    children.room = room
    return 0


cdef void release_all(Children *children) noexcept nogil:
    cdef size_t i
    for i in range(children.count):
        release(children.items[i].node)
    free(children.items)


# Each of these functions takes over a reference to a node, and adds the resulting nodes to `out`, which has room for at
# least one more child. They return -1 if there is no memory; the reference is released even then.

cdef int change(
    Work *work, Node *node, const uint64_t *batch, size_t count, bint removing, Children *out
) noexcept nogil:
    if node.level:
        return change_inner(work, node, batch, count, removing, out)
    if removing:
        return remove_from_leaf(work, node, batch, count, out)
    return insert_into_leaf(work, node, batch, count, out)


cdef int change_inner(
    Work *work, Node *node, const uint64_t *batch, size_t count, bint removing, Children *out
) noexcept nogil:
    cdef Children list
    cdef Child *children = children_of(node)
    cdef bint owned = is_owned(node)
    cdef size_t taken = 0           # children that were moved to the list
    cdef size_t first = 0
    cdef size_t stop, child
    cdef int failed
    list.items = NULL
    list.count = list.room = 0
    failed = reserve(&list, node.count + 8)
    while first < count and not failed:
        child = child_for(work, node, taken, record_key(work.arena + batch[first]),
                          record_key_size(work.arena + batch[first]))
        move_children(children, taken, child, owned, &list)
        stop = count
        if child + 1u < node.count:
            stop = gallop(work, batch, first + 1, count, record_key(work.arena + children[child + 1].least),
                          record_key_size(work.arena + children[child + 1].least))
        if not owned:
            add_user(&children[child].node.users)
        taken = child + 1
        failed = change(work, children[child].node, batch + first, stop - first, removing, &list)
        if not failed:
            if removing:
                join_last(&list)
            failed = reserve(&list, node.count - taken + 8)
        first = stop
    if failed:
        if owned:
            for child in range(taken, node.count):
                release(children[child].node)
            free(node)
        else:
            release(node)
        release_all(&list)
        return -1
    move_children(children, taken, node.count, owned, &list)
    failed = pack(&list, node.level, out)
    if owned:
        free(node)
    else:
        release(node)
    return failed


cdef void move_children(Child *children, size_t first, size_t stop, bint owned, Children *list) noexcept nogil:
    """Moves unchanged children to a list, which has room for them."""
    cdef size_t i
    for i in range(first, stop):
        if not owned:
            add_user(&children[i].node.users)
        list.items[list.count] = children[i]
        list.count += 1


cdef int pack(Children *list, uint32_t level, Children *out) noexcept nogil:
    """Groups children into nodes as evenly as possible. Takes over the children, and the list's memory."""
    cdef size_t pieces = (list.count + INNER_ROOM - 1) / INNER_ROOM
    cdef size_t first = 0
    cdef size_t piece, size
    cdef Node *node
    cdef int failed = reserve(out, pieces + 1)
    for piece in range(pieces):
        if failed:
            break
        size = (list.count - first) / (pieces - piece)
        node = new_node(level, size)
        if node == NULL:
            failed = -1
            break
        memcpy(children_of(node), list.items + first, size * sizeof(Child))
        node.count = <uint16_t>size
        out.items[out.count].node = node
        out.items[out.count].least = list.items[first].least
        out.count += 1
        first += size
    for piece in range(first, list.count):  # reached only after a failure
        release(list.items[piece].node)
    free(list.items)
    return failed


cdef int insert_into_leaf(
    Work *work, Node *leaf, const uint64_t *batch, size_t count, Children *out
) noexcept nogil:
    cdef uint64_t *places = places_in(leaf)
    cdef uint64_t *merged
    cdef size_t total = 0
    cdef size_t first = 0
    cdef size_t i, stop
    cdef const uint8_t *record
    cdef int failed
    if count == 1 and leaf.count < leaf.room and is_owned(leaf):
        insert_one(work, leaf, batch[0])
        push(out, leaf)
        return 0
    merged = <uint64_t *>malloc((leaf.count + count) * sizeof(uint64_t))
    if merged == NULL:
        release(leaf)
        return -1
    for i in range(count):
        record = work.arena + batch[i]
        stop = gallop(work, places, first, leaf.count, record_key(record), record_key_size(record))
        memcpy(merged + total, places + first, (stop - first) * sizeof(uint64_t))
        total += stop - first
        first = stop
        if first < leaf.count and is_same(work, places[first], batch[i]):
            first += 1
        merged[total] = batch[i]
        total += 1
    memcpy(merged + total, places + first, (leaf.count - first) * sizeof(uint64_t))
    total += leaf.count - first
    work.added += <int64_t>total - <int64_t>leaf.count
    if total <= leaf.room and is_owned(leaf):
        memcpy(places, merged, total * sizeof(uint64_t))
        leaf.count = <uint16_t>total
        push(out, leaf)
        failed = 0
    else:
        release(leaf)
        failed = make_leaves(merged, total, out)
    free(merged)
    return failed


cdef inline bint is_same(Work *work, uint64_t a, uint64_t b) noexcept nogil:
    work.comparisons += 1
    return compare_places(work.arena, a, b) == 0


cdef inline void push(Children *out, Node *leaf) noexcept nogil:
    out.items[out.count].node = leaf
    out.items[out.count].least = places_in(leaf)[0]
    out.count += 1


cdef void insert_one(Work *work, Node *leaf, uint64_t place) noexcept nogil:
    """Inserts a place into an unshared leaf that has room."""
    cdef uint64_t *places = places_in(leaf)
    cdef const uint8_t *record = work.arena + place
    cdef size_t at = lower_bound(work, places, 0, leaf.count, record_key(record), record_key_size(record))
    if at < leaf.count and is_same(work, places[at], place):
        places[at] = place
        return
    memmove(places + at + 1, places + at, (leaf.count - at) * sizeof(uint64_t))
    places[at] = place
    leaf.count += 1
    work.added += 1


cdef int make_leaves(const uint64_t *places, size_t count, Children *out) noexcept nogil:
    """Makes leaves of sorted places, as evenly as possible, with room for a few more each; -1 if there is no memory."""
    cdef size_t pieces = (count + LEAF_ROOM - 1) / LEAF_ROOM
    cdef size_t first = 0
    cdef size_t piece, size
    cdef Node *leaf
    if reserve(out, pieces + 1) < 0:
        return -1
    for piece in range(pieces):
        size = (count - first) / (pieces - piece)
        leaf = new_node(0, min(<size_t>LEAF_ROOM, size + size / 16 + 1))
        if leaf == NULL:
            return -1
        memcpy(places_in(leaf), places + first, size * sizeof(uint64_t))
        leaf.count = <uint16_t>size
        push(out, leaf)
        first += size
    return 0


cdef int remove_from_leaf(
    Work *work, Node *leaf, const uint64_t *batch, size_t count, Children *out
) noexcept nogil:
    """Removes these places, if they are still in the leaf; a newer place of a key stays."""
    cdef uint64_t *places = places_in(leaf)
    cdef uint64_t *kept
    cdef Node *other = leaf
    cdef size_t total = 0
    cdef size_t first = 0
    cdef size_t i, stop
    cdef const uint8_t *record
    if not is_owned(leaf):
        other = new_node(0, leaf.count)
        if other == NULL:
            release(leaf)
            return -1
    kept = places_in(other)
    for i in range(count):
        stop = first
        if first == leaf.count or places[first] != batch[i]:  # usually adjacent places are removed
            record = work.arena + batch[i]
            stop = gallop(work, places, first, leaf.count, record_key(record), record_key_size(record))
        memmove(kept + total, places + first, (stop - first) * sizeof(uint64_t))
        total += stop - first
        first = stop
        if first < leaf.count and places[first] == batch[i]:
            first += 1
    memmove(kept + total, places + first, (leaf.count - first) * sizeof(uint64_t))
    total += leaf.count - first
    work.added -= <int64_t>leaf.count - <int64_t>total
    other.count = <uint16_t>total
    if other != leaf:
        release(leaf)
    if total == 0:
        release(other)
    else:
        push(out, shrunk(other))
    return 0


cdef Node *shrunk(Node *node) noexcept nogil:
    """Frees the excess memory of an unshared node that has become much smaller."""
    cdef Node *smaller
    if node.count >= node.room / 2u:
        return node
    smaller = <Node *>realloc(node, node_size(node.level, node.count))
    if smaller == NULL:
        return node
    smaller.room = smaller.count
    return smaller


cdef void join_last(Children *list) noexcept nogil:
    """Joins the last two children if both are unshared and small, so that no nearly empty nodes remain."""
    cdef Node *a
    cdef Node *b
    cdef Node *joined
    cdef size_t size, unit
    if list.count < 2:
        return
    a = list.items[list.count - 2].node
    b = list.items[list.count - 1].node
    size = <size_t>a.count + b.count
    unit = sizeof(Child) if a.level else sizeof(uint64_t)
    if size > (INNER_ROOM if a.level else LEAF_ROOM) / 2u or not is_owned(a) or not is_owned(b):
        return
    joined = <Node *>realloc(a, node_size(a.level, size))
    if joined == NULL:
        return
    memcpy(<uint8_t *>(joined + 1) + joined.count * unit, b + 1, b.count * unit)
    joined.count = joined.room = <uint16_t>size
    list.items[list.count - 2].node = joined
    list.count -= 1
    free(b)


cdef int change_root(
    Work *work, Node **root, const uint64_t *places, size_t count, bint removing
) noexcept nogil:
    """Changes a tree whose root reference the caller gives up; on -1 (no memory) there is no tree any more."""
    cdef Children list
    cdef Node *node = root[0]
    cdef uint32_t level = 0
    cdef int failed = 0
    root[0] = NULL
    list.items = NULL
    list.count = list.room = 0
    if reserve(&list, 8) < 0:
        release(node)
        return -1
    if node != NULL:
        level = node.level
        failed = change(work, node, places, count, removing, &list)
    elif not removing:
        work.added += <int64_t>count
        failed = make_leaves(places, count, &list)
    if failed:
        release_all(&list)
        return -1
    return make_root(&list, level, root)


cdef int make_root(Children *list, uint32_t level, Node **root) noexcept nogil:
    """Makes a tree of nodes of one level, which it takes over; on -1 (no memory) they are released."""
    cdef Children upper
    cdef Node *node
    cdef int failed = 0
    while not failed and list.count > 1:
        level += 1
        upper.items = NULL
        upper.count = upper.room = 0
        failed = pack(list, level, &upper)
        list[0] = upper
    if failed or level >= DEEPEST:
        release_all(list)
        return -1
    node = list.items[0].node if list.count else NULL
    free(list.items)
    root[0] = without_only_children(node)
    return 0


cdef Node *without_only_children(Node *node) noexcept nogil:
    """Returns the lowest node that contains everything: a root with one child is unnecessary."""
    cdef Node *child
    while node != NULL and node.level and node.count == 1:
        child = children_of(node)[0].node
        hold(child)
        release(node)
        node = child
    return node


cdef int insert(Work *work, Node **root, const uint64_t *places, size_t count) noexcept nogil:
    """Inserts sorted places of different keys; a place whose key is in the tree replaces the old one."""
    return change_root(work, root, places, count, False) if count else 0


cdef int remove(Work *work, Node **root, const uint64_t *places, size_t count) noexcept nogil:
    """Removes sorted places; those not in the tree are ignored."""
    return change_root(work, root, places, count, True) if count and root[0] != NULL else 0
