from typing_extensions import Self

class Sorting:
    def __new__(cls) -> Self: ...
