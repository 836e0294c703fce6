from libc.stdint cimport uint8_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    #define fastsm_load(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define fastsm_load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define fastsm_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    #define fastsm_store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define fastsm_acquire() __atomic_thread_fence(__ATOMIC_ACQUIRE)
    #define fastsm_release() __atomic_thread_fence(__ATOMIC_RELEASE)
    """
    uint64_t load "fastsm_load"(const uint64_t *p) noexcept nogil
    uint64_t load_acquire "fastsm_load_acquire"(const uint64_t *p) noexcept nogil
    void store "fastsm_store"(uint64_t *p, uint64_t value) noexcept nogil
    void store_release "fastsm_store_release"(uint64_t *p, uint64_t value) noexcept nogil
    void acquire "fastsm_acquire"() noexcept nogil
    void release "fastsm_release"() noexcept nogil

cdef enum:  # layout of the file
    HEADER_SIZE = 64
    SLOT_SIZE = 64           # one cache line each
    SLOTS = 2
    STEP_OFFSET = HEADER_SIZE + SLOTS * SLOT_SIZE
    STEP_SIZE = 32

ctypedef struct Slot:
    uint64_t number          # of the publication; even numbers are in the first slot
    uint64_t incarnation     # boot of the system, 32 bits; opening, 12; steps back, 10; other states, 10
    uint64_t identity        # of the log
    uint64_t end             # of its published frames
    uint64_t applied_index
    uint64_t applied_term
    uint64_t durable_index   # the last entry that would survive a power loss
    uint64_t checksum        # of all fields above


cdef enum:
    BACK_SHIFT = 10          # the position of the bits in an incarnation
    OPENING_SHIFT = 20
    BOOT_SHIFT = 32

ctypedef struct Step:
    # An owner's announcement that it is about to move to another log. It counts only if nothing was published later.
    uint64_t identity        # of the log that it leaves
    uint64_t next_identity   # of the next one
    uint64_t incarnation     # of the state in the next log
    uint64_t checksum        # of the fields above

cdef inline uint64_t mixed(uint64_t mix, uint64_t field) noexcept nogil:
    mix ^= field
    mix = (mix << 29) | (mix >> 35)
    return mix * <uint64_t>0x9E3779B97F4A7C15


cdef inline uint64_t slot_checksum(const Slot *slot) noexcept nogil:
    cdef uint64_t mix = mixed(<uint64_t>0x2545F4914F6CDD1D, slot.number)
    mix = mixed(mix, slot.incarnation)
    mix = mixed(mix, slot.identity)
    mix = mixed(mix, slot.end)
    mix = mixed(mix, slot.applied_index)
    mix = mixed(mix, slot.applied_term)
    return mixed(mix, slot.durable_index)


cdef inline uint64_t step_checksum(const Step *step) noexcept nogil:
    cdef uint64_t mix = mixed(<uint64_t>0x2545F4914F6CDD1D, step.identity)
    return mixed(mixed(mix, step.next_identity), step.incarnation)


cdef class Publisher:
    # Invariant: at any moment, one of the two slots is complete, and what it says was in the log before.
    cdef object descriptor
    cdef int file                    # its number; -1: closed
    cdef readonly str path
    cdef uint8_t *page               # the mapped file; NULL: stores might lack a block, so the file is written
    cdef readonly uint64_t number    # of the newest publication
    cdef readonly uint64_t incarnation
    cdef readonly bint failed        # the last publication could not be written; the next one includes everything

    cdef uint64_t announce(
        self, uint64_t identity, uint64_t next_identity, bint is_other_state, bint is_back) noexcept
    cdef void go_on_as(self, uint64_t incarnation) noexcept
    cdef object content(self)
    cdef void write_slot(self, Slot *slot) noexcept

    cdef inline void publish(
        self, uint64_t identity, uint64_t end, uint64_t applied_index, uint64_t applied_term, uint64_t durable_index
    ) noexcept:
        """Publishes to readers. Under the GIL, after everything in it is in the log. Runs no Python code."""
        cdef Slot slot
        cdef Slot *target
        slot.number = self.number + 1
        slot.incarnation = self.incarnation
        slot.identity = identity
        slot.end = end
        slot.applied_index = applied_index
        slot.applied_term = applied_term
        slot.durable_index = durable_index
        slot.checksum = slot_checksum(&slot)
        if self.page == NULL:
            self.write_slot(&slot)
            return
        target = <Slot *>(self.page + HEADER_SIZE) + (slot.number & 1)
        release()  # after the stores of the frame
        store(&target.incarnation, slot.incarnation)
        store(&target.identity, slot.identity)
        store(&target.end, slot.end)
        store(&target.applied_index, slot.applied_index)
        store(&target.applied_term, slot.applied_term)
        store(&target.durable_index, slot.durable_index)
        store(&target.checksum, slot.checksum)
        store_release(&target.number, slot.number)
        self.number = slot.number


cdef class Publication:
    cdef const uint8_t *page
    cdef readonly str path
    cdef uint64_t device, inode
    cdef uint64_t seen[SLOTS]        # the slots' numbers at the last `read`
    cdef uint64_t first              # the newest number when this was opened

    cdef inline bint is_new(self) noexcept nogil:
        """Returns whether something was published since the last `read`."""
        cdef const Slot *slots = <const Slot *>(self.page + HEADER_SIZE)
        return load(&slots[0].number) != self.seen[0] or load(&slots[1].number) != self.seen[1]
