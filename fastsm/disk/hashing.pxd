from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef inline uint64_t load64(const uint8_t *p) noexcept nogil:
    cdef uint64_t word
    memcpy(&word, p, 8)
    return word


cdef inline uint32_t load32(const uint8_t *p) noexcept nogil:
    cdef uint32_t word
    memcpy(&word, p, 4)
    return word


cdef inline uint64_t rotate(uint64_t word, int bits) noexcept nogil:
    return (word << bits) | (word >> (64 - bits))


cdef inline void sip_round(uint64_t *v0, uint64_t *v1, uint64_t *v2, uint64_t *v3) noexcept nogil:
    v0[0] += v1[0]
    v2[0] += v3[0]
    v1[0] = rotate(v1[0], 13) ^ v0[0]
    v3[0] = rotate(v3[0], 16) ^ v2[0]
    v0[0] = rotate(v0[0], 32)
    v2[0] += v1[0]
    v0[0] += v3[0]
    v1[0] = rotate(v1[0], 17) ^ v2[0]
    v3[0] = rotate(v3[0], 21) ^ v0[0]
    v2[0] = rotate(v2[0], 32)


cdef inline uint64_t siphash13(
    uint64_t seed0, uint64_t seed1, const uint8_t *data, size_t size
) noexcept nogil:
    """Returns the SipHash-1-3 of `data` with a 128-bit seed (Aumasson and Bernstein, INDOCRYPT 2012)."""
    cdef uint64_t v0 = seed0 ^ <uint64_t>0x736F6D6570736575
    cdef uint64_t v1 = seed1 ^ <uint64_t>0x646F72616E646F6D
    cdef uint64_t v2 = seed0 ^ <uint64_t>0x6C7967656E657261
    cdef uint64_t v3 = seed1 ^ <uint64_t>0x7465646279746573
    cdef uint64_t word
    cdef uint64_t last = <uint64_t>size << 56
    cdef size_t whole = size & ~<size_t>7
    cdef size_t i = 0
    while i < whole:
        word = load64(data + i)
        v3 ^= word
        sip_round(&v0, &v1, &v2, &v3)
        v0 ^= word
        i += 8
    while i < size:
        last |= <uint64_t>data[i] << (8 * (i & 7))
        i += 1
    v3 ^= last
    sip_round(&v0, &v1, &v2, &v3)
    v0 ^= last
    v2 ^= 0xFF
    sip_round(&v0, &v1, &v2, &v3)
    sip_round(&v0, &v1, &v2, &v3)
    sip_round(&v0, &v1, &v2, &v3)
    return v0 ^ v1 ^ v2 ^ v3


cdef extern from *:
    """
    #define XXH64_PRIME1 0x9E3779B185EBCA87ULL
    #define XXH64_PRIME2 0xC2B2AE3D27D4EB4FULL
    #define XXH64_PRIME3 0x165667B19E3779F9ULL
    #define XXH64_PRIME4 0x85EBCA77C2B2AE63ULL
    #define XXH64_PRIME5 0x27D4EB2F165667C5ULL
    """
    const uint64_t PRIME1 "XXH64_PRIME1"
    const uint64_t PRIME2 "XXH64_PRIME2"
    const uint64_t PRIME3 "XXH64_PRIME3"
    const uint64_t PRIME4 "XXH64_PRIME4"
    const uint64_t PRIME5 "XXH64_PRIME5"


cdef inline uint64_t xxh64_round(uint64_t lane, uint64_t word) noexcept nogil:
    return rotate(lane + word * PRIME2, 31) * PRIME1


cdef inline uint64_t xxh64_end(uint64_t hashed) noexcept nogil:
    hashed = (hashed ^ (hashed >> 33)) * PRIME2
    hashed = (hashed ^ (hashed >> 29)) * PRIME3
    return hashed ^ (hashed >> 32)


cdef inline uint64_t xxh64_of_two(uint64_t first, uint64_t second, uint64_t seed) noexcept nogil:
    """Returns the XXH64 of 16 bytes, given as two words."""
    cdef uint64_t hashed = seed + PRIME5 + 16
    hashed = rotate(hashed ^ xxh64_round(0, first), 27) * PRIME1 + PRIME4
    hashed = rotate(hashed ^ xxh64_round(0, second), 27) * PRIME1 + PRIME4
    return xxh64_end(hashed)


cdef uint64_t xxh64(const uint8_t *data, size_t size, uint64_t seed) noexcept nogil


ctypedef struct Hash:
    # The XXH64 of bytes that come one after the other.
    uint64_t[4] lanes
    uint8_t[32] stripe    # bytes that do not fill a stripe yet
    size_t gathered       # how many
    uint64_t total
    uint64_t seed

cdef void begin_hash(Hash *state, uint64_t seed) noexcept nogil
cdef void feed_hash(Hash *state, const uint8_t *data, size_t size) noexcept nogil
cdef uint64_t end_hash(const Hash *state) noexcept nogil
