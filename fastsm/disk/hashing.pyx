"""The two hash functions: a keyed one for the table, an unkeyed one for checking frames.

SipHash-1-3 is used to find keys: an attacker who chooses keys without knowing the seed cannot make them collide. XXH64
is used to check frames: it costs less than copying the same bytes, and protects against accidents, not attackers.
Both are implemented here from their specifications, inlined where they are hot, and tested against CPython's own
SipHash and the `xxhash` package.
"""

import sys

if sys.byteorder != "little":
    raise ImportError("fastsm uses its formats in place: it needs a little-endian machine, and this one is big-endian")


cdef inline uint64_t xxh64_merge(uint64_t hashed, uint64_t lane) noexcept nogil:
    return (hashed ^ xxh64_round(0, lane)) * PRIME1 + PRIME4


cdef uint64_t xxh64(const uint8_t *data, size_t size, uint64_t seed) noexcept nogil:
    """Returns the XXH64 of `data` (Yann Collet's xxHash, algorithm description of xxhash.com)."""
    cdef const uint8_t *end = data + size
    cdef uint64_t hashed, lane1, lane2, lane3, lane4
    if size >= 32:
        lane1 = seed + PRIME1 + PRIME2
        lane2 = seed + PRIME2
        lane3 = seed
        lane4 = seed - PRIME1
        while end - data >= 32:
            lane1 = xxh64_round(lane1, load64(data))
            lane2 = xxh64_round(lane2, load64(data + 8))
            lane3 = xxh64_round(lane3, load64(data + 16))
            lane4 = xxh64_round(lane4, load64(data + 24))
            data += 32
        hashed = rotate(lane1, 1) + rotate(lane2, 7) + rotate(lane3, 12) + rotate(lane4, 18)
        hashed = xxh64_merge(hashed, lane1)
        hashed = xxh64_merge(hashed, lane2)
        hashed = xxh64_merge(hashed, lane3)
        hashed = xxh64_merge(hashed, lane4)
    else:
        hashed = seed + PRIME5
    return xxh64_rest(hashed + size, data, end)


cdef inline uint64_t xxh64_rest(uint64_t hashed, const uint8_t *data, const uint8_t *end) noexcept nogil:
    """Adds the bytes that do not fill a stripe of 32, and finishes the hash."""
    while end - data >= 8:
        hashed = rotate(hashed ^ xxh64_round(0, load64(data)), 27) * PRIME1 + PRIME4
        data += 8
    if end - data >= 4:
        hashed = rotate(hashed ^ (load32(data) * PRIME1), 23) * PRIME2 + PRIME3
        data += 4
    while data < end:
        hashed = rotate(hashed ^ (data[0] * PRIME5), 11) * PRIME1
        data += 1
    return xxh64_end(hashed)


cdef void begin_hash(Hash *state, uint64_t seed) noexcept nogil:
    state.lanes[0], state.lanes[1] = seed + PRIME1 + PRIME2, seed + PRIME2
    state.lanes[2], state.lanes[3] = seed, seed - PRIME1
    state.seed, state.total, state.gathered = seed, 0, 0


cdef void feed_hash(Hash *state, const uint8_t *data, size_t size) noexcept nogil:
    """Takes the next bytes. A 32-byte stripe that spans two calls is first put together in `state.stripe`."""
    cdef const uint8_t *end = data + size
    cdef size_t taken
    state.total += size
    if state.gathered:
        taken = min(<size_t>32 - state.gathered, size)
        memcpy(state.stripe + state.gathered, data, taken)
        state.gathered += taken
        data += taken
        if state.gathered < 32:
            return
        take_stripe(state.lanes, state.stripe)
    while end - data >= 32:
        take_stripe(state.lanes, data)
        data += 32
    state.gathered = end - data
    memcpy(state.stripe, data, state.gathered)


cdef uint64_t end_hash(const Hash *state) noexcept nogil:
    """Returns the XXH64 of all the bytes taken."""
    cdef const uint64_t *lanes = state.lanes
    cdef const uint8_t *rest = state.stripe
    cdef uint64_t hashed
    cdef int i
    if state.total < 32:
        return xxh64_rest(state.seed + PRIME5 + state.total, rest, rest + state.gathered)
    hashed = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) + rotate(lanes[3], 18)
    for i in range(4):
        hashed = xxh64_merge(hashed, lanes[i])
    return xxh64_rest(hashed + state.total, rest, rest + state.gathered)


cdef inline void take_stripe(uint64_t *lanes, const uint8_t *data) noexcept nogil:
    lanes[0] = xxh64_round(lanes[0], load64(data))
    lanes[1] = xxh64_round(lanes[1], load64(data + 8))
    lanes[2] = xxh64_round(lanes[2], load64(data + 16))
    lanes[3] = xxh64_round(lanes[3], load64(data + 24))


def checksum_of_parts(list parts, seed=0):
    """Returns the XXH64 of consecutive bytes objects, for tests."""
    cdef Hash state
    begin_hash(&state, seed)
    for part in parts:
        feed_hash(&state, part, len(part))
    return end_hash(&state)


def siphash(const uint8_t[::1] data, seed0=0, seed1=0):
    """Returns the SipHash-1-3 of a bytes-like object with the 128-bit seed `(seed0, seed1)`."""
    return siphash13(seed0, seed1, &data[0] if data.shape[0] else NULL, data.shape[0])


def checksum(const uint8_t[::1] data, seed=0):
    """Returns the XXH64 of a bytes-like object."""
    return xxh64(&data[0] if data.shape[0] else NULL, data.shape[0], seed)
