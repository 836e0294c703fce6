"""Finding which of many keys, taken in order, are overruled by a later equal key."""

import os

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

from fastsm.disk.hashing cimport load64, rotate, xxh64

cdef enum:
    SHORT = 16               # bytes of a key that are hashed in two loads
    PATIENCE = 16            # steps per key; if more are needed, the keys were chosen to collide

cdef uint64_t SEED = int.from_bytes(os.urandom(8), "little")
cdef uint64_t MIX = 0x9E3779B97F4A7C15


cdef inline uint64_t hash_of(const uint8_t *key, size_t size) noexcept nogil:
    cdef uint64_t first = 0
    cdef uint64_t last = 0
    if size > SHORT:
        return xxh64(key, size, SEED)
    if size >= 8:
        first, last = load64(key), load64(key + size - 8)
    else:
        memcpy(&first, key, size)
    first = ((first ^ SEED) + size) * MIX
    first = (rotate(first, 32) ^ last ^ (first >> 29)) * MIX
    return first ^ (first >> 32)


cdef class LastOfEqual:
    """A table of keys for making one command.

    Thread safety: used by one thread. The keys are not copied; the caller keeps their bytes in place.
    """

    def __cinit__(self, size_t count):
        cdef size_t slots = 4
        while slots < 2 * count:
            slots *= 2
        self.mask = slots - 1
        self.patience = PATIENCE * count
        self.slots = <uint64_t *>calloc(slots, sizeof(uint64_t))
        self.keys = <const uint8_t **>malloc(count * sizeof(void *) + 1)
        self.sizes = <uint32_t *>malloc(count * sizeof(uint32_t) + 1)
        self.overruled = <uint8_t *>calloc(count + 1, 1)
        if self.slots == NULL or self.keys == NULL or self.sizes == NULL or self.overruled == NULL:
            raise MemoryError(f"no memory to compare {count} keys")

    def __dealloc__(self):
        free(self.slots)
        free(self.keys)
        free(self.sizes)
        free(self.overruled)

    cdef Py_ssize_t take(self, Py_ssize_t number, const uint8_t *key, size_t size) except -2:
        """Takes the next key; returns the number of an equal earlier key, which it overrules, or -1."""
        cdef uint64_t hashed = hash_of(key, size)
        cdef size_t i = hashed & self.mask
        cdef uint64_t mark = hashed & <uint64_t>0xFFFFFFFF00000000
        cdef size_t other
        self.keys[number] = key
        self.sizes[number] = <uint32_t>size
        if self.known is not None:
            return self.take_slowly(number)
        while self.slots[i]:
            if self.slots[i] & <uint64_t>0xFFFFFFFF00000000 == mark:
                other = <size_t>(self.slots[i] & <uint64_t>0xFFFFFFFF) - 1
                if self.sizes[other] == size and memcmp(self.keys[other], key, size) == 0:
                    self.slots[i] = mark | <uint64_t>(number + 1)
                    self.overruled[other] = True
                    return other
            if self.patience == 0:
                self.known = {}
                for other in range(number):
                    if not self.overruled[other]:
                        self.take_slowly(other)
                return self.take_slowly(number)
            self.patience -= 1
            i = (i + 1) & self.mask
        self.slots[i] = mark | <uint64_t>(number + 1)
        return -1

    cdef Py_ssize_t take_slowly(self, Py_ssize_t number) except -2:
        cdef bytes key = PyBytes_FromStringAndSize(<const char *>self.keys[number], self.sizes[number])
        cdef Py_ssize_t other = self.known.get(key, -1)
        self.known[key] = number
        if other >= 0:
            self.overruled[other] = True
        return other
