from libc.stdint cimport uint8_t, uint64_t

from fastsm.lookup.index cimport Index


cdef tuple tables_of(Index index)
cdef uint64_t body_checksum(const uint8_t *file, size_t size) noexcept nogil
cdef void *map_file(int descriptor, size_t size, size_t room, uint64_t offset) except NULL
