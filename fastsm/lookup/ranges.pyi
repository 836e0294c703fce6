from typing_extensions import Self

class OrderedView:
    def __new__(cls) -> Self: ...
