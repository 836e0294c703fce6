class Deadlines:
    count: int
    stale: int

class DueWalk: ...
