from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #define fastsm_hold(count) ((void)__atomic_add_fetch(count, 1, __ATOMIC_RELAXED))
    #define fastsm_users(count) __atomic_load_n(count, __ATOMIC_ACQUIRE)
    """
    void add_user "fastsm_hold"(uint32_t *count) noexcept nogil
    uint32_t users_of "fastsm_users"(uint32_t *count) noexcept nogil

cdef enum:
    LEAF_ROOM = 512
    INNER_ROOM = 64
    DEEPEST = 12             # a higher tree would need more records than an arena has room for

ctypedef struct Node:
    # A leaf of places in the order of their keys, or an inner node with children.
    uint32_t users           # how many nodes, trees and readers refer to it; a shared node never changes
    uint16_t count
    uint16_t room
    uint32_t level           # 0: a leaf
    uint32_t padding

ctypedef struct Child:
    Node *node
    # Of a record: its key is <= the child's keys, and greater than the keys of earlier children
    uint64_t least

ctypedef struct Work:
    # What an operation on a tree needs, and its cost.
    const uint8_t *arena
    uint64_t comparisons     # key comparisons made
    int64_t added            # net number of places added

ctypedef struct Cursor:
    # A position: the path to a leaf, and an index in it (which may be its end). Without a tree, `depth` is 0.
    Node *nodes[DEEPEST]
    uint32_t at[DEEPEST]
    uint32_t depth

ctypedef struct Walk:
    # What is left of a range, from either end.
    Cursor low, high
    bint reverse
    bint done


cdef inline uint64_t *places_in(Node *leaf) noexcept nogil:
    return <uint64_t *>(leaf + 1)


cdef inline Child *children_of(Node *inner) noexcept nogil:
    return <Child *>(inner + 1)


cdef inline size_t node_size(uint32_t level, size_t room) noexcept nogil:
    return sizeof(Node) + room * (sizeof(Child) if level else sizeof(uint64_t))


cdef inline bint is_owned(Node *node) noexcept nogil:
    """Returns whether the caller's reference is the only one."""
    return users_of(&node.users) == 1


cdef Node *new_node(uint32_t level, size_t room) noexcept nogil
cdef void hold(Node *node) noexcept nogil
cdef void release(Node *node) noexcept nogil
cdef size_t lower_bound(
    Work *work, const uint64_t *places, size_t first, size_t stop, const uint8_t *key, size_t size) noexcept nogil
cdef size_t gallop(
    Work *work, const uint64_t *places, size_t first, size_t stop, const uint8_t *key, size_t size) noexcept nogil
cdef size_t child_for(Work *work, Node *node, size_t first, const uint8_t *key, size_t size) noexcept nogil
cdef void begin_walk(
    Work *work, Walk *walk, Node *root, const uint8_t *start, size_t start_size, const uint8_t *end, size_t end_size,
) noexcept nogil
cdef size_t walk_on(Walk *walk, size_t most, uint64_t **run) noexcept nogil
cdef bint owns_path(Walk *walk) noexcept nogil
cdef uint64_t tree_bytes(Node *root) noexcept nogil
cdef void check_tree(Node *root, const uint8_t *arena, uint64_t count) except *
